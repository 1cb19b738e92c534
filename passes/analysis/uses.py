"""What the graphs of a program say of its layers and parameters: who calls them, how often, and who reads them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from tdfx.kinds.functional import FunctionCall, parse_call
from tdfx.kinds.registry import find_kind
from tdfx.passes.analysis.tracer import is_site_or_leaf
from tdfx.passes.program import Program

METADATA = frozenset(
    {
        "device",
        "dim",
        "dtype",
        "is_complex",
        "is_floating_point",
        "layout",
        "ndim",
        "numel",
        "requires_grad",
        "shape",
        "size",
    }
)
"""What a tensor can be asked for without its values."""

METADATA_FUNCTIONS = frozenset(
    method if callable(method) else method.__get__ for method in (getattr(Tensor, name) for name in METADATA)
)
"""The functions that ask for it."""


@dataclass(frozen=True, slots=True)
class FunctionalUse:
    """One call in a graph that takes a parameter as its weight."""

    node: fx.Node
    call: FunctionCall


@dataclass(frozen=True, slots=True)
class Uses:
    """Everything by the identity of the module or parameter concerned."""

    calls: Mapping[int, tuple[fx.Node, ...]]
    """Module -> the calls of it."""
    functional: Mapping[int, tuple[FunctionalUse, ...]]
    """Parameter (or what stands for a factorized one) -> the calls of functions that take it as their weight."""
    reads: frozenset[int]
    """Parameters that a graph reads for anything else."""
    traced: frozenset[int]
    """Modules that lie within some graph, called or not."""
    owners: Mapping[int, int]
    """Parameter -> how many modules hold it."""
    runs: Mapping[int, tuple[str, int]]
    """Graph -> the path of its module, and how often that module runs in one forward pass."""
    shards: bool = False
    """Whether the parameters are in shards."""

    def count(self, nodes: Sequence[fx.Node]) -> int:
        """Return how often these nodes run in one forward pass, in the mode in which they run more often."""
        each = Counter(id(node.graph) for node in nodes)
        most: dict[str, int] = {}
        for graph, count in each.items():
            path, runs = self.runs[graph]
            most[path] = max(most.get(path, 0), count * runs)
        return sum(most.values())


def uses_of(program: Program) -> Uses:
    """Read the graphs of a program from the outermost module inwards."""
    calls: defaultdict[int, list[fx.Node]] = defaultdict(list)
    functional: defaultdict[int, list[FunctionalUse]] = defaultdict(list)
    reads: set[int] = set()
    traced: set[int] = set()
    runs: dict[int, tuple[str, int]] = {}
    uses = Uses(calls, functional, frozenset(), frozenset(), {}, runs)  # type: ignore[arg-type]
    for path in sorted(program.graphs, key=lambda one: one.count(".") + bool(one)):
        root = program.module.get_submodule(path)
        # A module that some graph calls runs as often as it is called; of the others nobody can say.
        often = uses.count(calls[id(root)]) if id(root) in traced else 1
        traced.update(id(one) for one in _shown(root, program.graphs[path].blocks))
        for graph in program.graphs[path].graphs:
            runs[id(graph)] = (path, often)
            for node in graph.nodes:
                if node.op == "call_module":
                    called = root.get_submodule(str(node.target))
                    calls[id(called)].append(node)
                    if is_site_or_leaf(called) and find_kind(called) is None:
                        reads.update(id(one) for one in called.parameters())
                elif node.op == "get_attr":
                    value = _attribute(root, str(node.target))
                    found = list(_functional_uses(node))
                    functional[id(value)].extend(found)
                    if len(found) < sum(not _reads_metadata(user) for user in node.users):
                        reads.add(id(value))
    return Uses(
        calls={key: tuple(nodes) for key, nodes in calls.items()},
        functional={key: tuple(found) for key, found in functional.items() if found},
        reads=frozenset(reads),
        traced=frozenset(traced),
        owners=owners_of(program.module),
        runs=runs,
        shards=program.shards,
    )


def _shown(root: nn.Module, blocks: Collection[str]) -> Iterator[nn.Module]:
    """Yield the modules whose calls a graph shows: all of them but for what lies inside the blocks it calls as they are."""
    inside = {id(one) for path in blocks for one in root.get_submodule(path).modules()}
    inside -= {id(root.get_submodule(path)) for path in blocks}
    return (one for one in root.modules() if id(one) not in inside)


def _functional_uses(node: fx.Node) -> Iterator[FunctionalUse]:
    """Yield the calls that take a node as their weight and as nothing else."""
    for user in node.users:
        call = parse_call(user.target, user.args, user.kwargs) if user.op == "call_function" else None
        if call is not None and call.weight is node and node not in call.rest.values():
            yield FunctionalUse(user, call)


def _reads_metadata(node: fx.Node) -> bool:
    """Return True for a node that asks a tensor for its shape, dtype or device, and not for its values."""
    if node.op == "call_method":
        return node.target in METADATA
    return node.op == "call_function" and node.target is getattr and node.args[1] in METADATA


def owners_of(module: nn.Module) -> Mapping[int, int]:
    """Return for each parameter, by its identity, how many modules hold it."""
    return Counter(
        id(parameter) for one in module.modules() for parameter in one._parameters.values() if parameter is not None
    )


def _attribute(root: nn.Module, target: str) -> object:
    value: object = root
    for name in target.split("."):
        value = getattr(value, name, None)
    return value
