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
from typing import TYPE_CHECKING, Any

from tdfx.onnx_proof.value_text import Attribute

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tdfx.onnx_proof.graph import Graph, Node

CONVOLUTIONS = {"Conv", "ConvTranspose"}
PRODUCTS = {"Einsum", "Gemm", "MatMul"}


def operator_of(nodes: Iterable[Node]) -> str:
    """Return the operator that nodes represent together: a convolution, a transposed one, or a linear map."""
    operators = {node.op for node in nodes}
    return next((op for op in ("ConvTranspose", "Conv") if op in operators), "Linear")


def transposes_weight(node: Node) -> bool:
    """Return True if a node transposes the weight that it multiplies by."""
    return node.attribute("transB", "0") == "1"


def geometry_of(nodes: Sequence[Node], graph: Graph, transposed: Sequence[bool] = ()) -> tuple[Attribute, ...]:
    """Return the attributes of the one node that would do what successive nodes of a graph do, sorted by name.

    For linear maps, ``transposed`` says whether weights are transposed before the product; each answer once.
    """
    convolutions = [node for node in nodes if node.op in CONVOLUTIONS]
    if convolutions:
        kind, values = "INTS", _compose(convolutions, graph)
        pads = [_padding(node, graph) for node in nodes if node.op == "Pad"]
        values["padding"] += sorted({mode for mode, _ in pads})
        values["padded"] = [sum(sizes) for sizes in zip(*(sizes for _, sizes in pads), strict=False)]
    else:
        kind = "FLOATS"
        values = {
            "alpha": math.prod(
                (float(node.attribute("alpha", "1.0")) for node in nodes if node.op == "Gemm"), start=1.0
            ),
            "beta": math.prod((float(node.attribute("beta", "1.0")) for node in nodes if node.op == "Gemm"), start=1.0),
            "transposed_inputs": sum(node.attribute("transA", "0") == "1" for node in nodes),
            "transposed_weights": [*map(int, transposed)],
        }
    return tuple(sorted(Attribute(name, kind, str(value)) for name, value in values.items()))


def _compose(convolutions: Sequence[Node], graph: Graph) -> dict[str, Any]:
    """Return successive convolutions as one; lists have an entry for each spatial dimension."""
    dims = len(_kernel_shape(convolutions[0], graph))
    taps, strides = [1] * dims, [1] * dims
    extent, begin, end, output_padding = ([0] * dims for _ in range(4))
    group, auto_pads = 0, []
    for node in convolutions:
        kernel, dilations = _kernel_shape(node, graph), _sizes(node, "dilations", [1] * dims)
        node_strides, pads = _sizes(node, "strides", [1] * dims), _sizes(node, "pads", [0] * 2 * dims)
        output_pads = _sizes(node, "output_padding", [0] * dims)
        for dim in range(dims):
            # Extents count steps of the input, or of the output for a transposed convolution.
            before, own = (node_strides[dim], 1) if node.op == "ConvTranspose" else (1, strides[dim])
            taps[dim] *= kernel[dim]
            extent[dim] = extent[dim] * before + dilations[dim] * (kernel[dim] - 1) * own
            begin[dim] = begin[dim] * before + pads[dim] * own
            end[dim] = end[dim] * before + pads[dims + dim] * own
            output_padding[dim] = output_padding[dim] * before + output_pads[dim]
            strides[dim] *= node_strides[dim]
        group = math.gcd(group, _sizes(node, "group", [1])[0])
        auto_pad = node.attribute("auto_pad", "'NOTSET'")
        auto_pads += [auto_pad] if auto_pad != "'NOTSET'" else []
    return {
        "taps": taps,
        "extent": extent,
        "strides": strides,
        "pads": begin + end,
        "output_padding": output_padding,
        "group": group,
        "padding": auto_pads,
    }


def _kernel_shape(node: Node, graph: Graph) -> list[int]:
    weight = graph.initializers.get(node.inputs[1])
    return list(weight.shape[2:]) if weight is not None else _sizes(node, "kernel_shape", [])


def _sizes(node: Node, name: str, default: list[int]) -> list[int]:
    """Return an attribute that holds a whole number or a list of them, as a list."""
    texts = [attribute.text for attribute in node.attributes if attribute.name == name and attribute.kind[:3] == "INT"]
    value = ast.literal_eval(texts[0]) if texts else default
    return value if isinstance(value, list) else [value]


def _padding(node: Node, graph: Graph) -> tuple[str, list[int]]:
    """Return the mode of a Pad and its sizes: at the front of each dimension, then at the back."""
    stored, producer = graph.initializers.get(node.inputs[1]), graph.producer(node.inputs[1])
    if stored is not None:
        text = stored.value or ""
    else:
        attributes = graph.nodes[producer].attributes if producer is not None else ()
        text = attributes[0].text if attributes else ""
    sizes = re.search(r"\[[-\d, ]*\]$", text)
    return node.attribute("mode", "'constant'"), ast.literal_eval(sizes.group()) if sizes else []
