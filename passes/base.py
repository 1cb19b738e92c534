"""What every pass is: a step of the compiler with a contract that is checked at every call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from tdfx.errors import PassError
from tdfx.passes.program import Program


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that a pass did."""

    site: str
    """The path of the module or site that it changed."""
    what: str


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass hands on; a pass that works out more than a program returns a subclass with the rest."""

    program: Program
    changes: tuple[Change, ...] = ()
    """What the pass did, one entry for each site; ``ensures`` reads it."""


Result = TypeVar("Result", bound=PassResult)


class Pass(ABC, Generic[Result]):
    """A step of the compiler. An instance holds settings and no results, so that it can be run again."""

    name: ClassVar[str]

    def __call__(self, program: Program) -> Result:
        """Check what the pass requires, run it, and check what it promises."""
        self.requires(program)
        result = self.run(program)
        self.ensures(program, result)
        return result

    def requires(self, program: Program) -> None:
        """Raise one of ``tdfx.errors`` if the program cannot go through this pass."""

    @abstractmethod
    def run(self, program: Program) -> Result:
        """Do the work; ``program`` and its module are left as they were."""

    def ensures(self, before: Program, result: Result) -> None:
        """Raise PassError if the result is not what the pass promises; both programs are given."""

    def check(self, holds: bool, promise: str) -> None:
        """Raise PassError, naming this pass, unless ``holds``."""
        if not holds:
            raise PassError(
                f"pass {self.name!r} broke its promise: {promise}. This is a defect of tdfx; nothing of the model or the "
                f"optimizer was changed. Please report it with the model's class."
            )
