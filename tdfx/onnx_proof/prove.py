"""Prove that an ONNX file computes what a module does: its interface, and its numbers in ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tdfx.errors import ExportError, InputError
from tdfx.onnx_proof.arguments import Axes, Given, described, grown, names_of
from tdfx.onnx_proof.exporter import bare, read_file, run_module
from tdfx.onnx_proof.inputs import as_array, to_arrays
from tdfx.onnx_proof.running import default_tolerance, measure, run

if TYPE_CHECKING:
    from pathlib import Path

    from tdfx.onnx_proof.graph import Graph, Port


def prove(path: Path, module: nn.Module, given: Given, axes: Axes | None, tolerance: float | None) -> dict[str, Any]:
    """Return what an ``ExportReport`` says of the file.

    Raises:
        ExportError: if the file is not the module.

    """
    _, graph = read_file(path)
    _check_interface(graph, bare(module), given, axes)
    accepted = default_tolerance(graph) if tolerance is None else tolerance
    error = _error(path, graph, module, given)
    if axes:
        error = max(error, _error_of_grown(path, graph, module, grown(bare(module), given, axes)))
    if not error <= accepted:
        raise ExportError(
            f"The exported {type(module).__name__} computes something else in ONNX Runtime: its outputs differ by "
            f"{error:.1e} relative to the model's, and {accepted:.1e} is what rounding explains. Nothing was written. If "
            f"the model magnifies rounding errors, pass a larger tolerance."
        )
    return {
        "nodes": len(graph.nodes),
        "inputs": tuple(map(_shown, graph.inputs)),
        "outputs": tuple(map(_shown, graph.outputs)),
        "chains": len(graph.chains),
        "max_error": error,
        "tolerance": accepted,
    }


def _check_interface(graph: Graph, module: nn.Module, given: Given, axes: Axes | None) -> None:
    names = names_of(module, given)
    found = [port.name for port in graph.inputs]
    if names is not None and found != names:
        raise ExportError(
            f"The exported model takes {found}, and forward takes {names}. Pass only inputs that it uses."
        )
    shapes = {port.name: port.shape for port in graph.inputs}
    for name, sizes in (axes or {}).items():
        shape = shapes[name] or ()
        fixed = [axis for axis in sizes if not isinstance(shape[axis], str)]
        if fixed:
            raise ExportError(
                f"Axis {fixed[0]} of {name!r} was to be dynamic, and the model fixes it at {shape[fixed[0]]}: "
                f"its forward computes with that size as a constant. Leave it out of dynamic_axes."
            )


def _error_of_grown(path: Path, graph: Graph, module: nn.Module, given: Given) -> float:
    try:
        return _error(path, graph, module, given)
    except InputError as error:
        raise ExportError(
            f"The model itself does not run with one more in each dynamic axis, {described(given)}: {error.__cause__}. "
            f"Leave axes that have one size only out of dynamic_axes."
        ) from error


def _error(path: Path, graph: Graph, module: nn.Module, given: Given) -> float:
    """Return the largest relative error of the file's outputs."""
    expected = [as_array(one) for one in run_module(module, given)]
    arrays = to_arrays(given, graph.inputs)
    try:
        outputs = run(path, arrays)
    except Exception as error:  # onnxruntime's errors have no common base class but this one
        reason = str(error).replace(str(path), path.name)
        raise ExportError(
            f"ONNX Runtime cannot run the exported {type(module).__name__} on {described(given)}: {reason}"
        ) from error
    if len(outputs) != len(expected):
        raise ExportError(f"The exported model gives {len(outputs)} tensors, and the model {len(expected)}.")
    numbers = measure(outputs, expected, [port.name for port in graph.outputs])
    if numbers.problem is not None:
        problem = numbers.problem.replace("in the model", "in the file").replace("the reference", "the model")
        raise ExportError(f"The exported {type(module).__name__} cannot be proved: {problem}.")
    return numbers.max_error


def _shown(port: Port) -> str:
    sizes = "unknown" if port.shape is None else ", ".join(map(str, port.shape))
    return f"{port.name}: {port.dtype}[{sizes}]"
