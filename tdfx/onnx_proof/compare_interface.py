"""Compare what two graphs have by name: inputs, outputs, opsets and stored tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdfx.errors import nearest
from tdfx.onnx_proof.first_difference import Difference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tdfx.onnx_proof.graph import Graph, Initializer, Port


def input_difference(model: Graph, reference: Graph) -> Difference | None:
    """Return the first difference in the inputs, or None: number, dtypes, shapes with dynamic axes, names."""
    difference = type_difference("input", model.inputs, reference.inputs) or _name_difference(
        "input", model.inputs, reference.inputs
    )
    if difference is None:
        return None
    text, position = difference
    return Difference(text, *(_first_reader(graph, _name_at(graph.inputs, position)) for graph in (model, reference)))


def output_difference(model: Graph, reference: Graph, names: bool = True) -> Difference | None:
    """Return the first difference in the outputs, or None; their names are compared if ``names`` is True."""
    difference = type_difference("output", model.outputs, reference.outputs)
    if difference is None and names:
        difference = _name_difference("output", model.outputs, reference.outputs)
    if difference is None:
        return None
    text, position = difference
    return Difference(text, *(graph.producer(_name_at(graph.outputs, position)) for graph in (model, reference)))


def stored_difference(model: Graph, reference: Graph) -> Difference | None:
    """Return the first difference in opsets and stored tensors, or None."""
    text = _opset_difference(model.opsets, reference.opsets)
    if text is not None:
        return Difference(text)
    tensors, others = _named_tensors(model), _named_tensors(reference)
    for name, tensor in tensors.items():
        text = _tensor_difference(name, tensor, others)
        if text is not None:
            return Difference(text, _first_reader(model, name), _first_reader(reference, name))
    missing = [name for name in others if name not in tensors]
    if missing:
        text = f"initializer {missing[0]!r} of the reference is not in the model"
        return Difference(text, None, _first_reader(reference, missing[0]))
    return None


def type_difference(kind: str, ports: Sequence[Port], others: Sequence[Port], start: int = 0) -> tuple[str, int] | None:
    """Return the first difference in number, dtype or shape, and its position; positions begin at ``start``."""
    if len(ports) != len(others):
        return f"the model has {len(ports)} {kind}(s), the reference {len(others)}", min(len(ports), len(others))
    for position, (port, other) in enumerate(zip(ports, others, strict=True), start):
        if port.dtype != other.dtype:
            text = f"{kind} {position}, {port.name!r}, has dtype {port.dtype}, but {other.dtype} in the reference"
            return text, position
        if port.shape != other.shape:
            shapes = f"shape {_shape_text(port)}, but {_shape_text(other)}"
            return f"{kind} {position}, {port.name!r}, has {shapes} in the reference", position
    return None


def _name_difference(kind: str, ports: Sequence[Port], others: Sequence[Port]) -> tuple[str, int] | None:
    """Return the first difference in the names of equally many inputs or outputs, and its position."""
    for position, (port, other) in enumerate(zip(ports, others, strict=True)):
        if port.name != other.name:
            return f"{kind} {position} is named {port.name!r}, but {other.name!r} in the reference", position
    return None


def _name_at(ports: Sequence[Port], position: int) -> str:
    return ports[position].name if position < len(ports) else ""


def _first_reader(graph: Graph, name: str) -> int | None:
    """Return the first node that reads a value, or None."""
    return next((index for index, node in enumerate(graph.nodes) if name and name in node.inputs), None)


def _shape_text(port: Port) -> str:
    return "unknown" if port.shape is None else f"[{', '.join(map(str, port.shape))}]"


def _opset_difference(opsets: dict[str, int], others: dict[str, int]) -> str | None:
    for domain in sorted(opsets.keys() | others.keys()):
        version, other = opsets.get(domain), others.get(domain)
        if version != other:
            return f"opset {domain or 'ai.onnx'!r} has version {version}, but {other} in the reference"
    return None


def _named_tensors(graph: Graph) -> dict[str, Initializer]:
    return {name: tensor for name, tensor in graph.initializers.items() if not tensor.anonymous}


def _tensor_difference(name: str, tensor: Initializer, others: dict[str, Initializer]) -> str | None:
    if name not in others:
        closest = f", which has {nearest(name, others)}" if others else ", which has none"
        return f"initializer {name!r} is not in the reference{closest}"
    other = others[name]
    if tensor.dtype != other.dtype:
        return f"initializer {name!r} has dtype {tensor.dtype}, but {other.dtype} in the reference"
    if tensor.shape != other.shape:
        return f"initializer {name!r} has shape {list(tensor.shape)}, but {list(other.shape)} in the reference"
    if tensor.value != other.value:
        return f"initializer {name!r} is {tensor.value}, but {other.value} in the reference"
    return None
