"""Divide a network into pieces, and each piece into layers from top to bottom.

A piece ends where everything that follows depends on one box only, so the blocks of a network become pieces. A page shows
the pieces one after the other as the lines of a text, in columns where it is wide, and below each other on a phone.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from tdfx.report.network import Network

_SWEEPS = 6
_MAX_JOINED = 8
"""Boxes up to which successive pieces of one module are drawn as one piece."""

START = -1
"""The vertex where a piece begins: the output of the piece before it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of the drawing."""

    title: str
    """The module that contains all of the piece, "" for the root."""
    layers: tuple[tuple[int, ...], ...]
    """From top to bottom, each from left to right: the number of a box, ``START``, or below it the number of a bend in a
    long edge."""
    edges: tuple[tuple[int, ...], ...]
    """Each from a box or ``START``, over its bends, to a box."""


def pieces_of(network: Network) -> list[Piece]:
    """Return the pieces of a network, in the order of the data."""
    if not network.ordered:
        return _pieces_by_module(network)
    graph = nx.DiGraph(network.edges)
    graph.add_nodes_from(network.boxes)
    groups = _join_small(_cut(graph, _depths(graph)), network)
    return [_piece(graph, group, network) for group in groups]


def _depths(graph: nx.DiGraph) -> dict[int, int]:
    """Return the layer of each box: just below its lowest predecessor; for an input, just above its first successor."""
    depth: dict[int, int] = {}
    for node in nx.topological_sort(graph):
        depth[node] = 1 + max((depth[before] for before in graph.predecessors(node)), default=-1)
    for node in graph:
        if not graph.in_degree(node) and graph.out_degree(node):
            depth[node] = min(depth[after] for after in graph.successors(node)) - 1
    return depth


def _layers(depth: dict[int, int]) -> list[list[int]]:
    layers: list[list[int]] = [[] for _ in range(max(depth.values()) + 1)]
    for node in sorted(depth):
        layers[depth[node]].append(node)
    return layers


def _cut(graph: nx.DiGraph, depth: dict[int, int]) -> list[list[int]]:
    """Return groups of boxes, cut after every layer of a single box that no edge bypasses."""
    layers = _layers(depth)
    bypassed = {layer for tail, head in graph.edges for layer in range(depth[tail] + 1, depth[head])}
    groups: list[list[int]] = [[]]
    for number, layer in enumerate(layers):
        groups[-1] += layer
        if len(layer) == 1 and number not in bypassed and number < len(layers) - 1:
            groups.append([])
    return groups


def _join_small(groups: list[list[int]], network: Network) -> list[list[int]]:
    """Join small successive groups of one module, such as the two halves of a transformer's block."""
    joined: list[list[int]] = []
    for group in groups:
        last = joined[-1] if joined else []
        if last and len(last) + len(group) <= _MAX_JOINED and _title(last, network) == _title(group, network):
            last += group
        else:
            joined.append([*group])
    return joined


def _piece(network_graph: nx.DiGraph, group: Sequence[int], network: Network) -> Piece:
    """Lay out one group, with a start if it takes data from before, and with bends where edges pass layers."""
    graph = nx.DiGraph(network_graph.subgraph(group))
    entries = {head for tail, head in network_graph.in_edges(group) if tail not in graph}
    graph.add_edges_from((START, node) for node in entries)
    depth = _depths(graph)
    layers = _layers(depth)
    bends = itertools.count(START - 1, -1)
    edges: list[tuple[int, ...]] = []
    for tail, head in sorted(graph.edges):
        passed = layers[depth[tail] + 1 : depth[head]]
        way = (tail, *itertools.islice(bends, len(passed)), head)
        for layer, bend in zip(passed, way[1:-1], strict=True):
            layer.append(bend)
        edges.append(way)
    return Piece(_title(group, network), _without_crossings(layers, edges), tuple(edges))


def _without_crossings(layers: list[list[int]], edges: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Order each layer by the mean place of its neighbours, down and up, so that few edges cross (Sugiyama et al. 1981)."""
    above, below = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
    for upper, lower in itertools.chain.from_iterable(map(itertools.pairwise, edges)):
        above[lower].append(upper)
        below[upper].append(lower)
    place: dict[int, float] = {}

    def set_places(layer: list[int]) -> None:
        place.update({node: (index + 0.5) / len(layer) for index, node in enumerate(layer)})

    def mean_place(node: int, neighbours: Mapping[int, list[int]]) -> float:
        places = [place[neighbour] for neighbour in neighbours.get(node, (node,))]
        return sum(places) / len(places)

    for layer in layers:
        set_places(layer)
    for sweep in range(_SWEEPS):
        neighbours, order = (above, layers) if sweep % 2 == 0 else (below, layers[::-1])
        for layer in order:
            layer.sort(key=lambda node: (mean_place(node, neighbours), place[node]))
            set_places(layer)
    return tuple(map(tuple, layers))


def _title(group: Sequence[int], network: Network) -> str:
    """Return the innermost module that contains all boxes, apart from boxes of the root."""
    paths = [network.boxes[node].path[:-1] for node in group if len(network.boxes[node].path) > 1]
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in shared)


def _pieces_by_module(network: Network) -> list[Piece]:
    """Return a piece without edges for each module that holds sites."""
    groups = defaultdict[tuple[str, ...], list[int]](list)
    for number, box in network.boxes.items():
        groups[box.path[:-1]].append(number)
    return [Piece(".".join(path), tuple((number,) for number in group), ()) for path, group in groups.items()]
