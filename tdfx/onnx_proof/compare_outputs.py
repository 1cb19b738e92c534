"""Run two ONNX files on the same inputs with ONNX Runtime on the CPU, and measure how much the outputs differ.

Where they do, the first stored tensor that differs explains it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnx import ModelProto, TensorProto, external_data_helper, numpy_helper

from tdfx.onnx_proof.compare_interface import type_difference
from tdfx.onnx_proof.graph_inputs import Array, random_inputs, to_arrays
from tdfx.onnx_proof.module_inputs import input_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tdfx.onnx_proof.graph import Graph, Port
    from tdfx.onnx_proof.module_inputs import ExampleInputs

EPSILONS = {"double": 2.0**-52, "float": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Distance from 1 to the next number, for each floating-point type of a stored tensor, input or output."""

HEADROOM = 16.0
"""What one node may add to the relative error, in units of ``eps``; see ``default_tolerance``."""

_FATAL = 4
"""ONNX Runtime's log level that writes nothing to stderr; failures are raised in any case."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """How much the outputs of two graphs differ."""

    max_error: float
    """Largest ``max|a - b| / max|b|`` over the outputs; nan if the outputs cannot be compared."""
    problem: str | None = None
    """Why they cannot be compared; None if they can."""


def default_tolerance(graph: Graph) -> float:
    """Return ``16 * eps * sqrt(depth)``, the largest relative error that rounding alone explains.

    Two graphs that are the same may hold weights that were rounded once more, each by at most eps/2, and may add up
    products in another order. A sum of n products whose roundings are independent is off by about ``eps/2 * sqrt(n/b)``
    relative to its own size, where b is the number of partial sums that a kernel keeps (Higham and Mary, *A New Approach to
    Probabilistic Rounding Error Analysis*, SIAM J. Sci. Comput. 2019). With n up to some thousands, as in real layers, and
    b of 16 and more, that is below 8 eps, and for both sides together below 12. The largest error is measured relative to
    the largest output, which gives a few times less than a typical error relative to a typical output. So a node adds at
    most about 16 eps. The errors of nodes are independent, therefore their squares add up: along the longest path of
    ``depth`` nodes to ``sqrt(depth)`` times the error of one. Nodes that magnify an error (a division by something small)
    are not covered; for a model that has them, pass a tolerance.

    ``eps`` is that of the coarsest floating-point type among stored tensors, inputs and outputs (float32 if none).
    """
    dtypes = [tensor.dtype for tensor in graph.initializers.values()]
    dtypes += [port.dtype for port in (*graph.inputs, *graph.outputs)]
    eps = max((EPSILONS[dtype] for dtype in dtypes if dtype in EPSILONS), default=EPSILONS["float"])
    return HEADROOM * eps * math.sqrt(max(1, graph.depth()))


def compare_numbers(paths: tuple[Path, Path], graphs: tuple[Graph, Graph], inputs: ExampleInputs | None) -> Numbers:
    """Run both files on ``inputs``, or on random ones if None, and compare the outputs.

    Raises InputError if ``inputs`` do not fit the first graph.
    """
    model, reference = graphs
    for kind in ("input", "output"):
        conflict = _conflict(kind, getattr(model, f"{kind}s"), getattr(reference, f"{kind}s"))
        if conflict is not None:
            return Numbers(math.nan, conflict)
    arrays = random_inputs(model) if inputs is None else to_arrays(input_tensors(inputs), model.inputs)
    results = []
    for role, path in zip(("model", "reference"), paths, strict=True):
        try:
            results.append(run(path, arrays))
        except Exception as error:  # the errors of onnxruntime have no other common base class
            reason = str(error).replace(str(path), path.name)
            return Numbers(math.nan, f"ONNX Runtime cannot run the {role}: {reason}")
    if results[0] and not any(np.size(output) for output in results[0]):
        return Numbers(math.nan, "the outputs are empty, so nothing was compared: give inputs with at least one sample")
    return measure(results[0], results[1], [port.name for port in model.outputs])


def _conflict(kind: str, ports: Sequence[Port], others: Sequence[Port]) -> str | None:
    """Return a difference for which no values fit both sides; a dynamic axis fits any size."""
    start = 0
    if len(ports) == len(others):
        pairs = enumerate(zip(ports, others, strict=True))
        start = next((place for place, pair in pairs if not _fit_together(*pair)), len(ports))
    difference = type_difference(kind, ports[start:], others[start:], start)
    return None if difference is None else difference[0]


def _fit_together(port: Port, other: Port) -> bool:
    """Return True if some tensor has the dtype and shape of both."""
    if port.dtype != other.dtype or port.shape is None or other.shape is None:
        return port.dtype == other.dtype
    return len(port.shape) == len(other.shape) and all(
        size == other_size or str in {type(size), type(other_size)}
        for size, other_size in zip(port.shape, other.shape, strict=True)
    )


def run(path: Path, inputs: Sequence[Array]) -> list[Array]:
    """Return the outputs of an ONNX file, in order; computed as written, without graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    # Prepacking keeps each weight twice: as in the file, and reordered for faster later runs. There is only one run.
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {port.name: array for port, array in zip(session.get_inputs(), inputs, strict=True)}
    outputs: list[Array] = session.run(None, feed)
    return outputs


def measure(outputs: Sequence[Array], others: Sequence[Array], names: Sequence[str]) -> Numbers:
    """Return the largest relative error over all outputs.

    >>> measure([np.array([1.0, 2.5])], [np.array([1.0, 2.0])], ["y"])
    Numbers(max_error=0.25, problem=None)
    >>> measure([np.array([1.0])], [np.array([np.nan])], ["y"]).problem
    "output 'y' holds NaN: 0 in the model, 1 in the reference"
    """
    largest = 0.0
    for name, output, other in zip(names, outputs, others, strict=True):
        problem = _problem(output, other)
        if problem is not None:
            return Numbers(math.nan, f"output {name!r} {problem}")
        largest = max(largest, _relative_error(output, other))
    return Numbers(largest)


def _problem(output: Array, other: Array) -> str | None:
    """Return why two outputs cannot be compared, or None."""
    if not isinstance(output, np.ndarray) or not isinstance(other, np.ndarray) or output.dtype == object:
        return f"is a {type(output).__name__}, not an array of numbers"
    if output.shape != other.shape or output.dtype != other.dtype:
        return f"is {output.dtype}{list(output.shape)}, but {other.dtype}{list(other.shape)} in the reference"
    nans, other_nans = (int(np.isnan(_as_float(array)).sum()) for array in (output, other))
    return f"holds NaN: {nans} in the model, {other_nans} in the reference" if nans or other_nans else None


def _relative_error(output: Array, other: Array) -> float:
    """Return ``max|a - b| / max|b|``; any difference between integers or flags is an error of at least 1."""
    differs = output != other
    if not differs.any():
        return 0.0
    difference = float(np.abs(_as_float(output)[differs] - _as_float(other)[differs]).max())
    if output.dtype.kind in "iub":
        return max(1.0, difference)
    scale = float(np.abs(_as_float(other)).max(where=np.isfinite(_as_float(other)), initial=0.0))
    return difference / scale if scale > 0.0 else math.inf


def _as_float(array: Array) -> npt.NDArray[Any]:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def weight_difference(models: tuple[ModelProto, ModelProto], paths: tuple[Path, Path], graph: Graph) -> str | None:
    """Describe the first tensor that the model's graph reads and that differs from the reference's.

    Only two tensors are in memory at once.
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


def _values(tensor: TensorProto, path: Path) -> npt.NDArray[Any]:
    if external_data_helper.uses_external_data(tensor):
        tensor = TensorProto.FromString(tensor.SerializeToString())  # a copy, since loading stores the values in it
        external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
    return _as_float(numpy_helper.to_array(tensor))
