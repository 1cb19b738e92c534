"""Read an ONNX model into a ``Graph``, which holds only what is compared.

It leaves out documentation, metadata such as stack traces, shapes of intermediate values, and the values of floating-point
initializers, which are compared by running the graph. It keeps the names of nodes for messages only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, inliner

from tdfx.errors import ExportError
from tdfx.onnx_proof.alias_groups import Groups, aliases_in
from tdfx.onnx_proof.factor_chains import Chain, chains_in
from tdfx.onnx_proof.value_text import Attribute, attributes_of, dtype_name, tensor_text

if TYPE_CHECKING:
    from collections.abc import Iterable

Source = tuple[str, str | int, int]
"""Where a value comes from: ("input", position, 0), ("initializer", name, 0), ("constant", value, 0) or
("node", index, output slot)."""

_NUMBERED = re.compile(r"(^|[._])(lifted_tensor_\d+|_tensor_constant\d+)$")
"""Names of tensors that a ``forward`` creates: torch.export and torch.fx number them, so their values identify them."""

_FLOATS = {number for name, number in TensorProto.DataType.items() if re.search("FLOAT|DOUBLE|COMPLEX", name)}


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of the whole graph."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None
    """Sizes, with ``?0``, ``?1`` ... for dynamic axes, numbered by first appearance; None if unknown."""
    names: tuple[str, ...] = field(default=(), compare=False)
    """The file's own name of each dynamic axis, "" for other axes; names do not count in a comparison."""

    def with_names(self) -> str:
        """Return the text with the file's own names of dynamic axes, as far as it has any."""
        sizes = [name or size for name, size in zip(self.names, self.shape or (), strict=True)]
        return str(replace(self, shape=tuple(sizes))) if self.shape else str(self)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{'unknown' if self.shape is None else ', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Initializer:
    """A tensor stored in the graph: a parameter, a buffer, or a constant."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    value: str | None
    """The value as text; None for floating-point parameters and for tensors that no node reads."""
    anonymous: bool
    """True if the exporter invented the name."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation."""

    name: str
    op: str
    """Operator, after its domain unless that is ONNX's own."""
    attributes: tuple[Attribute, ...]
    inputs: tuple[str, ...]
    """Value names by argument position, "" for an argument left out; then the values that subgraphs capture."""
    outputs: tuple[str, ...]

    @property
    def label(self) -> tuple[object, ...]:
        """What must be equal besides the wiring: operator, attributes, and which inputs and outputs are used."""
        return (self.op, self.attributes, tuple(map(bool, self.inputs)), tuple(map(bool, self.outputs)))

    def attribute(self, name: str, default: str) -> str:
        """Return the text of an attribute, or a default."""
        return next((attribute.text for attribute in self.attributes if attribute.name == name), default)

    def __str__(self) -> str:
        return f"{self.name!r} ({self.op})"


@dataclass(frozen=True, slots=True)
class Graph:
    """An ONNX graph, with its nodes in topological order."""

    opsets: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    initializers: dict[str, Initializer]
    nodes: tuple[Node, ...]
    sources: dict[str, Source]
    """Value name -> where the value comes from."""
    chains: tuple[Chain, ...] = ()
    """The factorized sites that the file lists."""
    aliases: Groups = ()
    """The names of tensors that the model holds more than once, as the file lists them."""

    def producer(self, name: str) -> int | None:
        """Return the index of the node that computes a value; None for inputs, stored tensors and ``""``."""
        kind, key, _ = self.sources[name] if name else ("none", "", 0)
        return int(key) if kind == "node" else None

    def depth(self) -> int:
        """Return the number of nodes on the longest path."""
        depths: dict[str, int] = {}
        for node in self.nodes:
            depth = 1 + max((depths.get(name, 0) for name in node.inputs), default=0)
            depths.update(dict.fromkeys(node.outputs, depth))
        return max(depths.values(), default=0)


def read_graph(model: ModelProto) -> Graph:
    """Return the graph of ``model``, with model-local functions inlined; raise ExportError if it is not valid."""
    chains, aliases = chains_in(model), aliases_in(model)
    if model.functions:
        model = inliner.inline_local_functions(model)
    nodes = tuple(_read_node(node, index) for index, node in enumerate(model.graph.node))
    read = {name for node in nodes for name in node.inputs}
    initializers = {tensor.name: _read_initializer(tensor, read) for tensor in model.graph.initializer}
    symbols: dict[str, str] = {}
    inputs = tuple(_read_port(value, symbols) for value in model.graph.input if value.name not in initializers)
    outputs = tuple(_read_port(value, symbols) for value in model.graph.output)
    opsets = {_domain(opset.domain): opset.version for opset in model.opset_import}
    sources = sources_of(inputs, initializers, nodes, outputs)
    return Graph(opsets, inputs, outputs, initializers, nodes, sources, chains, aliases)


def compared_by_value(tensor: TensorProto) -> bool:
    """Return True if an initializer's value is part of the structure: sizes, axes, indices, constants in ``forward``."""
    return tensor.data_type not in _FLOATS or _NUMBERED.search(tensor.name) is not None


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _read_node(node: NodeProto, index: int) -> Node:
    attributes, captured = attributes_of(node)
    domain = _domain(node.domain)
    return Node(
        name=node.name or f"#{index}",
        op=f"{domain}::{node.op_type}" if domain else node.op_type,
        attributes=attributes,
        inputs=(*_without_tail(node.input), *captured),
        outputs=_without_tail(node.output),
    )


def _without_tail(names: Iterable[str]) -> tuple[str, ...]:
    """Drop empty names at the end: an optional argument may be left out or given an empty name."""
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return tuple(kept)


def _read_initializer(tensor: TensorProto, read: set[str]) -> Initializer:
    value = tensor_text(tensor) if tensor.name in read and compared_by_value(tensor) else None
    anonymous = _NUMBERED.search(tensor.name) is not None
    return Initializer(tensor.name, dtype_name(tensor.data_type), tuple(tensor.dims), value, anonymous)


def _read_port(value: ValueInfoProto, symbols: dict[str, str]) -> Port:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return Port(value.name, str(kind), None)
    tensor = value.type.tensor_type
    shape = tuple(_read_size(size, symbols) for size in tensor.shape.dim) if tensor.HasField("shape") else None
    names = () if shape is None else tuple(size.dim_param for size in tensor.shape.dim)
    return Port(value.name, dtype_name(tensor.elem_type), shape, names)


def _read_size(size: onnx.TensorShapeProto.Dimension, symbols: dict[str, str]) -> int | str:
    if size.HasField("dim_value"):
        return size.dim_value
    return symbols.setdefault(size.dim_param, f"?{len(symbols)}") if size.dim_param else "?"


def sources_of(
    inputs: Iterable[Port], initializers: dict[str, Initializer], nodes: Iterable[Node], outputs: Iterable[Port]
) -> dict[str, Source]:
    """Return where each value comes from, by name; raise ExportError if no earlier node makes it."""
    sources: dict[str, Source] = {port.name: ("input", position, 0) for position, port in enumerate(inputs)}
    for name, tensor in initializers.items():
        sources[name] = ("constant", tensor.value or "", 0) if tensor.anonymous else ("initializer", name, 0)
    for index, node in enumerate(nodes):
        _check_sources(node.inputs, sources, f"node {node}")
        sources.update({name: ("node", index, slot) for slot, name in enumerate(node.outputs) if name})
    names = [port.name for port in outputs]
    _check_sources(names, sources, "the graph's list of outputs")
    if "" in names:
        raise ExportError(
            f"output {names.index('')} of the graph has no name, so no node can make it. Export the model again."
        )
    return sources


def _check_sources(names: Iterable[str], sources: dict[str, Source], where: str) -> None:
    unknown = [name for name in names if name and name not in sources]
    if unknown:
        raise ExportError(
            f"{where} reads {unknown[0]!r}, which no input, initializer or earlier node makes: this is not a valid "
            f"ONNX graph. onnx.checker.check_model says more."
        )
