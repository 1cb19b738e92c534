"""Describe the first difference of two graphs in topological order, as a sentence and as a drawing.

Every node gets a class, from the front: its operator, attributes, and the classes of its arguments. Nodes of one class
compute the same thing. The first node whose class the other graph lacks is therefore where the graphs differ, while all
that it reads is the same in both.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tdfx.onnx_proof.graph import Graph, Node
    from tdfx.onnx_proof.value_text import Attribute


WIDTH = 58
"""Columns for one of the two sides."""

_MAX_READERS = 4
"""Readers of a node that are shown; the others are counted."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two graphs differ: a sentence, and the nodes to look at."""

    text: str
    node: int | None = None
    """Index of the node in the model's graph; None if there is none to show."""
    other: int | None = None
    """Index of the node in the reference's graph; None if there is none to show."""

    def __str__(self) -> str:
        return self.text


class NodeClasses:
    """The classes of one graph's nodes; graphs that share a ``palette`` can be compared."""

    def __init__(self, graph: Graph, palette: dict[object, int]) -> None:
        self.graph = graph
        self.of_node: list[int] = []
        for node in graph.nodes:
            key = (node.label, self.arguments(node))
            self.of_node.append(palette.setdefault(key, len(palette)))

    def arguments(self, node: Node) -> tuple[object, ...]:
        """Return what identifies each argument: its source, with a class in place of a node; None if it is left out."""
        sources = (self.graph.sources[name] if name else None for name in node.inputs)
        return tuple(
            ("node", self.of_node[int(source[1])], source[2]) if source and source[0] == "node" else source
            for source in sources
        )

    def first_missing(self, classes: set[int]) -> list[int]:
        """Return the nodes whose class is not among ``classes``, though those of all their arguments are."""
        missing = [index for index, node_class in enumerate(self.of_node) if node_class not in classes]
        rest = set(missing)
        return [index for index in missing if rest.isdisjoint(map(self.graph.producer, self.graph.nodes[index].inputs))]


def first_difference(model: Graph, reference: Graph) -> Difference | None:
    """Return where ``model`` first differs from ``reference``, or None if both compute the same things as often."""
    palette: dict[object, int] = {}
    classes, other_classes = NodeClasses(model, palette), NodeClasses(reference, palette)
    missing = classes.first_missing(set(other_classes.of_node))
    other_missing = other_classes.first_missing(set(classes.of_node))
    if missing:
        node = model.nodes[missing[0]]
        other = _counterpart(node, classes, other_classes, other_missing)
        if other is None:
            return Difference(f"node {node} has no counterpart in the reference", missing[0])
        text = _node_difference(node, reference.nodes[other], classes, other_classes)
        return Difference(text, missing[0], other)
    if other_missing:
        text = f"node {reference.nodes[other_missing[0]]} of the reference has no counterpart in the model"
        return Difference(text, None, other_missing[0])
    return _count_difference(classes, other_classes)


def _counterpart(node: Node, classes: NodeClasses, other_classes: NodeClasses, candidates: Sequence[int]) -> int | None:
    arguments = classes.arguments(node)

    def likeness(index: int) -> tuple[int, bool]:
        other = other_classes.graph.nodes[index]
        return (other_classes.arguments(other) == arguments) + (other.op == node.op), other.name == node.name

    return max(candidates, key=likeness, default=None)


def _node_difference(node: Node, other: Node, classes: NodeClasses, other_classes: NodeClasses) -> str:
    if node.op != other.op:
        return f"node {node} stands where the reference has {other}"
    if node.attributes != other.attributes:
        return f"node {node} has {_attribute_difference(node.attributes, other)}"
    arguments, other_arguments = classes.arguments(node), other_classes.arguments(other)
    the_other = f"but {other.name!r} in the reference"
    if len(arguments) != len(other_arguments):
        return f"node {node} has {len(arguments)} input(s), {the_other} has {len(other_arguments)}"
    for position, (argument, other_argument) in enumerate(zip(arguments, other_arguments, strict=True)):
        if argument != other_argument:
            reads = describe_source(node.inputs[position], classes.graph)
            other_reads = describe_source(other.inputs[position], other_classes.graph)
            return f"node {node} takes {reads} as argument {position}, {the_other} {other_reads}"
    used, other_used = (sum(map(bool, side.outputs)) for side in (node, other))
    return f"node {node} makes {used} output(s), {the_other} {other_used}"


def _attribute_difference(attributes: Sequence[Attribute], other: Node) -> str:
    both = [{attribute.name: attribute for attribute in side} for side in (attributes, other.attributes)]
    name = next(name for name in sorted({*both[0], *both[1]}) if both[0].get(name) != both[1].get(name))
    texts = [f"{name} {side[name].text}" if name in side else f"no {name}" for side in both]
    if texts[0] == texts[1]:
        texts = [f"{text} ({side[name].kind})" for text, side in zip(texts, both, strict=True)]
    return f"{texts[0]}, but {other.name!r} in the reference has {texts[1].removeprefix(f'{name} ')}"


def describe_source(name: str, graph: Graph) -> str:
    """Return as text where a value comes from."""
    match graph.sources.get(name):
        case ("node", index, slot):
            return f"output {slot} of {graph.nodes[int(index)]}"
        case ("constant", value, _):
            return f"the constant {name!r}, {value},"
        case (kind, _, _):
            return f"{kind} {name!r}"
    return "nothing"


def _count_difference(classes: NodeClasses, other_classes: NodeClasses) -> Difference | None:
    counts, other_counts = Counter(classes.of_node), Counter(other_classes.of_node)
    for index, node_class in enumerate(classes.of_node):
        if counts[node_class] != other_counts[node_class]:
            nodes = f"{counts[node_class]} node(s) that compute what {classes.graph.nodes[index]} does"
            text = f"the model has {nodes}, the reference {other_counts[node_class]}"
            return Difference(text, index, other_classes.of_node.index(node_class))
    return None


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
