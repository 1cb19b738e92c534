"""How the processes that train one model work together: ``Solo`` is the only process, ``Ranks`` are those of a mesh."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor

from tdfx.errors import TdfxError
from tdfx.layers.placement import full

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work, such as splitting one weight, that one process can do alone once the parameters are gathered."""

    work: Callable[..., tuple[Any, ...]]
    """Maps the values of the parameters to the result: a tuple of tensors and of picklable values."""
    reads: tuple[Tensor, ...]
    """The parameters as the model holds them, sharded or not."""

    def __call__(self) -> tuple[Any, ...]:
        """Gather the parameters and do the work."""
        return self.work(*map(full, self.reads))


class Processes(ABC):
    """The processes that train one model; all of them must call every method, in the same order."""

    @property
    @abstractmethod
    def is_first(self) -> bool:
        """True on the process whose values ``broadcast_object`` and ``broadcast_tensors`` send."""

    @abstractmethod
    def broadcast_object(self, value: Any) -> Any:
        """Return the first process's value, which must be picklable."""

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all processes, which must be picklable, in the same order on each."""

    @abstractmethod
    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite unsharded tensors, which each process has computed itself, with the first process's values."""

    @abstractmethod
    def average_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean over all processes by name, the same bits on each; a tensor that one lacks counts as zero."""

    @abstractmethod
    def map_tasks(self, tasks: Sequence[Task]) -> Iterable[tuple[Any, ...]]:
        """Do each task on one of the processes, and yield all results in order on every process."""

    @abstractmethod
    def raise_on_all(self) -> AbstractContextManager[None]:
        """Return a context manager that raises an error of one process on all; all must enter and leave it."""

    @abstractmethod
    def raise_pending(self) -> None:
        """Raise the error of another process that has failed; call it before all processes must act together."""

    @abstractmethod
    def check_same(self, value: object, message: str) -> None:
        """Raise ModelError with a message on every process, unless all processes pass an equal value."""

    def on_rank0(self, work: Callable[[], Result]) -> Result:
        """Do work on the first process only; return its result, or raise its TdfxError, on every process."""
        outcome: tuple[Result | None, TdfxError | None] = (None, None)
        if self.is_first:
            try:
                outcome = work(), None
            except TdfxError as error:
                outcome = None, error
        result, failure = self.broadcast_object(outcome)
        if failure is not None:
            raise failure
        return cast("Result", result)


class Solo(Processes):
    """The only process."""

    is_first = True

    def broadcast_object(self, value: Any) -> Any:
        """Return the value."""
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the value alone."""
        return [value]

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Leave the tensors as they are."""

    def average_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors."""
        return dict(tensors)

    def map_tasks(self, tasks: Sequence[Task]) -> Iterable[tuple[Any, ...]]:
        """Yield the results, each computed when it is requested."""
        return (task() for task in tasks)

    def raise_on_all(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def raise_pending(self) -> None:
        """Do nothing: there is no other process that could have failed."""

    def check_same(self, value: object, message: str) -> None:
        """Do nothing: there is no other process with another value."""
