"""Compute the stride, kernel extent, padding and groups of a chain of ONNX nodes, as if it were one node.

They are read from the nodes and not from what the rewrite recorded, so that a factor with a wrong stride shows. Successive
convolutions compose in each dimension (Araujo, Norris, Sim, *Computing Receptive Fields of Convolutional Neural Networks*,
Distill 2019): strides multiply; extents of kernels and paddings add up, each times the strides before it (after it, for a
transposed convolution).
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tdfx.onnx_proof.value_text import Attribute

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tdfx.onnx_proof.graph import Graph, Node

CONVOLUTIONS = {"Conv", "ConvTranspose"}
PRODUCTS = {"Gemm", "MatMul"}


@dataclass(slots=True)
class _Composition:
    """Successive convolutions as one; lists have an entry for each spatial dimension."""

    taps: list[int]
    extent: list[int]
    strides: list[int]
    begin: list[int]
    end: list[int]
    output_padding: list[int]
    group: int = 0
    auto_pads: list[str] = field(default_factory=list)

    @classmethod
    def identity(cls, dims: int) -> _Composition:
        zeros, ones = [0] * dims, [1] * dims
        return cls([*ones], [*zeros], [*ones], [*zeros], [*zeros], [*zeros])


def operator_of(nodes: Iterable[Node]) -> str:
    """Return the operator that nodes represent together: a convolution, a transposed one, or a linear map."""
    operators = {node.op for node in nodes}
    return next((op for op in ("ConvTranspose", "Conv") if op in operators), "Linear")


def transposes_weight(node: Node) -> bool:
    """Return True if a node transposes the weight that it multiplies by."""
    return any(attribute.name == "transB" and attribute.text == "1" for attribute in node.attributes)


def geometry_of(nodes: Sequence[Node], graph: Graph, transposed: Sequence[bool] = ()) -> tuple[Attribute, ...]:
    """Return the attributes of the one node that would do what the nodes do, sorted by name.

    Args:
        nodes: The nodes that the data goes through, in their order.
        graph: The graph that they belong to.
        transposed: For linear maps, whether weights are transposed before the product; each answer once.
    """
    composition: _Composition | None = None
    pads: list[tuple[str, list[int]]] = []
    for node in nodes:
        if node.op in CONVOLUTIONS:
            kernel = _kernel_shape(node, graph)
            composition = composition or _Composition.identity(len(kernel))
            _compose(composition, node, kernel)
        elif node.op == "Pad":
            pads.append(_padding(node, graph))
    if composition is None:
        return _linear_attributes(nodes, transposed)
    values = {
        "taps": composition.taps,
        "extent": composition.extent,
        "strides": composition.strides,
        "pads": [*composition.begin, *composition.end],
        "output_padding": composition.output_padding,
        "group": composition.group,
        "padding": [*composition.auto_pads, *sorted({mode for mode, _ in pads})],
        "padded": [sum(sizes) for sizes in zip(*(sizes for _, sizes in pads), strict=False)],
    }
    return tuple(sorted(Attribute(name, "INTS", str(value)) for name, value in values.items()))


def _linear_attributes(nodes: Sequence[Node], transposed: Sequence[bool]) -> tuple[Attribute, ...]:
    """Return the scalar factors of matrix products, and which of their inputs and weights are transposed."""
    scalars = {
        name: math.prod(_number(node, name) for node in nodes if node.op == "Gemm") for name in ("alpha", "beta")
    }
    transposed_inputs = sum(
        any(attribute.name == "transA" and attribute.text == "1" for attribute in node.attributes) for node in nodes
    )
    values = {**scalars, "transposed_inputs": transposed_inputs, "transposed_weights": [*map(int, transposed)]}
    return tuple(sorted(Attribute(name, "FLOATS", str(value)) for name, value in values.items()))


def _number(node: Node, name: str) -> float:
    return next((float(attribute.text) for attribute in node.attributes if attribute.name == name), 1.0)


def _kernel_shape(node: Node, graph: Graph) -> list[int]:
    weight = graph.initializers.get(node.inputs[1])
    return list(weight.shape[2:]) if weight is not None else _whole_numbers(node).get("kernel_shape", [])


def _whole_numbers(node: Node) -> dict[str, list[int]]:
    """Return the attributes that hold whole numbers or lists of them, each as a list."""
    texts = {attribute.name: attribute.text for attribute in node.attributes if attribute.kind in {"INT", "INTS"}}
    values = {name: ast.literal_eval(text) for name, text in texts.items()}
    return {name: value if isinstance(value, list) else [value] for name, value in values.items()}


def _compose(composition: _Composition, node: Node, kernel: list[int]) -> None:
    """Append one more convolution to a composition."""
    attributes, dims = _whole_numbers(node), len(composition.taps)
    strides, dilations = attributes.get("strides", [1] * dims), attributes.get("dilations", [1] * dims)
    pads, output_padding = attributes.get("pads", [0] * 2 * dims), attributes.get("output_padding", [0] * dims)
    for dim in range(dims):
        # Extents count steps of the input, or of the output for a transposed convolution.
        before, own = (strides[dim], 1) if node.op == "ConvTranspose" else (1, composition.strides[dim])
        composition.taps[dim] *= kernel[dim]
        composition.extent[dim] = composition.extent[dim] * before + dilations[dim] * (kernel[dim] - 1) * own
        composition.begin[dim] = composition.begin[dim] * before + pads[dim] * own
        composition.end[dim] = composition.end[dim] * before + pads[dims + dim] * own
        composition.output_padding[dim] = composition.output_padding[dim] * before + output_padding[dim]
        composition.strides[dim] *= strides[dim]
    composition.group = math.gcd(composition.group, attributes.get("group", [1])[0])
    composition.auto_pads += [
        attribute.text for attribute in node.attributes if attribute.name == "auto_pad" and attribute.text != "'NOTSET'"
    ]


def _padding(node: Node, graph: Graph) -> tuple[str, list[int]]:
    """Return the mode of a Pad and its sizes: at the front of each dimension, then at the back."""
    mode = next((attribute.text for attribute in node.attributes if attribute.name == "mode"), "'constant'")
    stored, producer = graph.initializers.get(node.inputs[1]), graph.producer(node.inputs[1])
    if stored is not None:
        text = stored.value or ""
    else:
        attributes = graph.nodes[producer].attributes if producer is not None else ()
        text = attributes[0].text if attributes else ""
    sizes = re.search(r"\[[-\d, ]*\]$", text)
    return mode, ast.literal_eval(sizes.group()) if sizes else []
