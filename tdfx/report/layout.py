"""A network in pieces that are drawn one after the other, as the lines of a text are, each in layers from top to bottom.

A piece ends where everything that follows comes from one box alone. So blocks of a network become pieces, which a page
can put side by side where it is wide, and under one another on a phone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from tdfx.report.network import Network

_SWEEPS = 6
_SMALL = 8
"""Boxes up to which pieces of the same module are drawn as one."""

START = -1
"""The point at which a piece begins: what the piece before it gives."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of the drawing."""

    title: str
    """The module that all of it is in, "" for the root."""
    layers: tuple[tuple[int, ...], ...]
    """From top to bottom, each from left to right: numbers of boxes, ``START``, or, below it, of bends of long edges."""
    edges: tuple[tuple[int, ...], ...]
    """Each from a box or ``START`` over its bends to a box."""


def pieces_of(network: Network) -> list[Piece]:
    """Return the pieces of a network, in the order of the data."""
    if not network.ordered:
        return _without_edges(network)
    graph = nx.DiGraph(network.edges)
    graph.add_nodes_from(network.boxes)
    depth = _depths(graph)
    groups = _joined(_cut(graph, depth), network)
    return [_piece(graph.subgraph(group), _entering(graph, group), group, network) for group in groups]


def _depths(graph: nx.DiGraph) -> dict[int, int]:
    """Return the layer of each box: right below the lowest that feeds it, or, for an input, right above what it feeds."""
    depth: dict[int, int] = {}
    for node in nx.topological_sort(graph):
        depth[node] = 1 + max((depth[one] for one in graph.predecessors(node)), default=-1)
    for node in graph:
        if not graph.in_degree(node) and graph.out_degree(node):
            depth[node] = min(depth[one] for one in graph.successors(node)) - 1
    return depth


def _cut(graph: nx.DiGraph, depth: dict[int, int]) -> list[list[int]]:
    """Cut after every layer of one box over which no edge jumps."""
    last = max(depth.values())
    layers: list[list[int]] = [[] for _ in range(last + 1)]
    for node in sorted(depth):
        layers[depth[node]].append(node)
    jumped = {layer for a, b in graph.edges for layer in range(depth[a] + 1, depth[b])}
    groups: list[list[int]] = [[]]
    for number, nodes in enumerate(layers):
        groups[-1] += nodes
        if len(nodes) == 1 and number not in jumped and number < last:
            groups.append([])
    return groups


def _joined(groups: list[list[int]], network: Network) -> list[list[int]]:
    """Join small pieces that follow one another in one module, as the two halves of a transformer's block do."""
    made: list[list[int]] = []
    for group in groups:
        if made and len(made[-1]) + len(group) <= _SMALL and _title_of(made[-1], network) == _title_of(group, network):
            made[-1] = [*made[-1], *group]
        else:
            made.append(group)
    return made


def _entering(graph: nx.DiGraph, group: Sequence[int]) -> list[int]:
    inside = set(group)
    return [node for node in group if any(one not in inside for one in graph.predecessors(node))]


def _piece(inside: nx.DiGraph, entering: Sequence[int], group: Sequence[int], network: Network) -> Piece:
    graph = nx.DiGraph(inside)
    graph.add_edges_from((START, node) for node in entering)
    depth = _depths(graph)
    bends = START
    edges: list[tuple[int, ...]] = []
    layers: list[list[int]] = [[] for _ in range(max(depth.values()) + 1)]
    for node in sorted(depth):
        layers[depth[node]].append(node)
    for first, second in sorted(graph.edges):
        way = [first]
        for layer in range(depth[first] + 1, depth[second]):
            bends -= 1
            layers[layer].append(bends)
            way.append(bends)
        edges.append((*way, second))
    return Piece(_title_of(group, network), _ordered(layers, edges), tuple(edges))


def _ordered(layers: list[list[int]], edges: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Order each layer by where its neighbours stand, to and fro, so that few edges cross (Sugiyama et al. 1981)."""
    above: dict[int, list[int]] = {}
    below: dict[int, list[int]] = {}
    for way in edges:
        for first, second in itertools.pairwise(way):
            above.setdefault(second, []).append(first)
            below.setdefault(first, []).append(second)
    place = {node: _spread(index, layer) for layer in layers for index, node in enumerate(layer)}
    for sweep in range(_SWEEPS):
        near = above if sweep % 2 == 0 else below
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            layer.sort(key=lambda node: (_mean([place[one] for one in near.get(node, ())], place[node]), place[node]))
            place.update({node: _spread(index, layer) for index, node in enumerate(layer)})
    return tuple(map(tuple, layers))


def _spread(index: int, layer: Sequence[int]) -> float:
    return (index + 0.5) / len(layer)


def _mean(places: Sequence[float], otherwise: float) -> float:
    return sum(places) / len(places) if places else otherwise


def _title_of(group: Sequence[int], network: Network) -> str:
    """Return the innermost module that holds all of the boxes, but for those that belong to the root."""
    paths = [network.boxes[node].path[:-1] for node in group if len(network.boxes[node].path) > 1]
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in shared)


def _without_edges(network: Network) -> list[Piece]:
    """Return a piece for each module that holds sites, where nothing is known of what flows between them."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, box in network.boxes.items():
        groups.setdefault(box.path[:-1], []).append(number)
    return [Piece(".".join(path), tuple((one,) for one in group), ()) for path, group in groups.items()]
