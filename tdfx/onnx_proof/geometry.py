"""What a chain of ONNX nodes does to the data besides multiplying by weights: as one node would say it.

Reading from the nodes, and not from what the rewrite recorded, makes it a proof: a stride that got lost in a factor
shows here. Convolutions one after the other compose per dimension (Araujo, Norris, Sim, *Computing Receptive Fields of
Convolutional Neural Networks*, Distill 2019): strides multiply, and the extents of kernels and paddings add up, each
times the strides before it (after it, where a convolution is transposed).
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tdfx.onnx_proof.values import Attribute

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tdfx.onnx_proof.graph import Graph, Node

CONVOLUTIONS = {"Conv", "ConvTranspose"}
PRODUCTS = {"Gemm", "MatMul"}


@dataclass(slots=True)
class _Composed:
    """The nodes so far, taken as one convolution; lists have one entry for each dimension of space."""

    taps: list[int]
    extent: list[int]
    strides: list[int]
    begin: list[int]
    end: list[int]
    output_padding: list[int]
    group: int = 0
    transposed: bool = False
    padding: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, dims: int) -> _Composed:
        zeros, ones = [0] * dims, [1] * dims
        return cls([*ones], [*zeros], [*ones], [*zeros], [*zeros], [*zeros])


def operator_of(nodes: Iterable[Node]) -> str:
    """Return the operator that nodes stand for: a convolution, a transposed one, or a linear map."""
    operators = {node.op for node in nodes}
    return next((one for one in ("ConvTranspose", "Conv") if one in operators), "Linear")


def is_turned(node: Node) -> bool:
    """Return True if a node transposes the weight that it multiplies by."""
    return any(one.name == "transB" and one.text == "1" for one in node.attributes)


def geometry_of(nodes: Sequence[Node], graph: Graph, turned: Sequence[bool] = ()) -> tuple[Attribute, ...]:
    """Return what the attributes of nodes come to, sorted by name.

    Args:
        nodes: Those that the data goes through, in its order.
        graph: Where they are from.
        turned: For linear maps, whether weights are transposed before they are multiplied by, each answer once.
    """
    composed: _Composed | None = None
    pads: list[tuple[str, list[int]]] = []
    for node in nodes:
        if node.op in CONVOLUTIONS:
            kernel = _kernel(node, graph)
            composed = composed or _Composed.of(len(kernel))
            _add(composed, node, kernel)
        elif node.op == "Pad":
            pads.append(_pad(node, graph))
    if composed is None:
        return _linear(nodes, turned)
    values = {
        "taps": composed.taps,
        "extent": composed.extent,
        "strides": composed.strides,
        "pads": [*composed.begin, *composed.end],
        "output_padding": composed.output_padding,
        "group": composed.group,
        "padding": [*composed.padding, *sorted({mode for mode, _ in pads})],
        "padded": [sum(sizes) for sizes in zip(*(sizes for _, sizes in pads), strict=False)],
    }
    return tuple(sorted(Attribute(name, "INTS", str(value)) for name, value in values.items()))


def _linear(nodes: Sequence[Node], turned: Sequence[bool]) -> tuple[Attribute, ...]:
    """Return the factors that a product of matrices has besides them, and how it reads the weights."""
    factor = {name: math.prod(_number(node, name) for node in nodes if node.op == "Gemm") for name in ("alpha", "beta")}
    first = [node.op for node in nodes if any(one.name == "transA" and one.text == "1" for one in node.attributes)]
    values = {**factor, "transposed_inputs": len(first), "transposed_weights": [*map(int, turned)]}
    return tuple(sorted(Attribute(name, "FLOATS", str(value)) for name, value in values.items()))


def _number(node: Node, name: str) -> float:
    return next((float(one.text) for one in node.attributes if one.name == name), 1.0)


def _kernel(node: Node, graph: Graph) -> list[int]:
    weight = graph.initializers.get(node.inputs[1])
    said = _attributes(node).get("kernel_shape")
    return list(weight.shape[2:]) if weight is not None else list(said or [])


def _attributes(node: Node) -> dict[str, list[int]]:
    """Return the attributes that hold whole numbers or lists of them."""
    texts = {one.name: one.text for one in node.attributes if one.kind in {"INT", "INTS"}}
    values = {name: ast.literal_eval(text) for name, text in texts.items()}
    return {name: value if isinstance(value, list) else [value] for name, value in values.items()}


def _add(composed: _Composed, node: Node, kernel: list[int]) -> None:
    """Put one more convolution behind those so far."""
    said, dims = _attributes(node), len(composed.taps)
    strides, dilations = said.get("strides", [1] * dims), said.get("dilations", [1] * dims)
    pads, output_padding = said.get("pads", [0] * 2 * dims), said.get("output_padding", [0] * dims)
    transposed = node.op == "ConvTranspose"
    for dim in range(dims):
        # Extents count in steps of the input, or of the output where the data grows.
        before, own = (strides[dim], 1) if transposed else (1, composed.strides[dim])
        composed.taps[dim] *= kernel[dim]
        composed.extent[dim] = composed.extent[dim] * before + dilations[dim] * (kernel[dim] - 1) * own
        composed.begin[dim] = composed.begin[dim] * before + pads[dim] * own
        composed.end[dim] = composed.end[dim] * before + pads[dims + dim] * own
        composed.output_padding[dim] = composed.output_padding[dim] * before + output_padding[dim]
        composed.strides[dim] *= strides[dim]
    composed.group = math.gcd(composed.group, said.get("group", [1])[0])
    composed.padding += [one.text for one in node.attributes if one.name == "auto_pad" and one.text != "'NOTSET'"]


def _pad(node: Node, graph: Graph) -> tuple[str, list[int]]:
    """Return the mode of a Pad and how much it adds, at the front of each dimension and then at the back."""
    mode = next((one.text for one in node.attributes if one.name == "mode"), "'constant'")
    maker = graph.maker(node.inputs[1])
    stored = graph.initializers.get(node.inputs[1])
    text = graph.nodes[maker].attributes[0].text if maker is not None and graph.nodes[maker].attributes else ""
    text = stored.value or "" if stored is not None else text
    sizes = re.search(r"\[[-\d, ]*\]$", text)
    return mode, ast.literal_eval(sizes.group()) if sizes else []
