"""Draw, in text, the place where two graphs differ: a node, what it reads, and what reads it."""

from __future__ import annotations

import itertools
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
    left = ["in the model", *_draw_side(model, difference.node)]
    right = ["in the reference", *_draw_side(reference, difference.other)]
    rows = itertools.zip_longest(map(_cut, left), map(_cut, right), fillvalue="")
    return "\n".join(f"{set_cell_size(line, WIDTH)}  {other}".rstrip() for line, other in rows)


def _draw_side(graph: Graph, index: int | None) -> list[str]:
    if index is None:
        return ["  (nothing)"]
    node = graph.nodes[index]
    lines = []
    for position, name in enumerate(node.inputs):
        source = describe_source(name, graph).removeprefix("output 0 of ").removesuffix(",")
        lines.append(f"  {'├' if position else '╭'} {position} ─ {source}")
    lines.append(f"  ▶ {node}")
    lines += [f"  │   {attribute.name} {attribute.text}" for attribute in node.attributes]
    outputs = set(filter(None, node.outputs))
    readers = [
        f"{reader}, argument {position}"
        for reader in graph.nodes
        for position, name in enumerate(reader.inputs)
        if name in outputs
    ]
    readers += [f"output {port.name!r}" for port in graph.outputs if port.name in outputs]
    lines += [f"  ╰▷ {reader}" for reader in readers[:_MAX_READERS] or ["nothing"]]
    return [*lines, *([f"     and {len(readers) - _MAX_READERS} more"] if len(readers) > _MAX_READERS else [])]


def _cut(text: str) -> str:
    return text if cell_len(text) <= WIDTH else set_cell_size(text, WIDTH - 1) + "…"
