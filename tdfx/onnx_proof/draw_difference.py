"""Draw, in text, the place where two graphs differ: a node, what it reads, and what reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

from tdfx.onnx_proof.first_difference import describe_source

if TYPE_CHECKING:
    from tdfx.onnx_proof.first_difference import Difference
    from tdfx.onnx_proof.graph import Graph

WIDTH = 58
"""Columns for one of the two sides."""

_MAX_READERS = 4
"""Readers of a node that are shown; the others are counted."""


def draw_difference(difference: Difference, model: Graph, reference: Graph) -> str | None:
    """Draw both sides next to each other, or return None if there is no node to show.

    The producers of a node's inputs are above it, with the positions of its arguments, and its readers below.
    """
    if difference.node is None and difference.other is None:
        return None
    left, right = _draw_side(model, difference.node), _draw_side(reference, difference.other)
    height = max(len(left), len(right))
    left, right = ([*side, *[""] * (height - len(side))] for side in (left, right))
    rows = zip(["in the model", *left], ["in the reference", *right], strict=True)
    return "\n".join(f"{set_cell_size(_cut(line), WIDTH)}  {_cut(other)}".rstrip() for line, other in rows)


def _draw_side(graph: Graph, index: int | None) -> list[str]:
    if index is None:
        return ["  (nothing)"]
    node = graph.nodes[index]
    lines = [
        f"  {'├' if position else '╭'} {position} ─ {_source(name, graph)}" for position, name in enumerate(node.inputs)
    ]
    lines.append(f"  ▶ {node}")
    lines += [f"  │   {attribute.name} {attribute.text}" for attribute in node.attributes]
    return [*lines, *_draw_readers(graph, index)]


def _draw_readers(graph: Graph, index: int) -> list[str]:
    outputs = set(filter(None, graph.nodes[index].outputs))
    readers = [
        f"{node}, argument {position}"
        for node in graph.nodes
        for position, name in enumerate(node.inputs)
        if name in outputs
    ]
    readers += [f"output {port.name!r}" for port in graph.outputs if port.name in outputs]
    lines = [f"  ╰▷ {reader}" for reader in readers[:_MAX_READERS]] or ["  ╰▷ nothing"]
    return [*lines, *([f"     and {len(readers) - _MAX_READERS} more"] if len(readers) > _MAX_READERS else [])]


def _source(name: str, graph: Graph) -> str:
    return describe_source(name, graph).removeprefix("output 0 of ").removesuffix(",")


def _cut(text: str) -> str:
    return text if cell_len(text) <= WIDTH else set_cell_size(text, WIDTH - 1) + "…"
