"""Graph -> sites: every convolution and linear layer, with its calls or the reason why it must be left alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from tdfx.kinds import has_stock_forward, is_candidate, kind_of, operation_of
from tdfx.layers import Factorized
from tdfx.passes.base import Change, Pass, PassResult, Program, Site
from tdfx.passes.tracer import is_site_or_leaf
from tdfx.plan import Reason


class Find(Pass):
    """List the sites of a traced program in the order of its state_dict."""

    name = "find"

    def run(self, program: Program) -> PassResult:
        """Look at every layer once; a layer called twice is one site with two calls."""
        uses = _uses(program)
        inside = _inside(program.module)
        sites = tuple(
            _site(name, layer, uses, inside)
            for name, layer in program.module.named_modules()
            if _is_listed(layer, inside)
        )
        changes = tuple(Change(site.name, "found") for site in sites)
        return PassResult(replace(program, sites=sites), changes)

    def ensures(self, before: Program, result: PassResult) -> None:
        """Every convolution and linear layer is a site, once."""
        layers = {id(layer) for layer in before.module.modules() if is_candidate(layer)}
        factors = {
            id(factor) for layer in before.module.modules() if isinstance(layer, Factorized) for factor in layer.factors
        }
        listed = Counter(id(site.layer) for site in result.program.sites)
        self.check(layers - factors <= set(listed), "every convolution and linear layer is a site")
        self.check(all(count == 1 for count in listed.values()), "every site is listed once")


@dataclass(frozen=True, slots=True)
class _Uses:
    """What the graphs say of the layers, by the layer's identity."""

    calls: Mapping[int, tuple[fx.Node, ...]]
    """Calls of a layer."""
    reads: frozenset[int]
    """Parameters that a graph reads by themselves."""
    traced: frozenset[int]
    """Modules that lie within some graph, called or not."""
    owners: Mapping[int, int]
    """Parameter -> how many layers hold it."""


def _uses(program: Program) -> _Uses:
    calls: defaultdict[int, list[fx.Node]] = defaultdict(list)
    reads: set[int] = set()
    traced: set[int] = set()
    for path, graphs in program.graphs.items():
        root = program.module.get_submodule(path)
        traced.update(id(one) for one in root.modules())
        for graph in graphs:
            for node in graph.nodes:
                if node.op == "call_module":
                    calls[id(root.get_submodule(str(node.target)))].append(node)
                elif node.op == "get_attr":
                    reads.add(id(_attribute(root, str(node.target))))
    owners = Counter(
        id(parameter)
        for module in program.module.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return _Uses({key: tuple(nodes) for key, nodes in calls.items()}, frozenset(reads), frozenset(traced), owners)


def _attribute(root: nn.Module, target: str) -> object:
    value: object = root
    for name in target.split("."):
        value = getattr(value, name, None)
    return value


def _inside(module: nn.Module) -> dict[int, type[nn.Module]]:
    """Return the layers that lie inside a module which no graph looks into, with that module's class."""
    found: dict[int, type[nn.Module]] = {}
    for outer in module.modules():
        if is_site_or_leaf(outer):
            for inner in outer.modules():
                if inner is not outer:
                    found[id(inner)] = type(outer)
    return found


def _is_listed(layer: nn.Module, inside: Mapping[int, type[nn.Module]]) -> bool:
    if isinstance(layer, Factorized):
        return True
    return is_candidate(layer) and inside.get(id(layer)) is not Factorized


def _site(name: str, layer: nn.Module, uses: _Uses, inside: Mapping[int, type[nn.Module]]) -> Site:
    nodes = uses.calls.get(id(layer), ())
    # Outside every graph nobody can say how often a layer is called; a run with example inputs will.
    calls = _calls_per_pass(nodes) if id(layer) in uses.traced else 1
    if isinstance(layer, Factorized):
        original = layer.origin.layer
        return Site(
            name=name,
            layer=layer,
            kind=kind_of(original),
            operation=operation_of(original),
            calls=calls,
            nodes=nodes,
            reason=Reason.FACTORIZED,
            note=f"{layer.origin.scheme} at {'/'.join(map(str, layer.origin.ranks))}",
        )
    reason, note = _obstacle(layer, calls, uses, inside)
    operation = None if reason is Reason.UNINITIALIZED else operation_of(layer)
    return Site(
        name=name,
        layer=layer,
        kind=kind_of(layer),
        operation=operation,
        calls=calls,
        nodes=nodes,
        reason=reason,
        note=note,
    )


def _calls_per_pass(nodes: tuple[fx.Node, ...]) -> int:
    """Count calls in one mode: where train and eval have graphs of their own, the larger of the two."""
    each = Counter(id(node.graph) for node in nodes)
    return max(each.values(), default=0)


def _obstacle(
    layer: nn.Module, calls: int, uses: _Uses, inside: Mapping[int, type[nn.Module]]
) -> tuple[Reason | None, str]:
    """Return the first reason why no policy may rewrite a layer, and the reason in words."""
    weight = layer._parameters.get("weight")
    if isinstance(weight, UninitializedParameter):
        return Reason.UNINITIALIZED, "run one batch through the model first"
    if weight is None or parametrize.is_parametrized(layer):
        return Reason.PARAMETRIZED, "its weight is computed from other tensors"
    if layer._buffers or layer._modules or not set(layer._parameters) <= {"weight", "bias"}:
        return Reason.CUSTOM_FORWARD, f"{type(layer).__name__} holds more than a weight and a bias"
    if not has_stock_forward(layer):
        return Reason.CUSTOM_FORWARD, f"{type(layer).__name__} does not compute what {kind_of(layer)} does"
    if id(layer) in inside:
        return Reason.READ_ELSEWHERE, f"{inside[id(layer)].__name__} may read its weight without calling it"
    if uses.owners[id(weight)] > 1:
        return Reason.TIED, f"{uses.owners[id(weight)]} layers hold its weight"
    if id(weight) in uses.reads:
        return Reason.READ_ELSEWHERE, "forward reads its weight without calling it"
    if calls == 0:
        return Reason.NOT_CALLED, "forward does not call it"
    if not weight.requires_grad:
        return Reason.FROZEN, "its weight has requires_grad=False"
    if operation_of(layer) is None or weight.numel() == 0 or not weight.is_floating_point():
        return (
            Reason.NO_SCHEME,
            f"no scheme for {kind_of(layer)} with a {weight.dtype} weight of {weight.numel()} values",
        )
    return None, ""
