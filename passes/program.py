"""What the passes hand on: a model with its graphs, its sites and its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn

from tdfx.cost.count import Flow
from tdfx.distributed.processes import Processes, Solo
from tdfx.factors.metric import Metric
from tdfx.factors.operation import Operation
from tdfx.kinds.layouts import Layout
from tdfx.kinds.registry import find_kind, kind_of
from tdfx.layers.factorized import Factorized
from tdfx.layers.holders import Surroundings
from tdfx.layers.parameter import FactorizedParameter
from tdfx.plans.plan import Emit, Plan, Reason

PLAN_ATTRIBUTE = "_tdfx_plan"
"""The attribute in which a rewritten model keeps its plan; it also marks a rewrite that kept every site."""


@dataclass(frozen=True, slots=True)
class Reads:
    """What the code that a trace has run reads, and a graph has for good."""

    names: frozenset[str] = frozenset()
    """The names of attributes."""
    entered: frozenset[str] = frozenset({""})
    """Path of each module whose forward has run, and which the graph therefore does not call."""
    files: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Name of a file's module -> the names in it."""


@dataclass(frozen=True, slots=True)
class Traced:
    """The graphs that torch.fx recorded of one module."""

    graphs: tuple[fx.Graph, ...]
    """One graph, or one in train and one in eval mode where they differ in more than constants."""
    mismatch: str = ""
    """Why the graphs cannot stand for the module; "" if they can."""
    opaque: Mapping[str, str] = field(default_factory=dict)
    """Path, inside the module, of each submodule that the graphs call as it is, without showing its inside -> why."""
    reads: Reads = field(default_factory=Reads)
    """What the graphs rely on."""


@dataclass(frozen=True, slots=True)
class ParameterSlot:
    """The place of a parameter that functional calls use as a weight."""

    owner: str
    """Path of the module that holds the parameter."""
    name: str

    @classmethod
    def of(cls, path: str) -> ParameterSlot:
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
    """Path of the layer in the program's module; path of the parameter where no layer kind holds it."""
    layer: nn.Module
    """The layer, in the program's module; or the module that holds the parameter."""
    kind: str
    """The layer kind, or the function that takes the parameter as its weight."""
    operation: Operation | None
    """What the site computes; None for a kind that no scheme supports."""
    calls: int
    """Calls in one forward pass, as far as the graphs or a run with example inputs show."""
    nodes: tuple[fx.Node, ...] = ()
    """The calls in the graphs."""
    reason: Reason | None = None
    """Why the site cannot be rewritten, whatever the policy says; FACTORIZED if it is, so that its ranks can be lowered."""
    note: str = ""
    aliases: tuple[str, ...] = ()
    """Other paths at which the model holds the same layer."""
    slot: ParameterSlot | None = None
    """The parameter that a rewrite replaces, where functions take it as their weight and the layer stays."""
    layout: Layout | None = None
    """How the parameter of ``slot`` holds the weight; None where it is in the layout of ``F.linear`` or ``F.conv*``."""
    flows: tuple[Flow, ...] | None = None
    """What flows into each call; None without example inputs, empty where they do not reach the site in either mode."""

    metric: Metric | None = None
    """What errors of the weight are measured in; None for the weight itself."""

    @property
    def is_open(self) -> bool:
        """True for a site that a policy may decide on: one that may be rewritten, or whose ranks can be lowered."""
        return self.reason in {None, Reason.FACTORIZED}

    @property
    def is_missed(self) -> bool:
        """True for a site that the example inputs do not reach, so that its time is unknown."""
        return self.flows == ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which a policy may refer to the site."""
        return (self.name, *self.aliases)

    @property
    def known_operation(self) -> Operation:
        """The operation of a site for which some scheme may stand."""
        assert self.operation is not None
        return self.operation

    @property
    def weight(self) -> nn.Parameter | None:
        """The parameter that holds the weight; None where the weight is computed, or factorized."""
        if isinstance(self.layer, Factorized):
            return None
        if self.slot is not None:
            return self.layer._parameters[self.slot.name]
        kind = find_kind(self.layer)
        return self.layer._parameters.get(kind.weight) if kind is not None else None

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """The parameters that make the weight: the weight itself, or its factors; none where the weight is computed."""
        if isinstance(self.layer, Factorized):
            return self.layer.weights if self.is_open else ()  # altered factors may have none
        return () if self.weight is None else (self.weight,)

    def as_dense(self, weight: Tensor) -> Tensor:
        """Return the values of the weight in the layout of its operation."""
        if self.slot is None or self.layout is not None:
            return (self.layout or kind_of(self.layer)).to_dense(weight)
        return weight

    @property
    def path(self) -> str:
        """Path of the layer, or of the parameter that functions take as their weight."""
        return self.name if self.slot is None else self.slot.path

    @property
    def weight_path(self) -> str:
        """Path of the dense weight, or the path that it had before it was factorized."""
        if self.slot is not None or isinstance(self.layer, FactorizedParameter):
            return self.path
        name = (self.layer.kind if isinstance(self.layer, Factorized) else kind_of(self.layer)).weight
        return f"{self.path}.{name}" if self.path else name

    @property
    def layer_path(self) -> str:
        """Path of ``layer``."""
        return self.path if self.slot is None or isinstance(self.layer, Factorized) else self.slot.owner

    def in_copy(self, module: nn.Module) -> Site:
        """Return the same site in a structural copy of the program's module."""
        return replace(self, layer=module.get_submodule(self.layer_path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A model on its way through the passes; no pass changes a program, each returns another."""

    module: nn.Module
    """The model; from ``trace`` on it is a structural copy that shares every tensor with the user's."""
    graphs: Mapping[str, Traced] = field(default_factory=dict)
    """Path of a submodule ("" for the root) -> its graphs, for each submodule whose inside no outer graph shows."""
    emit: Emit = "graph"
    """How a rewritten model will be given back."""
    notes: tuple[str, ...] = ()
    """Remarks on the whole model, in words."""
    sites: tuple[Site, ...] = ()
    """Every convolution and linear layer, and every parameter used as the weight of one, from ``find`` on."""
    plan: Plan | None = None
    """The decisions, from ``select`` on."""
    step_seconds: float | None = None
    """Measured time of the model's training step in seconds; None where it was not measured."""
    step_doubt: float = 0.0
    """Relative error that is to be expected of that time."""
    load: float = 1.0
    """The load of the machine when it was measured, see ``Timing``."""
    surroundings: Surroundings | None = None
    """The model around the module, if that is a part of one that is rewritten by itself."""
    processes: Processes = field(default_factory=Solo)
    """The processes that train the model, all of which run the passes together."""
    shards: bool = False
    """True if each process holds a part of every parameter."""

    def in_copy(self, module: nn.Module) -> Program:
        """Return the program for a structural copy of its module, whose parameters may be others of the same shapes."""
        return replace(self, module=module, sites=tuple(site.in_copy(module) for site in self.sites))
