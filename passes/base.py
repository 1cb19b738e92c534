"""What every pass is, and what it hands to the next one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, fx, nn

from tdfx.cost.count import Flow
from tdfx.errors import PassError, TdfxError
from tdfx.factors.operation import Operation
from tdfx.kinds.registry import find_kind, kind_of
from tdfx.layers import Factorized
from tdfx.plan import Emit, Plan, Reason
from tdfx.shards import full

Result = TypeVar("Result")

PLAN_ATTRIBUTE = "_tdfx_plan"
"""Where a rewritten model keeps its plan; this is also how a merge knows of a rewrite that kept every site."""


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


@dataclass(frozen=True, slots=True)
class Traced:
    """What torch.fx made of one module."""

    graphs: tuple[fx.Graph, ...]
    """One graph, or one in train and one in eval mode where they differ in more than constants."""
    doubt: str = ""
    """Why they cannot stand for the module; "" if they can."""
    blocks: frozenset[str] = frozenset()
    """Paths inside it of the modules that they call as they are, and do not look into."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a parameter that functional calls use as a weight."""

    owner: str
    """Path of the module that holds it."""
    name: str
    """Its name there."""

    @classmethod
    def of(cls, path: str) -> Slot:
        """Return the place of the parameter at a path."""
        owner, _, name = path.rpartition(".")
        return cls(owner, name)

    @property
    def path(self) -> str:
        """The parameter's own path."""
        return f"{self.owner}.{self.name}" if self.owner else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place in the model that computes a convolution or a linear map."""

    name: str
    """Path of the layer in the program's module, or of the parameter where no layer kind holds it."""
    layer: nn.Module
    """The layer itself, in the program's module; or the module that holds the parameter."""
    kind: str
    """The layer kind, or the function that takes the parameter as its weight."""
    operation: Operation | None
    """What it computes; None for a kind that no scheme can stand for."""
    calls: int
    """Calls in one forward pass, as far as the graphs or a run with example inputs show."""
    nodes: tuple[fx.Node, ...] = ()
    """The calls in the graphs."""
    reason: Reason | None = None
    """Why it cannot be rewritten, whatever the policy says; or that it is factorized, so that its ranks can be lowered."""
    note: str = ""
    """The reason in words."""
    aliases: tuple[str, ...] = ()
    """Other paths at which the model holds the same layer."""
    slot: Slot | None = None
    """The parameter that a rewrite replaces, where functions take it as their weight and the layer stays."""
    flows: tuple[Flow, ...] | None = None
    """What flows into each call; None without example inputs, and nothing where they do not reach it in either mode."""

    @property
    def is_open(self) -> bool:
        """True for a site that a policy may decide on: that may be rewritten, or is factorized and could get lower ranks."""
        return self.reason in {None, Reason.FACTORIZED}

    @property
    def is_missed(self) -> bool:
        """True for a site that the example inputs do not reach, so that nobody knows how long it takes."""
        return self.flows == ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which a policy may speak of it."""
        return (self.name, *self.aliases)

    @property
    def weight(self) -> nn.Parameter | None:
        """The parameter that holds the weight; None where that is computed, or factorized."""
        if isinstance(self.layer, Factorized):
            return None
        if self.slot is not None:
            return self.layer._parameters[self.slot.name]
        kind = find_kind(self.layer)
        return self.layer._parameters.get(kind.weight) if kind is not None else None

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """The parameters that make the weight: itself, or its factors; none where it is computed."""
        if isinstance(self.layer, Factorized):
            return self.layer.weights
        return () if self.weight is None else (self.weight,)

    @property
    def dense(self) -> Tensor:
        """The weight, detached, in the layout of its operation."""
        (weight,) = self.weights
        return self.as_dense(full(weight))

    def as_dense(self, weight: Tensor) -> Tensor:
        """Return the values of the weight in the layout of its operation."""
        return weight if self.slot is not None else kind_of(self.layer).to_dense(weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A model on its way through the passes; no pass changes one, each returns another."""

    module: nn.Module
    """The model; from ``trace`` on it is a structural copy that shares every tensor with the user's."""
    graphs: Mapping[str, Traced] = field(default_factory=dict)
    """Path of a submodule ("" for the root) -> its graphs; a submodule has its own where no graph above shows its inside."""
    emit: Emit = "graph"
    """How a rewritten model will be given back."""
    notes: tuple[str, ...] = ()
    """What concerns the whole model, in words."""
    sites: tuple[Site, ...] = ()
    """Every convolution and linear layer, and every parameter used as one's weight, from ``find`` on."""
    plan: Plan | None = None
    """The decisions, from ``select`` on."""
    step_seconds: float | None = None
    """Measured time of the model's training step, where that was asked for."""
    shards: bool = False
    """True if each process holds a part of every parameter, and all run the passes together."""


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
