"""The first stored tensor whose values differ between two files, for where their outputs do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, TensorProto, external_data_helper, numpy_helper

if TYPE_CHECKING:
    from pathlib import Path

    from tdfx.onnx_proof.graph import Graph


def weight_difference(models: tuple[ModelProto, ModelProto], paths: tuple[Path, Path], graph: Graph) -> str | None:
    """Name the first tensor that is not the same in both files and is read in ``graph``; two are in memory at once."""
    read = {name for node in graph.nodes for name in node.inputs}
    others = {one.name: one for one in models[1].graph.initializer}
    for tensor in models[0].graph.initializer:
        other = others.get(tensor.name)
        if tensor.name not in read or other is None or other.dims != tensor.dims:
            continue
        one, another = _values(tensor, paths[0]), _values(other, paths[1])
        apart = float(np.abs(one - another).max(initial=0.0))
        if apart != 0.0:  # NaN too
            scale = float(np.abs(another).max(initial=0.0)) or 1.0
            count = int((one != another).sum())
            return (
                f"the first stored tensor that differs is {tensor.name!r}: {count} of its {one.size} values, by up to "
                f"{apart / scale:.1e} of the largest"
            )
    return None


def _values(tensor: TensorProto, path: Path) -> Any:
    if external_data_helper.uses_external_data(tensor):
        tensor = TensorProto.FromString(tensor.SerializeToString())  # loading changes it, and would keep all in memory
        external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
    array = numpy_helper.to_array(tensor)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
