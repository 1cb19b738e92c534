"""What every pass is: a step of the compiler with a contract that is checked at every call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from tdfx.errors import PassError
from tdfx.passes.program import Program


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that a pass did."""

    site: str
    """The path that it did it to."""
    what: str
    """What it did, in a few words."""


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass hands to the next one."""

    program: Program
    changes: tuple[Change, ...] = ()

    @property
    def modified(self) -> bool:
        """True if anything changed; read from ``changes``, so it cannot disagree."""
        return bool(self.changes)


class Pass(ABC):
    """A step of the compiler with a contract that is checked at every call."""

    name: ClassVar[str]

    def __call__(self, program: Program) -> PassResult:
        """Check what the pass requires, run it, and check what it promises."""
        self.requires(program)
        result = self.run(program)
        self.ensures(program, result)
        return result

    def requires(self, program: Program) -> None:
        """Raise one of ``tdfx.errors`` if the program cannot go through this pass."""

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Do the work; ``program`` and its module are left as they were."""

    def ensures(self, before: Program, result: PassResult) -> None:
        """Raise PassError if the result is not what the pass promises; sees both programs."""

    def check(self, holds: bool, promise: str) -> None:
        """Raise PassError, naming this pass, unless ``holds``."""
        if not holds:
            raise PassError(
                f"pass {self.name!r} broke its promise: {promise}. This is a defect of tdfx; nothing of the model or the "
                f"optimizer was changed. Please report it with the model's class."
            )
