"""The first difference of two graphs in topological order, in words.

Every node gets a class, from the front: operator, attributes, and the classes of its arguments. Equal classes compute
the same thing. The first node of a class that the other graph lacks is therefore where the two graphs part, and all
that it reads is still the same in both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tdfx.onnx_proof.graph import Graph, Node, Source
    from tdfx.onnx_proof.values import Attribute


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two graphs part, in words, and the nodes to look at."""

    text: str
    node: int | None = None
    """Index of the node in the model's graph; None if there is none to show."""
    other: int | None = None
    """The same in the reference's."""

    def __str__(self) -> str:
        return self.text


class Classes:
    """The classes of one graph's nodes; graphs that share a ``palette`` can be compared."""

    def __init__(self, graph: Graph, palette: dict[object, int]) -> None:
        self.graph = graph
        self.of_node: list[int] = []
        for node in graph.nodes:
            key = (node.label, self.arguments(node))
            self.of_node.append(palette.setdefault(key, len(palette)))

    def arguments(self, node: Node) -> tuple[object, ...]:
        """Return what identifies each argument of ``node``."""
        return tuple(self.value(name) for name in node.inputs)

    def value(self, name: str) -> object:
        """Return what identifies one value: where it comes from, with a class in place of a node."""
        if not name:
            return None
        kind, key, slot = self.graph.sources[name]
        return (kind, self.of_node[int(key)], slot) if kind == "node" else (kind, key, slot)

    def frontier(self, known: set[int]) -> list[int]:
        """Return the nodes whose class is not ``known`` though the classes of all their arguments are."""
        fresh = [index for index, one in enumerate(self.of_node) if one not in known]
        return [index for index in fresh if all(self._is_known(name, known) for name in self.graph.nodes[index].inputs)]

    def _is_known(self, name: str, known: set[int]) -> bool:
        kind, key, _ = self.graph.sources[name] if name else ("none", "", 0)
        return kind != "node" or self.of_node[int(key)] in known


def first_difference(model: Graph, reference: Graph) -> Difference | None:
    """Return where ``model`` first departs from ``reference``, or None if both compute the same things as often."""
    palette: dict[object, int] = {}
    own, others = Classes(model, palette), Classes(reference, palette)
    fronts = own.frontier(set(others.of_node)), others.frontier(set(own.of_node))
    if fronts[0]:
        index = fronts[0][0]
        other = _counterpart(model.nodes[index], own, others, fronts[1])
        if other is None:
            return Difference(f"node {model.nodes[index]} has no counterpart in the reference", index)
        return Difference(_difference_of(model.nodes[index], reference.nodes[other], own, others), index, other)
    if fronts[1]:
        other = fronts[1][0]
        return Difference(
            f"node {reference.nodes[other]} of the reference has no counterpart in the model", None, other
        )
    return _count_difference(own, others)


def _counterpart(node: Node, own: Classes, others: Classes, front: Sequence[int]) -> int | None:
    """Return the node of the reference that ``node`` was most likely meant to be."""
    arguments = own.arguments(node)

    def likeness(index: int) -> tuple[int, bool]:
        other = others.graph.nodes[index]
        return 2 * (others.arguments(other) == arguments) + 2 * (other.op == node.op), other.name == node.name

    return max(front, key=likeness) if front else None


def _difference_of(node: Node, other: Node, own: Classes, others: Classes) -> str:
    if node.op != other.op:
        return f"node {node} stands where the reference has {other}"
    if node.attributes != other.attributes:
        return f"node {node} has {_attribute_difference(node.attributes, other)}"
    mine, theirs = own.arguments(node), others.arguments(other)
    if len(mine) != len(theirs):
        return f"node {node} has {len(mine)} input(s), but {other.name!r} in the reference has {len(theirs)}"
    for position, (one, another) in enumerate(zip(mine, theirs, strict=True)):
        if one != another:
            reads = origin(node.inputs[position], own.graph), origin(other.inputs[position], others.graph)
            return (
                f"node {node} takes {reads[0]} as argument {position}, but {other.name!r} in the reference {reads[1]}"
            )
    used = [sum(map(bool, one.outputs)) for one in (node, other)]
    return f"node {node} makes {used[0]} output(s), but {other.name!r} in the reference {used[1]}"


def _attribute_difference(attributes: Sequence[Attribute], other: Node) -> str:
    mine, theirs = ({one.name: one for one in some} for some in (attributes, other.attributes))
    name = next(name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name))
    texts = [f"{name} {some[name].text}" if name in some else f"no {name}" for some in (mine, theirs)]
    if texts[0] == texts[1]:
        texts = [f"{text} ({some[name].kind})" for text, some in zip(texts, (mine, theirs), strict=True)]
    return f"{texts[0]}, but {other.name!r} in the reference has {texts[1].removeprefix(f'{name} ')}"


def origin(name: str, graph: Graph) -> str:
    """Say in words where a value comes from."""
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


def _count_difference(own: Classes, others: Classes) -> Difference | None:
    counts, other_counts = Counter(own.of_node), Counter(others.of_node)
    for index, one in enumerate(own.of_node):
        if counts[one] != other_counts[one]:
            times = f"{counts[one]} node(s) that compute what {own.graph.nodes[index]} does"
            return Difference(
                f"the model has {times}, the reference {other_counts[one]}", index, others.of_node.index(one)
            )
    return None
