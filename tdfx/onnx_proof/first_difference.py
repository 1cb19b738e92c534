"""Describe the first difference of two graphs in topological order.

Every node gets a class, from the front: its operator, attributes, and the classes of its arguments. Nodes of one class
compute the same thing. The first node whose class the other graph lacks is therefore where the graphs differ, while all
that it reads is the same in both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tdfx.onnx_proof.graph import Graph, Node, Source
    from tdfx.onnx_proof.value_text import Attribute


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
        """Return what identifies each argument of ``node``."""
        return tuple(self._value(name) for name in node.inputs)

    def _value(self, name: str) -> object:
        """Return what identifies a value: its source, with a class in place of a node."""
        if not name:
            return None
        kind, key, slot = self.graph.sources[name]
        return (kind, self.of_node[int(key)], slot) if kind == "node" else (kind, key, slot)

    def first_missing(self, classes: set[int]) -> list[int]:
        """Return the nodes whose class is not among ``classes``, though those of all their arguments are."""
        return [
            index
            for index, node_class in enumerate(self.of_node)
            if node_class not in classes and all(self._is_in(name, classes) for name in self.graph.nodes[index].inputs)
        ]

    def _is_in(self, name: str, classes: set[int]) -> bool:
        kind, key, _ = self.graph.sources[name] if name else ("none", "", 0)
        return kind != "node" or self.of_node[int(key)] in classes


def first_difference(model: Graph, reference: Graph) -> Difference | None:
    """Return where ``model`` first differs from ``reference``, or None if both compute the same things as often."""
    palette: dict[object, int] = {}
    classes, other_classes = NodeClasses(model, palette), NodeClasses(reference, palette)
    missing = classes.first_missing(set(other_classes.of_node))
    other_missing = other_classes.first_missing(set(classes.of_node))
    if missing:
        index, node = missing[0], model.nodes[missing[0]]
        other = _counterpart(node, classes, other_classes, other_missing)
        if other is None:
            return Difference(f"node {node} has no counterpart in the reference", index)
        return Difference(_node_difference(node, reference.nodes[other], classes, other_classes), index, other)
    if other_missing:
        other = other_missing[0]
        text = f"node {reference.nodes[other]} of the reference has no counterpart in the model"
        return Difference(text, None, other)
    return _count_difference(classes, other_classes)


def _counterpart(node: Node, classes: NodeClasses, other_classes: NodeClasses, candidates: Sequence[int]) -> int | None:
    """Return the candidate of the reference that is most like ``node``; None if there is no candidate."""
    arguments = classes.arguments(node)

    def likeness(index: int) -> tuple[int, bool]:
        other = other_classes.graph.nodes[index]
        return (other_classes.arguments(other) == arguments) + (other.op == node.op), other.name == node.name

    return max(candidates, key=likeness) if candidates else None


def _node_difference(node: Node, other: Node, classes: NodeClasses, other_classes: NodeClasses) -> str:
    if node.op != other.op:
        return f"node {node} stands where the reference has {other}"
    if node.attributes != other.attributes:
        return f"node {node} has {_attribute_difference(node.attributes, other)}"
    arguments, other_arguments = classes.arguments(node), other_classes.arguments(other)
    if len(arguments) != len(other_arguments):
        counts = f"{len(arguments)} input(s), but {other.name!r} in the reference has {len(other_arguments)}"
        return f"node {node} has {counts}"
    for position, (argument, other_argument) in enumerate(zip(arguments, other_arguments, strict=True)):
        if argument != other_argument:
            reads = describe_source(node.inputs[position], classes.graph)
            other_reads = describe_source(other.inputs[position], other_classes.graph)
            return (
                f"node {node} takes {reads} as argument {position}, but {other.name!r} in the reference {other_reads}"
            )
    used, other_used = (sum(map(bool, side.outputs)) for side in (node, other))
    return f"node {node} makes {used} output(s), but {other.name!r} in the reference {other_used}"


def _attribute_difference(attributes: Sequence[Attribute], other: Node) -> str:
    both = [{attribute.name: attribute for attribute in side} for side in (attributes, other.attributes)]
    name = next(name for name in sorted({*both[0], *both[1]}) if both[0].get(name) != both[1].get(name))
    texts = [f"{name} {side[name].text}" if name in side else f"no {name}" for side in both]
    if texts[0] == texts[1]:
        texts = [f"{text} ({side[name].kind})" for text, side in zip(texts, both, strict=True)]
    return f"{texts[0]}, but {other.name!r} in the reference has {texts[1].removeprefix(f'{name} ')}"


def describe_source(name: str, graph: Graph) -> str:
    """Return as text where a value comes from."""
    source: Source = graph.sources[name] if name else ("none", "", 0)
    match source:
        case ("node", index, slot):
            return f"output {slot} of {graph.nodes[int(index)]}"
        case ("input", _, _):
            return f"input {name!r}"
        case ("initializer", _, _):
            return f"initializer {name!r}"
        case ("constant", value, _):
            return f"the constant {name!r}, {value},"
        case _:
            return "nothing"


def _count_difference(classes: NodeClasses, other_classes: NodeClasses) -> Difference | None:
    counts, other_counts = Counter(classes.of_node), Counter(other_classes.of_node)
    for index, node_class in enumerate(classes.of_node):
        if counts[node_class] != other_counts[node_class]:
            nodes = f"{counts[node_class]} node(s) that compute what {classes.graph.nodes[index]} does"
            text = f"the model has {nodes}, the reference {other_counts[node_class]}"
            return Difference(text, index, other_classes.of_node.index(node_class))
    return None
