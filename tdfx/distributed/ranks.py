"""The processes of a mesh: they broadcast values, share work, and fail together.

If one process failed alone, the others would wait for it in the next collective until a timeout. So each method first
exchanges whether a process has failed, and ``raise_on_all`` does so once more at its end; the error is raised on all.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tdfx.devices import current
from tdfx.distributed.processes import Processes, Task
from tdfx.errors import ModelError, TdfxError, class_named
from tdfx.layers.placement import full

Place = tuple[int, ...]
"""The coordinate of a process in the mesh."""


class Ranks(Processes):
    """The processes of a mesh, all of which must make the same calls in the same order.

    Args:
        groups: This process's group along each dimension of the mesh.
        device: The device on which the processes communicate.
        replicated: True if every process holds whole parameters; False if each holds shards of them.
    """

    def __init__(
        self, groups: Sequence[dist.ProcessGroup], device: torch.device | str, *, replicated: bool = True
    ) -> None:
        self.groups = list(groups)
        self.device = device
        self.replicated = replicated
        self.place: Place = tuple(group.rank() for group in groups)
        self.places: list[Place] = list(product(*(range(group.size()) for group in groups)))
        self._shared_errors: list[BaseException] = []  # that every process has raised

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh) -> Ranks:
        """Return the processes that hold the shards of a model on a device mesh."""
        return cls(mesh.get_all_groups(), mesh.device_type, replicated=False)

    @property
    def is_first(self) -> bool:
        """True on the first process of the mesh."""
        return self._is_me(self.places[0])

    @contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """Raise on every process the error that one of them raises inside; all must reach the end, or fail."""
        try:
            yield
        except Exception as error:
            if not self._is_shared(error):
                self._exchange_failures(error)
            raise
        self._exchange_failures(None)

    def raise_pending(self) -> None:
        """Raise the error of another process, if one has failed."""
        self._exchange_failures(None)

    def broadcast_object(self, value: Any) -> Any:
        """Return the first process's value, which must be picklable."""
        self.raise_pending()
        return self._broadcast_value(value, self.places[0])

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all processes, which must be picklable, in the same order on each."""
        self.raise_pending()
        return self._gather_objects([value])

    def check_same(self, value: object, message: str) -> None:
        """Raise ModelError with a message, on every process, unless all have an equal value, which must be picklable."""
        first = self.broadcast_object(value)
        if self._is_true_anywhere(first != value):
            raise self._shared(ModelError(message))

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite unsharded tensors, which each process has computed itself, with the first process's values.

        Shards are left as they are: they are cut from values that are the same on all processes.
        """
        self.raise_pending()
        for tensor in tensors if self.replicated else ():
            tensor.copy_(self._broadcast_tensor(tensor.detach(), tensor.shape, tensor.dtype, self.places[0]))

    def average_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean over all processes by name; a tensor that a process lacks counts as zero there."""
        self.raise_pending()
        headers = {name: _TensorHeader(tuple(value.shape), value.dtype) for name, value in tensors.items()}
        for known in self._gather_objects([headers]):
            headers |= {name: header for name, header in known.items() if name not in headers}
        means = {}
        for name in sorted(headers):
            shape, dtype = headers[name]
            own = tensors.get(name)
            total = (
                torch.zeros(shape, dtype=dtype, device=self.device)
                if own is None
                else own.to(self.device).clone(memory_format=torch.contiguous_format)
            )
            for group in self.groups:
                dist.all_reduce(total, group=group)
            # A reduction may round differently on each process.
            total = self._broadcast_tensor(total / len(self.places), shape, dtype, self.places[0])
            means[name] = total if own is None else total.to(own.device)
        return means

    def map_tasks(self, tasks: Sequence[Task]) -> Iterator[tuple[Any, ...]]:
        """Do each task on one process, as many at once as there are processes, and yield all results on every process.

        A process holds the inputs of its own task, briefly those of one more, and the results.
        """
        for start in range(0, len(tasks), len(self.places)):
            yield from self._round(tasks[start : start + len(self.places)])

    def _round(self, tasks: Sequence[Task]) -> list[tuple[Any, ...]]:
        """Do at most one task on each process; return the results of all."""
        self.raise_pending()
        result: tuple[Any, ...] | Exception = ()
        work: Callable[[], tuple[Any, ...]] | None = None
        for place, task in zip(self.places, tasks, strict=False):
            inputs = tuple(map(full, task.reads))
            if self._is_me(place):
                work = partial(task.work, *inputs)
            del inputs
        if work is not None:
            try:
                result = work()
            except Exception as error:  # any error must be sent, because the other processes wait for the result
                result = error
        return [self._broadcast_result(result, place) for place, _ in zip(self.places, tasks, strict=False)]

    def _broadcast_result(self, result: tuple[Any, ...] | Exception, owner: Place) -> tuple[Any, ...]:
        """Return the result of the owner's task, or raise its error; tensors are sent as tensors, other values pickled."""
        if isinstance(result, Exception):
            header: Any = _picklable(result)
        else:
            header = [_TensorHeader(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in result]
        header = self._broadcast_value(header, owner)
        if isinstance(header, Exception):
            raise self._shared(result if self._is_me(owner) and isinstance(result, Exception) else header)
        values = result if self._is_me(owner) and isinstance(result, tuple) else (None,) * len(header)
        return tuple(
            self._broadcast_tensor(value, part.shape, part.dtype, owner) if isinstance(part, _TensorHeader) else part
            for value, part in zip(values, header, strict=True)
        )

    def _exchange_failures(self, error: Exception | None) -> None:
        """Tell the other processes whether this one has failed; raise the error of another that has."""
        if not self._is_true_anywhere(error is not None):
            return
        own = [] if error is None else [(dist.get_rank(), type(error).__name__, str(error))]
        failures = self._gather_objects(own)
        if error is None:
            rank, name, text = min(failures)
            message = f"Process {rank} could not go on, so nothing was changed on any process. It says: {name}: {text}"
            # Of the same class on all processes, so that a caller can catch the error on each.
            raise self._shared(class_named(name)(message))

    def _gather_objects(self, values: list[Any]) -> list[Any]:
        """Return the values of all processes, which must be picklable, in one list."""
        with current(self.device):  # nccl sends objects by way of the current device
            for group in self.groups:
                gathered: list[Any] = [None] * group.size()
                dist.all_gather_object(gathered, values, group=group)
                values = [value for part in gathered for value in part]
        return values

    def _shared(self, error: Exception) -> Exception:
        """Record and return an error that all processes raise, so that it is not exchanged again."""
        self._shared_errors.append(error)
        return error

    def _is_shared(self, error: BaseException | None) -> bool:
        """Return True for an error that all processes raise, and for an error that it caused."""
        while error is not None:
            if any(error is shared for shared in self._shared_errors):
                return True
            error = error.__cause__ or error.__context__
        return False

    def _broadcast_value(self, value: Any, owner: Place) -> Any:
        """Return the owner's value, which is sent along each dimension of the mesh in turn."""
        box = [value]
        with current(self.device):
            for group, place in zip(self.groups, owner, strict=True):
                dist.broadcast_object_list(box, group=group, group_src=place)
        return box[0]

    def _broadcast_tensor(self, value: Tensor | None, shape: Sequence[int], dtype: torch.dtype, owner: Place) -> Tensor:
        """Return the owner's tensor; ``value`` is None on the other processes."""
        if value is None:
            tensor = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        else:
            tensor = value.to(self.device).contiguous()
        for group, place in zip(self.groups, owner, strict=True):
            dist.broadcast(tensor, group=group, group_src=place)
        return tensor

    def _is_true_anywhere(self, condition: bool) -> bool:
        count = torch.tensor(float(condition), device=self.device)
        for group in self.groups:
            dist.all_reduce(count, group=group)
        return bool(count > 0)

    def _is_me(self, place: Place) -> bool:
        return self.place == place


class _TensorHeader(NamedTuple):
    """Shape and dtype of a tensor that is sent next."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _picklable(error: Exception) -> Exception:
    """Return an error itself if it can be pickled, else a TdfxError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a user's class may raise anything here
        return TdfxError(f"another process failed: {type(error).__name__}: {error}")
    return error
