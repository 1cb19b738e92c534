"""Match the nodes that a walk leaves open: refine colours, then search for an isomorphism with networkx.

Argument order must count, and networkx compares only labels of vertices, so each argument is a vertex of its own:
value -> argument 1 -> node -> value. A search by labels alone would take too long on real models. Refined colours
(Weisfeiler and Leman, 1968) leave little to search, and a vertex whose colour is unique needs no search.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import networkx as nx

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from tdfx.onnx_proof.graph import Graph

Vertex = tuple[str, str | int, int]
"""("value", name, 0), ("node", index, 0), ("argument", node index, position) or ("result", position, 0)."""


def isomorphic(model: Graph, reference: Graph, pins: Mapping[str, str] | None = None) -> bool:
    """Return True if the two graphs match.

    ``pins`` has values of the model that must be matched with values of the reference. Nodes whose outputs are all pinned
    are settled, and only the rest is searched.
    """
    pins = pins or {}
    graph = to_digraph(model, {name: number for number, name in enumerate(pins)})
    other = to_digraph(reference, {name: number for number, name in enumerate(pins.values())})
    if not refine(graph, other):
        return False
    # A vertex whose colour is unique has one possible partner. Vertices of one colour all have the same edges to it, or
    # the colour would have split, so the search among them can ignore it.
    counts = Counter(colour for _, colour in graph.nodes(data="colour"))
    by_colour = {colour: vertex for vertex, colour in other.nodes(data="colour")}
    mapping = {vertex: by_colour[colour] for vertex, colour in graph.nodes(data="colour") if counts[colour] == 1}
    if len(mapping) < len(graph):
        rest = graph.subgraph(set(graph).difference(mapping))
        other_rest = other.subgraph(set(other).difference(mapping.values()))
        partners = nx.vf2pp_isomorphism(rest, other_rest, node_label="colour")
        if partners is None:
            return False
        mapping |= partners
    return all(other.has_edge(mapping[tail], mapping[head]) for tail, head in graph.edges)


def to_digraph(graph: Graph, pinned: Mapping[str, int]) -> nx.DiGraph:
    """Return ``graph`` as a networkx graph whose vertices have a ``label``, without the nodes that are settled."""
    result = nx.DiGraph()
    for name in graph.sources:
        if name not in pinned:
            result.add_node(("value", name, 0), label=_value_label(graph, name, pinned))
    for index, node in enumerate(graph.nodes):
        outputs = [name for name in node.outputs if name]
        if not outputs or not all(name in pinned for name in outputs):
            _add_node(result, graph, index, pinned)
    for position, port in enumerate(graph.outputs):
        if port.name not in pinned:
            result.add_node(("result", position, 0), label=("result", position))
            result.add_edge(("value", port.name, 0), ("result", position, 0))
    return result


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
            value, argument = ("value", name, 0), ("argument", index, position)
            result.add_node(value, label=_value_label(graph, name, pinned))
            result.add_node(argument, label=("argument", position))
            nx.add_path(result, [value, argument, vertex])
    for name in filter(None, node.outputs):
        result.add_edge(vertex, ("value", name, 0))


def refine(graph: nx.DiGraph, other: nx.DiGraph) -> bool:
    """Give the vertices of both graphs a stable ``colour``; return False if the colours prove that they differ.

    One sweep along the edges and one against them carry most information from end to end. Rounds over all vertices, of
    which a deep model would need as many as it has layers, then refine what is left.
    """
    graphs = (graph, other)
    colours = [dict(side.nodes(data="label")) for side in graphs]
    for forward in (True, False):
        palette: dict[Hashable, int] = {}
        colours = [_sweep(*pair, palette, forward) for pair in zip(graphs, colours, strict=True)]
    classes = 0
    while Counter(colours[0].values()) == Counter(colours[1].values()):
        if len(set(colours[0].values())) == classes:
            for side, final in zip(graphs, colours, strict=True):
                nx.set_node_attributes(side, final, "colour")
            return True
        classes = len(set(colours[0].values()))
        palette = {}
        colours = [_refine_once(*pair, palette) for pair in zip(graphs, colours, strict=True)]
    return False


def _sweep(
    graph: nx.DiGraph, colours: Mapping[Vertex, Hashable], palette: dict[Hashable, int], forward: bool
) -> dict[Vertex, int]:
    """Return new colours: a vertex's old colour, with the new ones of its predecessors, or successors."""
    order = list(nx.topological_sort(graph))
    neighbours = graph.predecessors if forward else graph.successors
    result: dict[Vertex, int] = {}
    for vertex in order if forward else reversed(order):
        near = tuple(sorted(result[neighbour] for neighbour in neighbours(vertex)))
        result[vertex] = palette.setdefault((colours[vertex], near), len(palette))
    return result


def _refine_once(graph: nx.DiGraph, colours: Mapping[Vertex, int], palette: dict[Hashable, int]) -> dict[Vertex, int]:
    """Return new colours: a vertex's old colour, with the old ones of all its neighbours."""
    result: dict[Vertex, int] = {}
    for vertex, colour in colours.items():
        before = tuple(sorted(colours[neighbour] for neighbour in graph.predecessors(vertex)))
        after = tuple(sorted(colours[neighbour] for neighbour in graph.successors(vertex)))
        result[vertex] = palette.setdefault((colour, before, after), len(palette))
    return result
