"""Match two graphs by walking back from their outputs, in linear time.

Arguments have positions, so once two nodes are partners, their arguments are partners too: every step is forced. A
contradiction on the way therefore proves that the graphs do not match. Only nodes that no output depends on are left open.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tdfx.onnx_proof.first_difference import Difference

if TYPE_CHECKING:
    from tdfx.onnx_proof.graph import Graph


_Pair = tuple[str, str, Difference]
"""Two values that must be partners, and what reads them."""


@dataclass(slots=True)
class Walk:
    """The partners so far, in both directions, and the first contradiction."""

    model: Graph
    reference: Graph
    values: dict[str, str] = field(default_factory=dict)
    """Value of the model -> value of the reference."""
    partners: dict[str, str] = field(default_factory=dict)
    """The same in the other direction, to notice two values that would share one partner."""
    nodes: dict[int, int] = field(default_factory=dict)
    """Index of a node of the model -> index of its partner."""
    conflict: Difference | None = None

    def join(self, value: str, other: str) -> None:
        """Make two values partners; an empty name, which is an output left out, has no partner."""
        if value:
            self.values[value] = other
            self.partners[other] = value

    def complete(self) -> bool:
        """Return True if every node of both graphs has a partner."""
        return len(self.nodes) == len(self.model.nodes) == len(self.reference.nodes)


def walk(model: Graph, reference: Graph) -> Walk:
    """Pair the values of two graphs with equally many outputs, starting from the outputs."""
    state = Walk(model, reference)
    ports = zip(model.outputs, reference.outputs, strict=True)
    waiting = [(output.name, other.name, Difference("the graph's outputs")) for output, other in ports]
    while waiting:
        value, counterpart, consumer = waiting.pop()
        if state.values.get(value) == counterpart:
            continue
        reason = _contradiction(state, value, counterpart)
        if reason is not None:
            state.conflict = replace(consumer, text=f"{consumer.text}: {reason}")
            break
        waiting.extend(_join_producers(state, value, counterpart))
    return state


def _contradiction(state: Walk, value: str, other: str) -> str | None:
    """Return why two values cannot be partners, or None."""
    if value in state.values:
        return f"{value!r} is used in two places that read {state.values[value]!r} and {other!r} in the reference"
    if other in state.partners:
        return f"{value!r} and {state.partners[other]!r} stand where the reference reads {other!r} twice"
    kind, key, slot = state.model.sources[value]
    other_kind, other_key, other_slot = state.reference.sources[other]
    if kind != other_kind or slot != other_slot:
        return f"{value!r} comes from another kind of place than {other!r} in the reference"
    if kind != "node":
        return None if key == other_key else f"{value!r} stands where the reference has {other!r}"
    node, counterpart = state.model.nodes[int(key)], state.reference.nodes[int(other_key)]
    return None if node.label == counterpart.label else f"{node} stands where the reference has {counterpart}"


def _join_producers(state: Walk, value: str, other: str) -> list[_Pair]:
    """Make two values partners, and the nodes that compute them; return the arguments to pair next."""
    kind, key, _ = state.model.sources[value]
    if kind != "node":
        state.join(value, other)
        return []
    index, partner = int(key), int(state.reference.sources[other][1])
    node, counterpart = state.model.nodes[index], state.reference.nodes[partner]
    state.nodes[index] = partner
    for output, other_output in zip(node.outputs, counterpart.outputs, strict=True):
        state.join(output, other_output)  # all at once, so that two nodes can never share one partner
    return [
        (argument, other_argument, Difference(f"argument {position} of node {node}", index, partner))
        for position, (argument, other_argument) in enumerate(zip(node.inputs, counterpart.inputs, strict=True))
        if argument  # the labels of the nodes are equal, so both leave out the same arguments
    ]
