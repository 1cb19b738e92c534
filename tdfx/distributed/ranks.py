"""The processes of a device mesh: agreeing on a value, and sharing work whose inputs are in shards."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tdfx.errors import TdfxError
from tdfx.passes.base import Task
from tdfx.shards import full

Place = tuple[int, ...]
"""The coordinate of a process in the mesh."""


class Ranks:
    """The processes of a mesh, each of which must make the same calls in the same order."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.places: list[Place] = list(product(*map(range, mesh.shape)))

    def agree(self, value: Any) -> Any:
        """Return the first process's value, which must be one that pickle takes."""
        return self._told(value, self.places[0])

    def spread(self, tasks: Sequence[Task]) -> Iterator[tuple[Tensor, ...]]:
        """Do every task on one process and give all the results, as many at once as there are processes.

        Beside its shards a process holds what its own task reads, one more task's for a moment, and the results.

        Raises:
            TdfxError: A task failed; every process raises what the one that did the task did.
        """
        for start in range(0, len(tasks), len(self.places)):
            yield from self._round(tasks[start : start + len(self.places)])

    def _round(self, tasks: Sequence[Task]) -> list[tuple[Tensor, ...]]:
        mine: tuple[Tensor, ...] | Exception = ()
        inputs: tuple[Tensor, ...] = ()
        task = None
        for place, one in zip(self.places, tasks, strict=False):
            read = tuple(full(tensor) for tensor in one.reads)
            if self._is_me(place):
                task, inputs = one, read
            del read
        if task is not None:
            try:
                mine = task.work(*inputs)
            except Exception as error:  # the other processes wait for this one: they must hear of it, whatever it is
                mine = error
        return [self._result(mine, place) for place, _ in zip(self.places, tasks, strict=False)]

    def _result(self, mine: tuple[Tensor, ...] | Exception, owner: Place) -> tuple[Tensor, ...]:
        """Return what the owner's task gave, or raise what it raised."""
        note: Any = _sendable(mine) if isinstance(mine, Exception) else [(one.shape, one.dtype) for one in mine]
        note = self._told(note, owner)
        if isinstance(note, Exception):
            raise mine if self._is_me(owner) and isinstance(mine, Exception) else note
        own = mine if self._is_me(owner) and isinstance(mine, tuple) else ()
        return tuple(
            self._sent(own[index] if own else None, shape, dtype, owner) for index, (shape, dtype) in enumerate(note)
        )

    def _told(self, value: Any, owner: Place) -> Any:
        """Return the owner's value: along each dimension of the mesh from its place there."""
        held = [value]
        for dimension, place in enumerate(owner):
            dist.broadcast_object_list(held, group=self.mesh.get_group(dimension), group_src=place)
        return held[0]

    def _sent(self, mine: Tensor | None, shape: Sequence[int], dtype: torch.dtype, owner: Place) -> Tensor:
        device = self.mesh.device_type
        tensor = torch.empty(tuple(shape), dtype=dtype, device=device) if mine is None else mine.to(device).contiguous()
        for dimension, place in enumerate(owner):
            dist.broadcast(tensor, group=self.mesh.get_group(dimension), group_src=place)
        return tensor

    def _is_me(self, place: Place) -> bool:
        return tuple(self.mesh.get_coordinate() or ()) == place


def _sendable(error: Exception) -> Exception:
    """Return an error as it is where it can be sent, or else one of tdfx that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a user's class may raise anything here
        return TdfxError(f"another process failed: {type(error).__name__}: {error}")
    return error
