"""A small picture, in text, of the place where two graphs part: a node, what it reads, and who reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

from tdfx.onnx_proof.difference import origin

if TYPE_CHECKING:
    from tdfx.onnx_proof.difference import Difference
    from tdfx.onnx_proof.graph import Graph

WIDTH = 58
"""Columns for one of the two sides."""

_SHOWN = 4
"""Readers of a node that are shown; the others are counted."""


def picture(difference: Difference, model: Graph, reference: Graph) -> str | None:
    """Draw both sides beside one another, or return None where there is no node to show.

    Producers stand above a node, with the positions of its arguments, and consumers below.
    """
    if difference.node is None and difference.other is None:
        return None
    left, right = _side(model, difference.node), _side(reference, difference.other)
    height = max(len(left), len(right))
    left, right = ([*some, *[""] * (height - len(some))] for some in (left, right))
    rows = zip(["in the model", *left], ["in the reference", *right], strict=True)
    return "\n".join(f"{_fit(one)}  {_cut(other)}".rstrip() for one, other in rows)


def _side(graph: Graph, index: int | None) -> list[str]:
    if index is None:
        return ["  (nothing)"]
    node = graph.nodes[index]
    lines = [f"  {position} ─ {_short(origin(name, graph))}" for position, name in enumerate(node.inputs)]
    lines = [line.replace("  ", "  ╭ " if number == 0 else "  ├ ", 1) for number, line in enumerate(lines)]
    lines.append(f"  ▶ {node}")
    lines += [f"  │   {one.name} {one.text}" for one in node.attributes]
    return [*lines, *_readers(graph, index)]


def _readers(graph: Graph, index: int) -> list[str]:
    made = set(filter(None, graph.nodes[index].outputs))
    readers = [
        f"{one}, argument {position}" for one in graph.nodes for position, name in enumerate(one.inputs) if name in made
    ]
    readers += [f"output {port.name!r}" for port in graph.outputs if port.name in made]
    shown = [f"  ╰▷ {one}" for one in readers[:_SHOWN]] or ["  ╰▷ nothing"]
    return [*shown, *([f"     and {len(readers) - _SHOWN} more"] if len(readers) > _SHOWN else [])]


def _short(text: str) -> str:
    return text.removeprefix("output 0 of ").removesuffix(",")


def _fit(text: str) -> str:
    return set_cell_size(_cut(text), WIDTH)


def _cut(text: str) -> str:
    return text if cell_len(text) <= WIDTH else set_cell_size(text, WIDTH - 1) + "…"
