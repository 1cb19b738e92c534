"""The graph of a model for a drawing: its sites, the operations between them, and few enough boxes to read."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import networkx as nx
from torch import fx, nn

from tdfx.passes.program import Program, Site

MOST_BOXES = 120
"""Most boxes that are drawn; of larger graphs, modules are drawn as one box each, as deep in the model as possible."""

_MOST_EDGES = 3
"""Most edges for each box; of denser graphs, such as a DenseNet's, edges that bypass others are left out."""

_SHAPE_METHODS = {"size", "dim", "numel", "stride", "ndimension", "is_floating_point", "type"}
"""Methods of a tensor whose results are not tensors."""
_SHAPE_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "training"}
"""Attributes of a tensor or module that are not tensors."""


@dataclass(frozen=True, slots=True)
class Box:
    """One box of the drawing."""

    path: tuple[str, ...]
    """Its place in the model: the names of modules from the root down."""
    steps: tuple[str, ...]
    """The operations in it, in their order."""
    sites: tuple[str, ...] = ()
    """The sites in it."""
    collapsed: bool = False
    """True if it is drawn for a whole module."""


@dataclass(frozen=True, slots=True)
class Network:
    """Boxes, and the edges between them."""

    boxes: Mapping[int, Box] = field(default_factory=dict)
    edges: tuple[tuple[int, int], ...] = ()
    ordered: bool = True
    """False if torch.fx could not trace the model: then there are only its sites, without edges."""
    thinned: bool = False
    """True if edges that bypass others are left out."""


def network_of(program: Program) -> Network:
    """Return the network of a program whose sites were found."""
    traced = program.graphs.get("")
    if traced is None:
        return _network_of_sites(program.sites)
    graph = _operations(traced.graphs[0], program)
    _join_chains(graph)
    graph = _collapse_until_few(graph)
    thinned = graph.number_of_edges() > _MOST_EDGES * len(graph)
    edges = (nx.transitive_reduction(graph) if thinned else graph).edges
    order = nx.lexicographical_topological_sort(graph, key=lambda node: graph.nodes[node]["index"])
    numbers = {node: number for number, node in enumerate(order)}
    boxes = {number: graph.nodes[node]["box"] for node, number in numbers.items()}
    return Network(boxes, tuple(sorted((numbers[tail], numbers[head]) for tail, head in edges)), thinned=thinned)


def _network_of_sites(sites: tuple[Site, ...]) -> Network:
    boxes = {}
    for number, name in enumerate(site.name for site in sites if site.calls):
        path = tuple(name.split(".")) if name else ()
        boxes[number] = Box(path, path[-1:] or ("(root)",), (name,))
    return Network(boxes, ordered=False)


def _operations(traced: fx.Graph, program: Program) -> nx.DiGraph:
    """Return a graph of the nodes that compute tensors, without those that only read shapes or that no output needs."""
    site_of = {node: site.name for site in program.sites for node in site.nodes}
    graph = nx.DiGraph()
    without_data: set[fx.Node] = set()
    for index, node in enumerate(traced.nodes):
        if node.op == "get_attr" or _is_not_a_tensor(node, without_data):
            without_data.add(node)
            continue
        sites = (site_of[node],) if node in site_of else _sites_inside(node, program.sites)
        box = Box(_path(node, site_of), (_label(node, program.module),), sites, collapsed=len(sites) > 1)
        graph.add_node(node, box=box, index=index)
        graph.add_edges_from((before, node) for before in node.all_input_nodes if before not in without_data)
    (end,) = [node for node in graph if node.op == "output"]
    # What is computed from parameters alone, such as a table of positions, does not depend on the data.
    starts = [node for node in graph if node.op == "placeholder" or graph.nodes[node]["box"].sites]
    on_data = set(starts).union(*(nx.descendants(graph, node) for node in starts if not graph.in_degree(node)))
    needed = on_data & nx.ancestors(graph, end) | {end}
    graph.remove_nodes_from(set(graph) - needed)
    return graph


def _is_not_a_tensor(node: fx.Node, without_data: set[fx.Node]) -> bool:
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES or node.args[0] in without_data
    inputs = node.all_input_nodes
    arithmetic = node.target in vars(operator).values() or getattr(node.target, "__module__", "") == "math"
    # Parameters are in without_data too, but arithmetic on them gives a tensor.
    return bool(inputs) and arithmetic and all(node in without_data and node.op != "get_attr" for node in inputs)


def _sites_inside(node: fx.Node, sites: tuple[Site, ...]) -> tuple[str, ...]:
    if node.op != "call_module":
        return ()
    return tuple(site.name for site in sites if site.calls and site.name.startswith(f"{node.target}."))


def _label(node: fx.Node, module: nn.Module) -> str:
    if node.op == "call_module":
        name = str(node.target).rpartition(".")[2]
        return type(module.get_submodule(str(node.target))).__name__ if name.isdigit() else name
    if node.op in {"placeholder", "output"}:
        return f"input {node.target}" if node.op == "placeholder" else "output"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    name = str(target).strip("_")
    return {"add": "+", "iadd": "+", "mul": "×", "imul": "×"}.get(name, name)


def _path(node: fx.Node, site_of: Mapping[fx.Node, str]) -> tuple[str, ...]:
    """Return a node's place in the model: its module's path, or its name under the module whose forward contains it."""
    if node.op == "call_module":
        return tuple(str(node.target).split("."))
    if node in site_of:
        return tuple(site_of[node].split("."))
    stack = node.meta.get("nn_module_stack") or {}
    modules = [path for path, _ in stack.values()]
    return (*(modules[-1].split(".") if modules and modules[-1] else ()), node.name)


def _join_chains(graph: nx.DiGraph) -> None:
    """Join each box that is not a site to the box before it, if only one box is before it and only it is after that."""
    for node in list(nx.topological_sort(graph)):
        if graph.in_degree(node) != 1 or graph.nodes[node]["box"].sites or node.op == "output":
            continue
        (before,) = graph.predecessors(node)
        if graph.out_degree(before) != 1 or before.op == "placeholder":
            continue
        box = graph.nodes[before]["box"]
        # Taking one of several results is not an operation to show.
        steps = () if node.target is operator.getitem else graph.nodes[node]["box"].steps
        graph.nodes[before]["box"] = replace(box, steps=box.steps + steps)
        graph.add_edges_from((before, after) for after in list(graph.successors(node)))
        graph.remove_node(node)


def _collapse_until_few(graph: nx.DiGraph) -> nx.DiGraph:
    """Collapse modules into one box each, the innermost first, until the graph has few enough boxes."""
    depth = max((len(data["box"].path) for data in graph.nodes.values()), default=0)
    while len(graph) > MOST_BOXES and depth > 1:
        depth -= 1
        graph = _collapse(graph, depth)
    return graph


def _collapse(graph: nx.DiGraph, depth: int) -> nx.DiGraph:
    """Return the graph with one box for each module at a depth; modules that feed each other become one box."""
    keys = {
        node: data["box"].path[:depth] if len(data["box"].path) > depth else node for node, data in graph.nodes.items()
    }
    modules = nx.DiGraph()
    modules.add_nodes_from(keys.values())
    modules.add_edges_from((keys[tail], keys[head]) for tail, head in graph.edges if keys[tail] != keys[head])
    condensed = nx.condensation(modules)
    members: dict[int, list[fx.Node]] = {}
    for node, key in keys.items():
        members.setdefault(condensed.graph["mapping"][key], []).append(node)
    collapsed = nx.DiGraph()
    for nodes in members.values():
        collapsed.add_node(nodes[0], box=_joined_box(graph, nodes, depth), index=graph.nodes[nodes[0]]["index"])
    collapsed.add_edges_from((members[tail][0], members[head][0]) for tail, head in condensed.edges)
    return collapsed


def _joined_box(graph: nx.DiGraph, nodes: list[fx.Node], depth: int) -> Box:
    boxes: list[Box] = [graph.nodes[node]["box"] for node in nodes]
    if len(boxes) == 1:
        return boxes[0]
    sites = tuple(dict.fromkeys(name for box in boxes for name in box.sites))
    path = boxes[0].path[:depth]
    return Box(path, (".".join(path),), sites, collapsed=True)
