"""Find the first stored tensor whose values differ between two files, to explain why their outputs differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, TensorProto, external_data_helper, numpy_helper

if TYPE_CHECKING:
    from pathlib import Path

    from tdfx.onnx_proof.graph import Graph


def weight_difference(models: tuple[ModelProto, ModelProto], paths: tuple[Path, Path], graph: Graph) -> str | None:
    """Describe the first tensor that ``graph`` reads and that differs; only two tensors are in memory at once.

    Args:
        models: The model and the reference.
        paths: Their files.
        graph: The model's graph.
    """
    read = {name for node in graph.nodes for name in node.inputs}
    others = {tensor.name: tensor for tensor in models[1].graph.initializer}
    for tensor in models[0].graph.initializer:
        other = others.get(tensor.name)
        if tensor.name not in read or other is None or other.dims != tensor.dims:
            continue
        values, other_values = _values(tensor, paths[0]), _values(other, paths[1])
        difference = float(np.abs(values - other_values).max(initial=0.0))
        if difference != 0.0:  # also if it is NaN
            scale = float(np.abs(other_values).max(initial=0.0)) or 1.0
            count = int((values != other_values).sum())
            return (
                f"the first stored tensor that differs is {tensor.name!r}: {count} of its {values.size} values, by up to "
                f"{difference / scale:.1e} of the largest"
            )
    return None


def _values(tensor: TensorProto, path: Path) -> Any:
    if external_data_helper.uses_external_data(tensor):
        tensor = TensorProto.FromString(tensor.SerializeToString())  # a copy, since loading stores the values in it
        external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
    array = numpy_helper.to_array(tensor)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
