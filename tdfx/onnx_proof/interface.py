"""What two graphs show to the outside: opsets, inputs, stored tensors, outputs; compared in that order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdfx.errors import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tdfx.onnx_proof.graph import Graph, Initializer, Port


def entry_difference(model: Graph, reference: Graph) -> str | None:
    """Return the first difference in what the nodes start from, or None: opsets, inputs, initializers."""
    return (
        _opset_difference(model.opsets, reference.opsets)
        or port_difference("input", model.inputs, reference.inputs)
        or name_difference("input", model.inputs, reference.inputs)
        or _initializer_difference(_named(model), _named(reference))
    )


def exit_difference(model: Graph, reference: Graph) -> str | None:
    """Return the first difference in the outputs, or None."""
    return port_difference("output", model.outputs, reference.outputs) or name_difference(
        "output", model.outputs, reference.outputs
    )


def port_difference(kind: str, ports: Sequence[Port], others: Sequence[Port]) -> str | None:
    """Return the first difference in number, dtype or shape of inputs or outputs, whatever their names."""
    if len(ports) != len(others):
        return f"the model has {len(ports)} {kind}(s), the reference {len(others)}"
    for position, (one, other) in enumerate(zip(ports, others, strict=True)):
        if one.dtype != other.dtype:
            return f"{kind} {position}, {one.name!r}, has dtype {one.dtype}, but {other.dtype} in the reference"
        if one.shape != other.shape:
            shapes = f"shape {_shape(one)}, but {_shape(other)}"
            return f"{kind} {position}, {one.name!r}, has {shapes} in the reference"
    return None


def name_difference(kind: str, ports: Sequence[Port], others: Sequence[Port]) -> str | None:
    """Return the first difference in the names of as many inputs or outputs."""
    for position, (one, other) in enumerate(zip(ports, others, strict=True)):
        if one.name != other.name:
            return f"{kind} {position} is named {one.name!r}, but {other.name!r} in the reference"
    return None


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


def _initializer_difference(own: dict[str, Initializer], others: dict[str, Initializer]) -> str | None:
    for name, one in own.items():
        if name not in others:
            return f"initializer {name!r} is not in the reference{_closest(name, others)}"
        other = others[name]
        if one.dtype != other.dtype:
            return f"initializer {name!r} has dtype {one.dtype}, but {other.dtype} in the reference"
        if one.shape != other.shape:
            return f"initializer {name!r} has shape {list(one.shape)}, but {list(other.shape)} in the reference"
        if one.value != other.value:
            return f"initializer {name!r} is {one.value}, but {other.value} in the reference"
    missing = [name for name in others if name not in own]
    return f"initializer {missing[0]!r} of the reference is not in the model" if missing else None


def _closest(name: str, others: dict[str, Initializer]) -> str:
    return f", which has {nearest(name, others)}" if others else ", which has none"
