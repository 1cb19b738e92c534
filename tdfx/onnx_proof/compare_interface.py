"""Compare what two graphs have by name: inputs, outputs, opsets and stored tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdfx.errors import nearest
from tdfx.onnx_proof.first_difference import Difference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tdfx.onnx_proof.graph import Graph, Port


def input_difference(model: Graph, reference: Graph) -> Difference | None:
    """Return the first difference in the inputs, or None: number, dtypes, shapes with dynamic axes, names."""
    difference = _port_difference("input", model.inputs, reference.inputs)
    if difference is None:
        return None
    text, position = difference
    return Difference(text, *(_first_reader(graph, _name_at(graph.inputs, position)) for graph in (model, reference)))


def output_difference(model: Graph, reference: Graph, names: bool = True) -> Difference | None:
    """Return the first difference in the outputs, or None; their names are compared if ``names`` is True."""
    difference = _port_difference("output", model.outputs, reference.outputs, names)
    if difference is None:
        return None
    text, position = difference
    return Difference(text, *(graph.producer(_name_at(graph.outputs, position)) for graph in (model, reference)))


def stored_difference(model: Graph, reference: Graph) -> Difference | None:
    """Return the first difference in opsets and stored tensors, or None."""
    for domain in sorted(model.opsets.keys() | reference.opsets.keys()):
        version, other_version = model.opsets.get(domain), reference.opsets.get(domain)
        if version != other_version:
            text = f"opset {domain or 'ai.onnx'!r} has version {version}, but {other_version} in the reference"
            return Difference(text)
    tensors, others = (
        {name: tensor for name, tensor in graph.initializers.items() if not tensor.anonymous}
        for graph in (model, reference)
    )
    for name, tensor in tensors.items():
        other = others.get(name)
        if other is None:
            text = f"initializer {name!r} is not in the reference, which has {nearest(name, others)}"
        elif tensor.dtype != other.dtype:
            text = f"initializer {name!r} has dtype {tensor.dtype}, but {other.dtype} in the reference"
        elif tensor.shape != other.shape:
            text = f"initializer {name!r} has shape {[*tensor.shape]}, but {[*other.shape]} in the reference"
        elif tensor.value != other.value:
            text = f"initializer {name!r} is {tensor.value}, but {other.value} in the reference"
        else:
            continue
        return Difference(text, _first_reader(model, name), _first_reader(reference, name))
    missing = next((name for name in others if name not in tensors), None)
    if missing is None:
        return None
    text = f"initializer {missing!r} of the reference is not in the model"
    return Difference(text, None, _first_reader(reference, missing))


def type_difference(kind: str, ports: Sequence[Port], others: Sequence[Port], start: int = 0) -> tuple[str, int] | None:
    """Return the first difference in number, dtype or shape, and its position; positions begin at ``start``."""
    if len(ports) != len(others):
        return f"the model has {len(ports)} {kind}(s), the reference {len(others)}", min(len(ports), len(others))
    for position, (port, other) in enumerate(zip(ports, others, strict=True), start):
        subject = f"{kind} {position}, {port.name!r}, has"
        if port.dtype != other.dtype:
            return f"{subject} dtype {port.dtype}, but {other.dtype} in the reference", position
        if port.shape != other.shape:
            return f"{subject} shape {_shape_text(port)}, but {_shape_text(other)} in the reference", position
    return None


def _port_difference(
    kind: str, ports: Sequence[Port], others: Sequence[Port], names: bool = True
) -> tuple[str, int] | None:
    """Return the first difference in types or else in names, and its position."""
    difference = type_difference(kind, ports, others)
    if difference is None and names:
        for position, (port, other) in enumerate(zip(ports, others, strict=True)):
            if port.name != other.name:
                return f"{kind} {position} is named {port.name!r}, but {other.name!r} in the reference", position
    return difference


def _name_at(ports: Sequence[Port], position: int) -> str:
    return ports[position].name if position < len(ports) else ""


def _first_reader(graph: Graph, name: str) -> int | None:
    return next((index for index, node in enumerate(graph.nodes) if name and name in node.inputs), None)


def _shape_text(port: Port) -> str:
    return "unknown" if port.shape is None else f"[{', '.join(map(str, port.shape))}]"
