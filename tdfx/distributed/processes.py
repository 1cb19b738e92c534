"""How the processes that train a model work together, and how the only process works alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor

from tdfx.errors import TdfxError
from tdfx.layers.placement import full

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work, such as splitting one weight, that needs no other process once its parameters were read."""

    work: Callable[..., tuple[Tensor, ...]]
    """From the values of the parameters to the result."""
    reads: tuple[Tensor, ...]
    """The parameters, as the model holds them: each may be in shards."""

    def __call__(self) -> tuple[Tensor, ...]:
        """Read the parameters and do the work."""
        return self.work(*map(full, self.reads))


Spread = Callable[[Sequence[Task]], Iterable[tuple[Tensor, ...]]]
"""Does every task once, on one of the processes that train the model, and gives each process the results of all."""

Agree = Callable[[Any], Any]
"""From a value that each process has to that of the first one; all must call it."""


Together = Callable[[], AbstractContextManager[None]]
"""Makes a context in which what one of the processes raises is raised on all; all must enter and leave it."""

Ready = Callable[[], None]
"""Raises what another process has failed with; all must call it, before what they must do together."""


def itself(value: Any) -> Any:
    """Return a value as the only process has it."""
    return value


def unasked() -> None:
    """Ask no other process, where there is none."""


@dataclass(frozen=True, slots=True)
class Lead:
    """How the first of the processes that train a model does what need not be done by all, such as timing."""

    agree: Agree = itself
    is_mine: bool = True
    """True on the first process, and on the only one."""

    def do(self, work: Callable[[], Result]) -> Result:
        """Return on every process what the work gives on the first, or raise what it raises there; all must call this."""
        outcome: tuple[Result | None, TdfxError | None] = (None, None)
        if self.is_mine:
            try:
                outcome = work(), None
            except TdfxError as error:
                outcome = None, error
        result, failure = self.agree(outcome)
        if failure is not None:
            raise failure
        return cast("Result", result)


def alone(tasks: Sequence[Task]) -> Iterable[tuple[Tensor, ...]]:
    """Do the tasks in the only process that there is, each when its result is asked for."""
    return (task() for task in tasks)
