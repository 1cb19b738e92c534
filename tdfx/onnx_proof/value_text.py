"""Tensors, attributes and subgraphs of an ONNX file as text: equal text means equal value, whatever the encoding.

ONNX can store a tensor in several ways (raw bytes or typed fields, inline or in another file), and documentation may be
attached to anything, so equal values can have different bytes. Text can also be shown in an error message.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, numpy_helper

SHOWN_VALUES = 16
"""Tensors with at most this many values are written out; larger ones are identified by a digest of their bytes."""


class Attribute(NamedTuple):
    """One attribute of a node, by value."""

    name: str
    kind: str
    """The ONNX type, such as ``INTS``: an empty list of ints is not an empty list of floats."""
    text: str


def dtype_name(elem_type: int) -> str:
    """Return the ONNX name of an element type in lower case.

    >>> dtype_name(TensorProto.FLOAT), dtype_name(TensorProto.INT64)
    ('float', 'int64')
    """
    return str(TensorProto.DataType.Name(elem_type)).lower()


def digest(content: bytes) -> str:
    """Return a short fingerprint of ``content``; of 64 bits, so that two values collide about once in 10**19."""
    return f"sha256:{hashlib.sha256(content).hexdigest()[:16]}"


def tensor_text(tensor: TensorProto) -> str:
    """Return dtype, shape and values of a tensor whose data is in memory.

    >>> tensor_text(numpy_helper.from_array(np.array([2, -1]), name="shape"))
    'int64[2] of [2, -1]'
    """
    array = numpy_helper.to_array(tensor)
    head = f"{dtype_name(tensor.data_type)}{list(tensor.dims)}"
    if tensor.data_type == TensorProto.STRING or array.size <= SHOWN_VALUES:
        return f"{head} of {array.tolist()!r}"
    return f"{head} {digest(np.ascontiguousarray(array).tobytes())}"


def attributes_of(node: NodeProto) -> tuple[tuple[Attribute, ...], tuple[str, ...]]:
    """Return a node's attributes, sorted by name, and the names of the outer values that its subgraphs read.

    The body of an ``If`` or ``Loop`` reads values around it by name. They are inputs of the node in all but syntax, so they
    are returned in the order of first use, and the text of the body holds only their numbers in that order.
    """
    captured: list[str] = []
    attributes = []
    for attribute in node.attribute:
        kind = str(AttributeProto.AttributeType.Name(attribute.type))
        value = onnx.helper.get_attribute_value(attribute)
        texts = [_value_text(item, captured) for item in (value if kind.endswith("S") else [value])]
        attributes.append(Attribute(attribute.name, kind, f"[{', '.join(texts)}]" if kind.endswith("S") else texts[0]))
    return tuple(sorted(attributes)), tuple(captured)


def _value_text(value: object, captured: list[str]) -> str:
    if isinstance(value, TensorProto):
        return tensor_text(value)
    if isinstance(value, GraphProto):
        return f"subgraph {digest(_subgraph_text(value, captured).encode())}"
    if isinstance(value, bytes):
        return repr(value.decode("utf-8", "backslashreplace"))
    if isinstance(value, (int, float, str)):
        return repr(value)
    assert isinstance(value, (onnx.SparseTensorProto, onnx.TypeProto)), value
    return digest(value.SerializeToString(deterministic=True))


def _subgraph_text(graph: GraphProto, captured: list[str]) -> str:
    """Return the text of a body with numbers in place of value names; the order of its nodes counts."""
    local: dict[str, str] = {}
    lines: list[str] = []

    def define(name: str) -> str:
        return local.setdefault(name, f"%{len(local)}")

    def read(name: str) -> str:
        if name == "" or name in local:
            return local.get(name, "-")
        if name not in captured:
            captured.append(name)
        return f"outer{captured.index(name)}"

    for value in graph.input:
        lines.append(f"in {define(value.name)} {digest(value.type.SerializeToString(deterministic=True))}")
    for tensor in graph.initializer:
        lines.append(f"constant {define(tensor.name)} {tensor_text(tensor)}")
    for node in graph.node:
        attributes, reads = attributes_of(node)
        inputs = [read(name) for name in (*node.input, *reads)]
        outputs = [define(name) if name else "-" for name in node.output]
        lines.append(f"{outputs} = {node.domain}:{node.op_type}{inputs} {attributes}")
    lines.append(f"out {[read(value.name) for value in graph.output]}")
    return "\n".join(lines)
