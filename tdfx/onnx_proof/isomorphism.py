"""Match what a walk leaves open: colour refinement, then a search for an isomorphism with networkx.

Argument order must count, and networkx compares labels of vertices only, so each argument is a vertex of its own:
value -> argument 1 -> node -> value. A search on bare labels does not end on real models; refined colours (Weisfeiler
and Leman, 1968) leave little to search.
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
    mapping = nx.vf2pp_isomorphism(one, other, node_label="colour")
    return mapping is not None and all(other.has_edge(mapping[tail], mapping[head]) for tail, head in one.edges)


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
    """Give both graphs an attribute ``colour`` that no longer splits; return False if colours prove them different."""
    palette: dict[Hashable, int] = {}
    colours, other_colours = (
        {vertex: palette.setdefault(label, len(palette)) for vertex, label in graph.nodes(data="label")}
        for graph in (one, other)
    )
    classes = 0
    while Counter(colours.values()) == Counter(other_colours.values()):
        if len(set(colours.values())) == classes:
            nx.set_node_attributes(one, colours, "colour")
            nx.set_node_attributes(other, other_colours, "colour")
            return True
        classes = len(set(colours.values()))
        palette = {}
        colours, other_colours = _next(one, colours, palette), _next(other, other_colours, palette)
    return False


def _next(graph: nx.DiGraph, colours: Colours, palette: dict[Hashable, int]) -> Colours:
    """Return one round of refinement: a vertex's new colour says its old one and those around it."""
    result: Colours = {}
    for vertex, colour in colours.items():
        before = tuple(sorted(colours[near] for near in graph.predecessors(vertex)))
        after = tuple(sorted(colours[near] for near in graph.successors(vertex)))
        result[vertex] = palette.setdefault((colour, before, after), len(palette))
    return result
