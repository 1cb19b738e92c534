"""The graph of a model as a report draws it: sites, what stands between them, and no more boxes than a person can read."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import networkx as nx
from torch import fx, nn

from tdfx.passes.program import Program, Site

MOST_BOXES = 120
"""Boxes above which modules are drawn as one each, outer ones where inner ones are still too many."""

_MOST_EDGES = 3
"""Edges for each box above which those are left out that jump over others, as in networks that hand on all they had."""

_ABOUT_SHAPES = {"size", "dim", "numel", "stride", "ndimension", "is_floating_point", "type"}
"""Methods of a tensor whose results are not tensors."""
_READS_OF_SHAPES = {"shape", "dtype", "device", "ndim", "training"}


@dataclass(frozen=True, slots=True)
class Box:
    """One box of the drawing."""

    path: tuple[str, ...]
    """Where in the model it stands: the names of modules from the root down."""
    steps: tuple[str, ...]
    """The operations in it, in their order."""
    sites: tuple[str, ...] = ()
    """The sites in it."""
    collapsed: bool = False
    """True where it stands for a whole module."""


@dataclass(frozen=True, slots=True)
class Network:
    """Boxes and what flows between them."""

    boxes: Mapping[int, Box] = field(default_factory=dict)
    edges: tuple[tuple[int, int], ...] = ()
    ordered: bool = True
    """False where torch.fx could not follow the model, and all that is known are its sites, without edges."""
    thinned: bool = False
    """True where edges that jump over others are left out."""


def network_of(program: Program) -> Network:
    """Return the drawing of a program after ``find``."""
    traced = program.graphs.get("")
    if traced is None:
        return _of_sites(program.sites)
    graph = _operations(traced.graphs[0], program)
    _join_chains(graph)
    graph = _few_enough(graph)
    thinned = graph.number_of_edges() > _MOST_EDGES * len(graph)
    edges = (nx.transitive_reduction(graph) if thinned else graph).edges
    first = nx.get_node_attributes(graph, "index")
    order = {node: place for place, node in enumerate(nx.lexicographical_topological_sort(graph, key=first.get))}
    boxes = {place: graph.nodes[node]["box"] for node, place in order.items()}
    return Network(boxes, tuple(sorted((order[a], order[b]) for a, b in edges)), thinned=thinned)


def _of_sites(sites: tuple[Site, ...]) -> Network:
    called = [site for site in sites if site.calls]
    boxes = {}
    for index, site in enumerate(called):
        path = tuple(site.name.split(".")) if site.name else ()
        boxes[index] = Box(path, (site.name.rpartition(".")[2] or "(root)",), (site.name,))
    return Network(boxes, ordered=False)


def _operations(traced: fx.Graph, program: Program) -> nx.DiGraph:
    """Return a graph of what computes with tensors; without what only reads shapes, or leads nowhere."""
    owner = {node: site.name for site in program.sites for node in site.nodes}
    graph = nx.DiGraph()
    plain: set[fx.Node] = set()
    for index, node in enumerate(traced.nodes):
        inputs = node.all_input_nodes
        if node.op == "get_attr" or _is_plain(node, plain):
            plain.add(node)
            continue
        inside = (owner[node],) if node in owner else _inside(node, program.sites)
        box = Box(_path(node, owner), (_label(node, program.module),), inside, collapsed=len(inside) > 1)
        graph.add_node(node, box=box, index=index)
        graph.add_edges_from((one, node) for one in inputs if one not in plain)
    (end,) = [node for node in graph if node.op == "output"]
    # What is worked out from parameters alone, such as a table of positions, is no part of what flows.
    starts = [node for node in graph if node.op == "placeholder" or graph.nodes[node]["box"].sites]
    flowing = set(starts).union(*(nx.descendants(graph, node) for node in starts if not graph.in_degree(node)))
    useful = flowing & nx.ancestors(graph, end) | {end}
    graph.remove_nodes_from([node for node in graph if node not in useful])
    return graph


def _is_plain(node: fx.Node, plain: set[fx.Node]) -> bool:
    """Return True for a node that gives a number or a shape, not a tensor."""
    if node.op == "call_method":
        return node.target in _ABOUT_SHAPES
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _READS_OF_SHAPES or node.args[0] in plain
    inputs = node.all_input_nodes
    arithmetic = node.target in vars(operator).values() or getattr(node.target, "__module__", "") == "math"
    # Parameters count as plain here, but what is computed from them by torch itself is a tensor.
    return bool(inputs) and arithmetic and all(one in plain and one.op != "get_attr" for one in inputs)


def _inside(node: fx.Node, sites: tuple[Site, ...]) -> tuple[str, ...]:
    """Return the sites in a module that the graph calls as it is."""
    if node.op != "call_module":
        return ()
    return tuple(site.name for site in sites if site.calls and site.name.startswith(f"{node.target}."))


def _label(node: fx.Node, module: nn.Module) -> str:
    if node.op == "call_module":
        name = str(node.target).rpartition(".")[2]
        return type(module.get_submodule(str(node.target))).__name__ if name.isdigit() else name
    if node.op in {"placeholder", "output"}:
        return f"input {node.target}" if node.op == "placeholder" else "output"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return {"add": "+", "iadd": "+", "mul": "×", "imul": "×"}.get(str(name).strip("_"), str(name).strip("_"))


def _path(node: fx.Node, owner: Mapping[fx.Node, str]) -> tuple[str, ...]:
    """Return where a node stands in the model: its module's path, or the path of the module whose forward has it."""
    if node.op == "call_module":
        return tuple(str(node.target).split("."))
    if node in owner:
        return tuple(owner[node].split("."))
    stack = node.meta.get("nn_module_stack") or {}
    inside = [path for path, _ in stack.values()]
    return (*(tuple(inside[-1].split(".")) if inside and inside[-1] else ()), node.name)


def _join_chains(graph: nx.DiGraph) -> None:
    """Put what follows a box alone, and is no site itself, into it."""
    for node in list(nx.topological_sort(graph)):
        before = list(graph.predecessors(node))
        if len(before) != 1 or graph.nodes[node]["box"].sites or node.op == "output":
            continue
        (one,) = before
        if graph.out_degree(one) != 1 or one.op == "placeholder":
            continue
        first, second = graph.nodes[one]["box"], graph.nodes[node]["box"]
        # Picking one of several results is no operation.
        steps = first.steps if node.target is operator.getitem else first.steps + second.steps
        graph.nodes[one]["box"] = replace(first, steps=steps)
        graph.add_edges_from((one, after) for after in list(graph.successors(node)))
        graph.remove_node(node)


def _few_enough(graph: nx.DiGraph) -> nx.DiGraph:
    """Return the graph with modules drawn as one box each, as deep in the model as leaves few enough."""
    deepest = max((len(data["box"].path) for data in graph.nodes.values()), default=0)
    for depth in range(deepest - 1, 0, -1):
        if len(graph) <= MOST_BOXES:
            break
        # Of the graph that is collapsed already, whose boxes are as deep as that, no box is split again.
        graph = _collapsed(graph, depth)
    return graph


def _collapsed(graph: nx.DiGraph, depth: int) -> nx.DiGraph:
    """Return the graph with one box for each module at a depth; those that feed one another both ways become one."""
    keys = {
        node: data["box"].path[:depth] if len(data["box"].path) > depth else node for node, data in graph.nodes.items()
    }
    outer = nx.DiGraph()
    outer.add_nodes_from(keys.values())
    outer.add_edges_from((keys[a], keys[b]) for a, b in graph.edges if keys[a] != keys[b])
    condensed = nx.condensation(outer)
    members: dict[int, list[fx.Node]] = {}
    for node, key in keys.items():
        members.setdefault(condensed.graph["mapping"][key], []).append(node)
    made = nx.DiGraph()
    names = {number: nodes[0] for number, nodes in members.items()}
    for number, nodes in members.items():
        made.add_node(names[number], box=_joined(graph, nodes, depth), index=graph.nodes[nodes[0]]["index"])
    made.add_edges_from((names[a], names[b]) for a, b in condensed.edges)
    return made


def _joined(graph: nx.DiGraph, nodes: list[fx.Node], depth: int) -> Box:
    boxes: list[Box] = [graph.nodes[node]["box"] for node in nodes]
    if len(boxes) == 1:
        return boxes[0]
    sites = tuple(dict.fromkeys(name for box in boxes for name in box.sites))
    path = boxes[0].path[:depth]
    return Box(path, (".".join(path),), sites, collapsed=True)
