"""Match two graphs by walking back from their outputs: settles in linear time whatever an output depends on.

Arguments have positions, so once two nodes are partners, their arguments are partners too: every step is forced. A
contradiction on the way therefore proves that no match exists. Only nodes that no output depends on are left open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from tdfx.onnx_proof.difference import Difference

if TYPE_CHECKING:
    from tdfx.onnx_proof.graph import Graph


class _Place(NamedTuple):
    """Who reads the two values that are to be partners."""

    text: str
    node: int | None = None
    other: int | None = None


class _Pair(NamedTuple):
    """Two values that must be partners."""

    value: str
    other: str
    place: _Place


@dataclass(slots=True)
class Walk:
    """Partners found so far, in both directions, and the first contradiction."""

    model: Graph
    reference: Graph
    values: dict[str, str] = field(default_factory=dict)
    """Value of the model -> value of the reference."""
    partners: dict[str, str] = field(default_factory=dict)
    """The same the other way round: both are needed to see that two values share one partner."""
    nodes: dict[int, int] = field(default_factory=dict)
    conflict: Difference | None = None

    def join(self, value: str, other: str) -> None:
        """Make two values partners; empty names, which stand for outputs left out, have none."""
        if value:
            self.values[value] = other
            self.partners[other] = value

    def complete(self) -> bool:
        """Return True if every node of both graphs has a partner."""
        return len(self.nodes) == len(self.model.nodes) == len(self.reference.nodes)


def walk(model: Graph, reference: Graph) -> Walk:
    """Pair the values of two graphs with equally many outputs, starting from the outputs."""
    state = Walk(model, reference)
    top = _Place("the graph's outputs")
    waiting = [_Pair(a.name, b.name, top) for a, b in zip(model.outputs, reference.outputs, strict=True)]
    while waiting and state.conflict is None:
        pair = waiting.pop()
        if state.values.get(pair.value) == pair.other:
            continue
        reason = _contradiction(state, pair.value, pair.other)
        if reason is not None:
            state.conflict = Difference(f"{pair.place.text}: {reason}", pair.place.node, pair.place.other)
        else:
            waiting.extend(_pair(state, pair.value, pair.other))
    return state


def _contradiction(state: Walk, value: str, other: str) -> str | None:
    """Return why two values cannot be partners, or None."""
    kind, key, slot = state.model.sources[value]
    other_kind, other_key, other_slot = state.reference.sources[other]
    if value in state.values or other in state.partners:
        return _shared(state, value, other)
    if kind != other_kind or slot != other_slot:
        return f"{value!r} comes from another kind of place than {other!r} in the reference"
    if kind != "node":
        return None if key == other_key else f"{value!r} stands where the reference has {other!r}"
    node, counterpart = state.model.nodes[int(key)], state.reference.nodes[int(other_key)]
    return None if node.label == counterpart.label else f"{node} stands where the reference has {counterpart}"


def _shared(state: Walk, value: str, other: str) -> str:
    taken = state.values.get(value)
    if taken is not None:
        return f"{value!r} is used in two places that read {taken!r} and {other!r} in the reference"
    return f"{value!r} and {state.partners.get(other)!r} stand where the reference reads {other!r} twice"


def _pair(state: Walk, value: str, other: str) -> list[_Pair]:
    """Make two values partners, with the nodes that make them; return the arguments to pair next."""
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
        _Pair(a, b, _Place(f"argument {position} of node {node}", index, partner))
        for position, (a, b) in enumerate(zip(node.inputs, counterpart.inputs, strict=True))
        if a  # an argument left out has no partner; the labels say that both leave it out
    ]
