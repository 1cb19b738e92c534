"""Read an ONNX file: its model, and the graph in it that is compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
from onnx import ModelProto, external_data_helper

from tdfx.errors import ExportError, first_line
from tdfx.onnx_proof.graph import Graph, compared_by_value, read_graph

if TYPE_CHECKING:
    from pathlib import Path


def read_file(path: Path) -> tuple[ModelProto, Graph]:
    """Return the model in an ONNX file, and its graph; of tensors in other files, read only those compared by value.

    Raises:
        ExportError: There is no such file, or no valid graph in it.
    """
    if not path.is_file():
        raise ExportError(f"{str(path)!r} is not a file: give the path of an .onnx file, or pass the nn.Module itself.")
    try:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if external_data_helper.uses_external_data(tensor) and compared_by_value(tensor):
                external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
    except Exception as error:  # the errors of protobuf, onnx and the system have no other base class
        raise ExportError(f"{str(path)!r} cannot be read as ONNX: {error}. Export the model again.") from error
    if not model.ir_version or not model.graph.output:
        raise ExportError(f"{str(path)!r} holds no ONNX graph: no version or no outputs. Export the model again.")
    try:
        _check_texts(model)
        return model, read_graph(model)
    except ExportError:
        raise
    except Exception as error:  # the file may hold anything
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise ExportError(f"{str(path)!r} holds a damaged ONNX graph: {cause}. Export the model again.") from error


def _check_texts(model: ModelProto) -> None:
    """Raise ValueError for a name that is not UTF-8; protobuf returns such a name as bytes."""
    graph = model.graph
    texts: list[object] = [item.name for item in (*graph.initializer, *graph.input, *graph.output, *graph.node)]
    for node in graph.node:
        texts += [
            node.op_type,
            node.domain,
            *node.input,
            *node.output,
            *(attribute.name for attribute in node.attribute),
        ]
    for port in (*graph.input, *graph.output):
        texts += [size.dim_param for size in port.type.tensor_type.shape.dim]
    texts += [text for entry in model.metadata_props for text in (entry.key, entry.value)]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"the name {text!r} is not UTF-8")
