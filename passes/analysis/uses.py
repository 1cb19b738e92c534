"""How the graphs of a program use its layers and parameters: who calls them, how often, and who reads them."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from tdfx.kinds.attention import is_attention, projections
from tdfx.kinds.functional import FunctionCall
from tdfx.kinds.parse_products import parse_product, parse_use
from tdfx.kinds.products import PackedCall, ProductCall
from tdfx.kinds.registry import find_kind
from tdfx.kinds.views import View, view_by
from tdfx.passes.analysis.owners import Owners, owners_of
from tdfx.passes.analysis.tracer import is_site_or_leaf
from tdfx.passes.program import Program

_SHAPE = {"dim", "ndim", "numel", "shape", "size"}
METADATA = _SHAPE | {"device", "dtype", "is_complex", "is_floating_point", "layout", "requires_grad"}
"""Attributes and methods of a tensor that do not read its values."""

METADATA_FUNCTIONS = frozenset(
    method if callable(method) else method.__get__ for method in (getattr(Tensor, name) for name in METADATA)
)
"""The same as functions, as ``__torch_function__`` gets them."""


@dataclass(frozen=True, slots=True)
class FunctionalUse:
    """One call in a graph that takes a parameter as its weight."""

    node: fx.Node | None
    """The call; None where no graph shows it, and the class of the module tells."""
    call: FunctionCall


@dataclass(frozen=True, slots=True)
class Uses:
    """How graphs use modules and parameters, which are keys by their identity."""

    calls: Mapping[int, tuple[fx.Node, ...]]
    """Module -> the calls of it."""
    functional: Mapping[int, tuple[FunctionalUse, ...]]
    """Parameter, or the module in place of a factorized one -> the calls of functions that take it as their weight."""
    reads: frozenset[int]
    """Parameters that a graph reads for anything else."""
    traced: frozenset[int]
    """Modules whose calls some graph would show, called or not."""
    owners: Owners
    """Who else holds the parameters."""
    runs: Mapping[int, tuple[str, int]]
    """Graph, by identity -> the path of its module, and how often that module runs in one forward pass."""
    shards: bool = False

    def count(self, nodes: Sequence[fx.Node]) -> int:
        """Return how often these nodes run in one forward pass, in the mode in which they run more often."""
        nodes_of_graph = Counter(id(node.graph) for node in nodes)
        counts: Counter[str] = Counter()
        for graph, count in nodes_of_graph.items():
            path, runs = self.runs[graph]
            counts[path] = max(counts[path], count * runs)
        return counts.total()


def uses_of(program: Program) -> Uses:
    """Read the graphs of a program from the outermost module inwards."""
    calls: defaultdict[int, list[fx.Node]] = defaultdict(list)
    functional: defaultdict[int, list[FunctionalUse]] = defaultdict(list)
    reads: set[int] = set()
    traced: set[int] = set()
    runs: dict[int, tuple[str, int]] = {}
    uses = Uses(calls, functional, frozenset(), frozenset(), Owners({}, {}, {}), runs)  # type: ignore[arg-type]
    for path in sorted(program.graphs, key=lambda path: path.count(".") + bool(path)):
        root = program.module.get_submodule(path)
        # A module that an outer graph calls runs as often as it is called; for any other the count is not known.
        runs_of_root = uses.count(calls[id(root)]) if id(root) in traced else 1
        traced.update(id(module) for module in _shown(root, program.graphs[path].opaque))
        for graph in program.graphs[path].graphs:
            runs[id(graph)] = (path, runs_of_root)
            for node in graph.nodes:
                if node.op == "call_module":
                    called = root.get_submodule(str(node.target))
                    calls[id(called)].append(node)
                    if is_attention(called):
                        _add_projections(functional, called, node, _is_self_attention(node))
                    elif is_site_or_leaf(called) and find_kind(called) is None:
                        reads.update(id(parameter) for parameter in called.parameters())
                elif node.op == "get_attr":
                    value = _attribute(root, str(node.target))
                    found = list(_uses_through(node, View.of(value)))
                    functional[id(value)].extend(use for use in found if use is not None)
                    if None in found:
                        reads.add(id(value))
    crossing = {
        id(layer.multihead_attn) for layer in program.module.modules() if isinstance(layer, nn.TransformerDecoderLayer)
    }
    for module in program.module.modules():
        if is_attention(module) and id(module) not in traced:
            _add_projections(functional, module, None, id(module) not in crossing)
    return Uses(
        calls={key: tuple(nodes) for key, nodes in calls.items()},
        functional={key: tuple(listed) for key, listed in functional.items() if listed},
        reads=frozenset(reads),
        traced=frozenset(traced),
        owners=owners_of(program.module, program.surroundings),
        runs=runs,
        shards=program.shards,
    )


def _add_projections(
    functional: Mapping[int, list[FunctionalUse]],
    attention: nn.MultiheadAttention,
    node: fx.Node | None,
    is_self: bool,
) -> None:
    """Add the calls that an attention of torch.nn makes with the weights of its projections.

    ``is_self`` says whether query, key and value are the same.
    """
    for name, weight in projections(attention):
        call = FunctionCall("F.linear", 0, False, None)
        if name == "in_proj_weight" and not is_self:
            call = PackedCall("attention", 0, False, None, {"groups": 3})
        functional[id(weight)].append(FunctionalUse(node, call))


def _is_self_attention(node: fx.Node) -> bool:
    """Return True for a call of an attention module with the same query, key and value."""
    inputs = {**dict(zip(("query", "key", "value"), node.args, strict=False)), **node.kwargs}
    return inputs.get("query") is inputs.get("key") is inputs.get("value")


def _shown(root: nn.Module, opaque: Collection[str]) -> Iterator[nn.Module]:
    """Yield the modules whose calls a graph shows: all but those that lie inside the modules it calls as they are."""
    blocks = [root.get_submodule(path) for path in opaque]
    hidden = {id(module) for block in blocks for module in block.modules()} - set(map(id, blocks))
    return (module for module in root.modules() if id(module) not in hidden)


def _uses_through(node: fx.Node, view: View | None, is_view: bool = False) -> Iterator[FunctionalUse | None]:
    """Yield the calls that take a node, or a view of it, as their weight; None for every other use of its values."""
    for user in node.users:
        if _reads_metadata(user):
            continue
        function, args, named = _call_of(user)
        if args and args[0] is node and (inner := view_by(function, view, args[1:], named)) is not None:
            yield from _uses_through(user, inner, True)
            continue
        dims = None if view is None else len(view.axes)
        call = (parse_product if is_view else parse_use)(function, args, named, node, dims)
        if call is None or call.weight is not node or node in call.rest.values():
            yield None
        elif isinstance(call, ProductCall):
            on_parameter = call if view is None else call.on(view)
            shape = getattr(on_parameter.weight, "shape", None) if on_parameter is not None else None  # a node has none
            is_use = on_parameter is not None and shape is not None and on_parameter.layout(shape) is not None
            yield FunctionalUse(user, on_parameter) if on_parameter is not None and is_use else None
        else:
            yield FunctionalUse(user, call)


def _call_of(node: fx.Node) -> tuple[object, tuple[Any, ...], Mapping[str, Any]]:
    """Return the function that a node calls and its arguments, as ``__torch_function__`` gets them."""
    if node.op == "call_method":
        return getattr(Tensor, str(node.target), None), node.args, node.kwargs
    if node.op != "call_function":
        return None, (), {}
    if node.target is getattr and node.args[1] in ("T", "mT"):
        return getattr(Tensor, str(node.args[1])).__get__, node.args[:1], {}
    return Tensor.__getitem__ if node.target is operator.getitem else node.target, node.args, node.kwargs


def _reads_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in METADATA
    return node.op == "call_function" and node.target is getattr and node.args[1] in METADATA


def _attribute(root: nn.Module, target: str) -> object:
    value: object = root
    for name in target.split("."):
        value = getattr(value, name, None)
    return value
