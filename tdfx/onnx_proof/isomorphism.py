"""Match what a walk leaves open: colour refinement, then a search for an isomorphism with networkx.

Argument order must count, and networkx compares labels of vertices only, so each argument is a vertex of its own:
value -> argument 1 -> node -> value. A search on bare labels does not end on real models; refined colours (Weisfeiler
and Leman, 1968) leave little to search, and what has a colour of its own needs none.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import networkx as nx

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from tdfx.onnx_proof.graph import Graph, Node

Vertex = tuple[str, str | int, int]
"""("value", name, 0), ("node", index, 0), ("argument", node index, position) or ("result", position, 0)."""

Colours = dict[Vertex, int]


def isomorphic(model: Graph, reference: Graph, pins: Mapping[str, str] | None = None) -> bool:
    """Return True if the two graphs match, with the values in ``pins`` (model -> reference) matched as given.

    Nodes whose outputs are all pinned are taken as settled: only the rest is searched.
    """
    pins = pins or {}
    numbers = {name: number for number, name in enumerate(pins)}
    other_numbers = {pins[name]: number for name, number in numbers.items()}
    one, other = to_digraph(model, numbers), to_digraph(reference, other_numbers)
    if not refine(one, other):
        return False
    mapping = _mapping(one, other)
    return mapping is not None and all(other.has_edge(mapping[tail], mapping[head]) for tail, head in one.edges)


def _mapping(one: nx.DiGraph, other: nx.DiGraph) -> dict[Vertex, Vertex] | None:
    """Return partners for all vertices of two refined graphs, or None if there are none.

    A vertex whose colour is unique has one possible partner. Those of a shared colour all have the same edges to it, or the
    colour would have split, so the search among them need not look at it.
    """
    counts = Counter(colour for _, colour in one.nodes(data="colour"))
    theirs = {colour: vertex for vertex, colour in other.nodes(data="colour")}
    mapping = {vertex: theirs[colour] for vertex, colour in one.nodes(data="colour") if counts[colour] == 1}
    if len(mapping) == len(one):
        return mapping
    matched = set(mapping.values())
    rest = one.subgraph(vertex for vertex in one if vertex not in mapping)
    others = other.subgraph(vertex for vertex in other if vertex not in matched)
    found = nx.vf2pp_isomorphism(rest, others, node_label="colour")
    return None if found is None else {**mapping, **found}


def to_digraph(graph: Graph, pinned: Mapping[str, int]) -> nx.DiGraph:
    """Return ``graph`` as a networkx graph whose vertices carry a ``label``, without the nodes that are settled."""
    result = nx.DiGraph()
    for name in graph.sources:
        if name not in pinned:
            result.add_node(("value", name, 0), label=_value_label(graph, name, pinned))
    for index, node in enumerate(graph.nodes):
        if not _settled(node, pinned):
            _add_node(result, graph, index, pinned)
    for position, port in enumerate(graph.outputs):
        if port.name not in pinned:
            result.add_node(("result", position, 0), label=("result", position))
            result.add_edge(("value", port.name, 0), ("result", position, 0))
    return result


def _settled(node: Node, pinned: Mapping[str, int]) -> bool:
    made = [name for name in node.outputs if name]
    return bool(made) and all(name in pinned for name in made)


def _value_label(graph: Graph, name: str, pinned: Mapping[str, int]) -> Hashable:
    if name in pinned:
        return ("pinned", pinned[name])
    kind, key, slot = graph.sources[name]
    return ("made", slot) if kind == "node" else (kind, key)


def _add_node(result: nx.DiGraph, graph: Graph, index: int, pinned: Mapping[str, int]) -> None:
    node = graph.nodes[index]
    vertex = ("node", index, 0)
    result.add_node(vertex, label=node.label)
    for position, name in enumerate(node.inputs):
        if name:
            result.add_node(("value", name, 0), label=_value_label(graph, name, pinned))
            result.add_node(("argument", index, position), label=("argument", position))
            result.add_edge(("value", name, 0), ("argument", index, position))
            result.add_edge(("argument", index, position), vertex)
    for name in filter(None, node.outputs):
        result.add_edge(vertex, ("value", name, 0))


def refine(one: nx.DiGraph, other: nx.DiGraph) -> bool:
    """Give both graphs an attribute ``colour`` that no longer splits; return False if colours prove them different.

    One sweep along the edges and one against them carry most of what there is to know from end to end. Rounds over all
    vertices, of which a deep model would take as many as it has layers, then find the little that is left.
    """
    graphs = (one, other)
    colours = [dict(graph.nodes(data="label")) for graph in graphs]
    for forward in (True, False):
        palette: dict[Hashable, int] = {}
        colours = [_sweep(graph, some, palette, forward) for graph, some in zip(graphs, colours, strict=True)]
    classes = 0
    while Counter(colours[0].values()) == Counter(colours[1].values()):
        if len(set(colours[0].values())) == classes:
            for graph, some in zip(graphs, colours, strict=True):
                nx.set_node_attributes(graph, some, "colour")
            return True
        classes = len(set(colours[0].values()))
        palette = {}
        colours = [_next(graph, some, palette) for graph, some in zip(graphs, colours, strict=True)]
    return False


def _sweep(
    graph: nx.DiGraph, colours: Mapping[Vertex, Hashable], palette: dict[Hashable, int], forward: bool
) -> Colours:
    """Return colours that say a vertex's old one and the new ones of all that leads to it, or that it leads to."""
    order = list(nx.topological_sort(graph))
    around = graph.predecessors if forward else graph.successors
    result: Colours = {}
    for vertex in order if forward else reversed(order):
        near = tuple(sorted(result[one] for one in around(vertex)))
        result[vertex] = palette.setdefault((colours[vertex], near), len(palette))
    return result


def _next(graph: nx.DiGraph, colours: Colours, palette: dict[Hashable, int]) -> Colours:
    """Return one round of refinement: a vertex's new colour says its old one and those around it."""
    result: Colours = {}
    for vertex, colour in colours.items():
        before = tuple(sorted(colours[near] for near in graph.predecessors(vertex)))
        after = tuple(sorted(colours[near] for near in graph.successors(vertex)))
        result[vertex] = palette.setdefault((colour, before, after), len(palette))
    return result
