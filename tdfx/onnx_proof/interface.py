"""What two graphs show and store by name: inputs, outputs, opsets, tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdfx.errors import nearest
from tdfx.onnx_proof.difference import Difference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tdfx.onnx_proof.graph import Graph, Initializer, Port


def entry_difference(model: Graph, reference: Graph) -> Difference | None:
    """Return the first difference in the inputs, or None: number, dtypes, shapes with dynamic axes, names."""
    found = _port_difference("input", model.inputs, reference.inputs) or _name_difference(
        "input", model.inputs, reference.inputs
    )
    if found is None:
        return None
    text, position = found
    return Difference(text, *(_reader(graph, _name_at(graph.inputs, position)) for graph in (model, reference)))


def exit_difference(model: Graph, reference: Graph, names: bool = True) -> Difference | None:
    """Return the first difference in the outputs, or None; their names count or not."""
    found = _port_difference("output", model.outputs, reference.outputs)
    if found is None and names:
        found = _name_difference("output", model.outputs, reference.outputs)
    if found is None:
        return None
    text, position = found
    return Difference(text, *(graph.maker(_name_at(graph.outputs, position)) for graph in (model, reference)))


def port_difference(kind: str, ports: Sequence[Port], others: Sequence[Port], start: int = 0) -> str | None:
    """Return the first difference in number, dtype or shape of inputs or outputs, whatever their names.

    ``start`` is the position of the first of ``ports`` among all.
    """
    found = _port_difference(kind, ports, others, start)
    return None if found is None else found[0]


def stored_difference(model: Graph, reference: Graph) -> Difference | None:
    """Return the first difference in opsets and stored tensors, or None."""
    text = _opset_difference(model.opsets, reference.opsets)
    if text is not None:
        return Difference(text)
    own, others = _named(model), _named(reference)
    for name, one in own.items():
        text = _tensor_difference(name, one, others)
        if text is not None:
            return Difference(text, _reader(model, name), _reader(reference, name))
    missing = [name for name in others if name not in own]
    if missing:
        text = f"initializer {missing[0]!r} of the reference is not in the model"
        return Difference(text, None, _reader(reference, missing[0]))
    return None


def _port_difference(
    kind: str, ports: Sequence[Port], others: Sequence[Port], start: int = 0
) -> tuple[str, int] | None:
    """Return the first difference besides names, and the position that it is at."""
    if len(ports) != len(others):
        return f"the model has {len(ports)} {kind}(s), the reference {len(others)}", min(len(ports), len(others))
    for position, (one, other) in enumerate(zip(ports, others, strict=True), start):
        if one.dtype != other.dtype:
            text = f"{kind} {position}, {one.name!r}, has dtype {one.dtype}, but {other.dtype} in the reference"
            return text, position
        if one.shape != other.shape:
            shapes = f"shape {_shape(one)}, but {_shape(other)}"
            return f"{kind} {position}, {one.name!r}, has {shapes} in the reference", position
    return None


def _name_difference(kind: str, ports: Sequence[Port], others: Sequence[Port]) -> tuple[str, int] | None:
    """Return the first difference in the names of as many inputs or outputs, and the position that it is at."""
    for position, (one, other) in enumerate(zip(ports, others, strict=True)):
        if one.name != other.name:
            return f"{kind} {position} is named {one.name!r}, but {other.name!r} in the reference", position
    return None


def _name_at(ports: Sequence[Port], position: int) -> str:
    return ports[position].name if position < len(ports) else ""


def _reader(graph: Graph, name: str) -> int | None:
    """Return the first node that reads a value, or None."""
    return next((index for index, node in enumerate(graph.nodes) if name and name in node.inputs), None)


def _shape(port: Port) -> str:
    return "unknown" if port.shape is None else f"[{', '.join(map(str, port.shape))}]"


def _opset_difference(opsets: dict[str, int], others: dict[str, int]) -> str | None:
    for domain in sorted(opsets.keys() | others.keys()):
        one, other = opsets.get(domain), others.get(domain)
        if one != other:
            return f"opset {domain or 'ai.onnx'!r} has version {one}, but {other} in the reference"
    return None


def _named(graph: Graph) -> dict[str, Initializer]:
    return {name: one for name, one in graph.initializers.items() if not one.anonymous}


def _tensor_difference(name: str, one: Initializer, others: dict[str, Initializer]) -> str | None:
    if name not in others:
        closest = f", which has {nearest(name, others)}" if others else ", which has none"
        return f"initializer {name!r} is not in the reference{closest}"
    other = others[name]
    if one.dtype != other.dtype:
        return f"initializer {name!r} has dtype {one.dtype}, but {other.dtype} in the reference"
    if one.shape != other.shape:
        return f"initializer {name!r} has shape {list(one.shape)}, but {list(other.shape)} in the reference"
    if one.value != other.value:
        return f"initializer {name!r} is {one.value}, but {other.value} in the reference"
    return None
