"""Run two ONNX files on the same inputs with ONNX Runtime on the CPU, and measure how far the outputs are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from tdfx.onnx_proof.inputs import Array, random_inputs, to_arrays
from tdfx.onnx_proof.interface import port_difference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tdfx.onnx_proof.arguments import Given
    from tdfx.onnx_proof.graph import Graph, Port

EPSILONS = {"double": 2.0**-52, "float": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Distance from 1 to the next number, for each floating-point type of a stored tensor, input or output."""

HEADROOM = 16.0
"""What one node may add to the relative error, in units of ``eps``; see ``default_tolerance``."""

_FATAL = 4
"""ONNX Runtime's log level that writes nothing to stderr: what fails is raised."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """How far the outputs of two graphs are apart."""

    max_error: float
    """Largest ``max|a - b| / max|b|`` over the outputs; nan if the outputs cannot be compared."""
    problem: str | None = None
    """Why they cannot be compared, in words."""


def default_tolerance(graph: Graph) -> float:
    """Return ``16 * eps * sqrt(depth)``, the largest relative error that rounding alone explains.

    How it comes about: two graphs that are the same may hold weights that were rounded once more, each by at most eps/2,
    and add up their products in another order. A sum of n products whose roundings are independent is off by about
    ``eps/2 * sqrt(n/b)`` relative to its own size, where b is the number of partial sums that a kernel keeps (Higham and
    Mary, *A New Approach to Probabilistic Rounding Error Analysis*, SIAM J. Sci. Comput. 2019); with the n up to some
    thousands of real layers and b of 16 and more, that is below 8 eps, and both sides together below 12. The error is
    measured at its largest, relative to the largest output, which is a few times less than its typical size relative to a
    typical output. So a node adds at most 16 eps or so. The nodes' errors are independent, therefore they add up as their
    squares do: along the longest path of ``depth`` nodes to ``sqrt(depth)`` times one of them. Nodes that multiply an error
    (a division by something small) are not in this; where a model has them, pass a tolerance.

    ``eps`` is that of the coarsest floating-point type among stored tensors, inputs and outputs (float32 if none).
    """
    types = {one.dtype for one in graph.initializers.values()} | {one.dtype for one in (*graph.inputs, *graph.outputs)}
    eps = max((EPSILONS[one] for one in types if one in EPSILONS), default=EPSILONS["float"])
    return HEADROOM * eps * math.sqrt(max(1, graph.depth()))


def compare_numbers(paths: tuple[Path, Path], graphs: tuple[Graph, Graph], inputs: Given | None) -> Numbers:
    """Run both files on ``inputs``, or on random ones if None, and compare what comes out.

    Raises:
        InputError: if ``inputs`` do not fit the first graph.

    """
    model, reference = graphs
    apart = _conflict("input", model.inputs, reference.inputs) or _conflict("output", model.outputs, reference.outputs)
    if apart is not None:
        return Numbers(math.nan, apart)
    arrays = random_inputs(model) if inputs is None else to_arrays(inputs, model.inputs)
    results = []
    for role, path in zip(("model", "reference"), paths, strict=True):
        try:
            results.append(run(path, arrays))
        except Exception as error:  # onnxruntime's errors have no common base class but this one
            reason = str(error).replace(str(path), path.name)
            return Numbers(math.nan, f"ONNX Runtime cannot run the {role}: {reason}")
    return measure(results[0], results[1], [port.name for port in model.outputs])


def _conflict(kind: str, ports: Sequence[Port], others: Sequence[Port]) -> str | None:
    """Return a difference that no values fit both sides of: a dynamic axis goes with any size."""
    if len(ports) != len(others):
        return port_difference(kind, ports, others)
    for position, (one, other) in enumerate(zip(ports, others, strict=True)):
        sizes, other_sizes = one.shape or (), other.shape or ()
        known = one.shape is not None and other.shape is not None
        fixed = (
            pair for pair in zip(sizes, other_sizes, strict=False) if not any(isinstance(one, str) for one in pair)
        )
        clash = known and any(size != other_size for size, other_size in fixed)
        if one.dtype != other.dtype or clash or (known and len(sizes) != len(other_sizes)):
            return port_difference(kind, ports[position:], others[position:], position)
    return None


def run(path: Path, inputs: Sequence[Array]) -> list[Array]:
    """Return the outputs of an ONNX file, in order; computed as written, without graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    # Kernels would keep their weights twice: once as in the file, and once in an order that suits them for later runs.
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
    for name, one, other in zip(names, outputs, others, strict=True):
        problem = _problem(one, other)
        if problem is not None:
            return Numbers(math.nan, f"output {name!r} {problem}")
        largest = max(largest, _relative_error(one, other))
    return Numbers(largest)


def _problem(one: Array, other: Array) -> str | None:
    """Return why two outputs cannot be compared, or None."""
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray) or one.dtype == object:
        return f"is a {type(one).__name__} of something else than numbers"
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"is {one.dtype}{list(one.shape)}, but {other.dtype}{list(other.shape)} in the reference"
    missing = [int(np.isnan(_wide(some)).sum()) for some in (one, other)]
    return f"holds NaN: {missing[0]} in the model, {missing[1]} in the reference" if any(missing) else None


def _relative_error(one: Array, other: Array) -> float:
    """Return ``max|a - b| / max|b|``; a count or a flag that differs at all is an error of at least 1."""
    apart = one != other
    if not apart.any():
        return 0.0
    difference = float(np.abs(_wide(one)[apart] - _wide(other)[apart]).max())
    if one.dtype.kind in "iub":
        return max(1.0, difference)
    finite = np.abs(_wide(other))[np.isfinite(_wide(other))]
    scale = float(finite.max()) if finite.size else 0.0
    return difference / scale if scale > 0.0 else math.inf


def _wide(array: Array) -> npt.NDArray[np.generic]:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
