"""The processes that train a model: agreeing on a value, sharing work, whose inputs may be in shards, and failing together.

A process that fails on its own would leave the others waiting in the next collective until their group's timeout. So each
of the calls here begins with a word of whether anybody has failed, and ``together`` ends with one: what is raised on one
process anywhere in between is raised on all.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tdfx.distributed.processes import Task
from tdfx.errors import ModelError, TdfxError, class_named
from tdfx.layers.placement import full

Place = tuple[int, ...]
"""The coordinate of a process in the mesh."""


class Ranks:
    """The processes of a mesh, each of which must make the same calls in the same order."""

    def __init__(self, groups: Sequence[dist.ProcessGroup], device: torch.device | str) -> None:
        """Take the process's group along each dimension of the mesh, and the device on which they communicate."""
        self.groups = list(groups)
        self.device = device
        self.place: Place = tuple(group.rank() for group in groups)
        self.places: list[Place] = list(product(*(range(group.size()) for group in groups)))
        self._known: list[BaseException] = []
        """What was raised on all processes alike."""

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh) -> Ranks:
        """Return the processes of a device mesh."""
        return cls([mesh.get_group(dimension) for dimension in range(mesh.ndim)], mesh.device_type)

    @property
    def leads(self) -> bool:
        """True for the first process, whose value the others take over."""
        return self._is_me(self.places[0])

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise on every process what one of them raises inside; all must come to the end of it, or fail."""
        try:
            yield
        except Exception as error:
            if not self._is_known(error):
                self._settle(error)
            raise
        self._settle(None)

    def ready(self) -> None:
        """Raise what another process has failed with, if one has; all must call it, before what all must do together."""
        self._settle(None)

    def agree(self, value: Any) -> Any:
        """Return the first process's value, which must be one that pickle takes."""
        self.ready()
        return self._told(value, self.places[0])

    def check_same(self, value: object, message: str) -> None:
        """Raise ModelError on every process unless all have an equal value, which must be one that pickle takes."""
        first = self.agree(value)
        differs = torch.tensor(float(first != value), device=self.device)
        for group in self.groups:
            dist.all_reduce(differs, group=group)
        if differs > 0:
            raise self._knowing(ModelError(message))

    def level(self, tensors: Iterable[Tensor]) -> None:
        """Give plain tensors, which every process has computed by itself, the first process's values, in place."""
        self.ready()
        for tensor in tensors:
            told = self._sent(tensor.detach(), tensor.shape, tensor.dtype, self.places[0])
            tensor.copy_(told)

    def spread(self, tasks: Sequence[Task]) -> Iterator[tuple[Tensor, ...]]:
        """Do every task on one process and give all the results, as many at once as there are processes.

        Beside its shards a process holds what its own task reads, one more task's for a moment, and the results.

        Raises:
            TdfxError: A task failed; every process raises what the one that did the task did.
        """
        for start in range(0, len(tasks), len(self.places)):
            yield from self._round(tasks[start : start + len(self.places)])

    def _round(self, tasks: Sequence[Task]) -> list[tuple[Tensor, ...]]:
        self.ready()
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
            raise self._knowing(mine if self._is_me(owner) and isinstance(mine, Exception) else note)
        own = mine if self._is_me(owner) and isinstance(mine, tuple) else ()
        return tuple(
            self._sent(own[index] if own else None, shape, dtype, owner) for index, (shape, dtype) in enumerate(note)
        )

    def _settle(self, mine: Exception | None) -> None:
        """Tell the others whether this process has failed, and raise what another has failed with."""
        failed = torch.tensor(float(mine is not None), device=self.device)
        for group in self.groups:
            dist.all_reduce(failed, group=group)
        if failed == 0:
            return
        said: list[Any] = [None if mine is None else (dist.get_rank(), type(mine).__name__, str(mine))]
        for group in self.groups:
            gathered: list[Any] = [None] * group.size()
            dist.all_gather_object(gathered, said, group=group)
            said = [one for part in gathered for one in part if one is not None]
        if mine is None:
            rank, name, text = min(said)
            # Of the same class, so that a caller catches it on every process.
            raise self._knowing(class_named(name)(_told_of(rank, name, text)))

    def _knowing(self, error: Exception) -> Exception:
        """Return an error that all processes raise, so that none need tell the others of it."""
        self._known.append(error)
        return error

    def _is_known(self, error: BaseException | None) -> bool:
        """Return True for what all processes raise, or raise in consequence."""
        while error is not None:
            if any(error is one for one in self._known):
                return True
            error = error.__cause__ or error.__context__
        return False

    def _told(self, value: Any, owner: Place) -> Any:
        """Return the owner's value: along each dimension of the mesh from its place there."""
        held = [value]
        for dimension, place in enumerate(owner):
            dist.broadcast_object_list(held, group=self.groups[dimension], group_src=place)
        return held[0]

    def _sent(self, mine: Tensor | None, shape: Sequence[int], dtype: torch.dtype, owner: Place) -> Tensor:
        if mine is None:
            tensor = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        else:
            tensor = mine.to(self.device).contiguous()
        for dimension, place in enumerate(owner):
            dist.broadcast(tensor, group=self.groups[dimension], group_src=place)
        return tensor

    def _is_me(self, place: Place) -> bool:
        return self.place == place


def _told_of(rank: int, name: str, text: str) -> str:
    return f"Process {rank} could not go on, so nothing was changed on any process. It says: {name}: {text}"


def _sendable(error: Exception) -> Exception:
    """Return an error as it is where it can be sent, or else one of tdfx that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a user's class may raise anything here
        return TdfxError(f"another process failed: {type(error).__name__}: {error}")
    return error
