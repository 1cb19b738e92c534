"""Check that an exported ONNX file has the inputs of its module and computes the same numbers in ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tdfx.errors import ExportError, InputError
from tdfx.onnx_proof.compare_outputs import default_tolerance, measure, run
from tdfx.onnx_proof.graph_inputs import as_array, to_arrays
from tdfx.onnx_proof.module_inputs import Axes, ExampleInputs, describe_inputs, graph_names, input_tensors, lengthen
from tdfx.onnx_proof.onnx_file import read_file
from tdfx.onnx_proof.torch_to_onnx import run_module, without_wrappers

if TYPE_CHECKING:
    from pathlib import Path

    from tdfx.onnx_proof.graph import Graph


def check_export(
    path: Path, module: nn.Module, inputs: ExampleInputs, axes: Axes | None, tolerance: float | None
) -> dict[str, Any]:
    """Return the fields of an ``ExportReport`` about the file, or raise ExportError if it computes something else."""
    _, graph = read_file(path)
    inner = without_wrappers(module)
    _check_interface(graph, inner, inputs, axes)
    accepted = default_tolerance(graph) if tolerance is None else tolerance
    error = _relative_error(path, graph, module, inputs)
    if axes:
        longer = lengthen(inner, inputs, axes)
        try:
            error = max(error, _relative_error(path, graph, module, longer))
        except InputError as refusal:
            raise ExportError(
                f"The model itself does not run with one more in each dynamic axis, {describe_inputs(longer)}: "
                f"{refusal.__cause__}. Leave axes that have one size only out of dynamic_axes."
            ) from refusal
    if not error <= accepted:
        raise ExportError(
            f"The exported {type(module).__name__} computes something else in ONNX Runtime: its outputs differ by "
            f"{error:.1e} relative to the model's, and rounding explains {accepted:.1e}. Nothing was written. If the model "
            f"magnifies rounding errors, pass a larger tolerance."
        )
    return {
        "nodes": len(graph.nodes),
        "inputs": tuple(port.with_names() for port in graph.inputs),
        "outputs": tuple(port.with_names() for port in graph.outputs),
        "chains": len(graph.chains),
        "max_error": error,
        "tolerance": accepted,
    }


def _check_interface(graph: Graph, module: nn.Module, inputs: ExampleInputs, axes: Axes | None) -> None:
    """Raise ExportError unless the graph's inputs have the names of ``forward``'s arguments and the dynamic axes."""
    names = graph_names(module, inputs)
    present = [port.name for port in graph.inputs]
    if names is not None and present != names:
        raise ExportError(
            f"The exported model takes {present}, and forward takes {names}. Pass only inputs that it uses."
        )
    shapes = {port.name: port.shape for port in graph.inputs}
    for name, sizes in (axes or {}).items():
        shape = shapes[name] or ()
        fixed = [axis for axis in sizes if not isinstance(shape[axis], str)]
        if fixed:
            raise ExportError(
                f"Axis {fixed[0]} of {name!r} should be dynamic, but the model fixes it at {shape[fixed[0]]}: its forward "
                f"computes with that size as a constant. Leave it out of dynamic_axes."
            )


def _relative_error(path: Path, graph: Graph, module: nn.Module, inputs: ExampleInputs) -> float:
    expected = [as_array(tensor) for tensor in run_module(module, inputs)]
    arrays = to_arrays(input_tensors(inputs), graph.inputs)
    try:
        outputs = run(path, arrays)
    except Exception as error:  # the errors of onnxruntime have no other common base class
        reason = str(error).replace(str(path), "the file")
        raise ExportError(
            f"ONNX Runtime cannot run the exported {type(module).__name__} on {describe_inputs(inputs)}: {reason}"
        ) from error
    if len(outputs) != len(expected):
        raise ExportError(f"The exported model gives {len(outputs)} tensors, and the model {len(expected)}.")
    numbers = measure(outputs, expected, [port.name for port in graph.outputs])
    if numbers.problem is not None:
        problem = numbers.problem.replace("in the model", "in the file").replace("the reference", "the model")
        raise ExportError(f"The exported {type(module).__name__} cannot be proved: {problem}.")
    return numbers.max_error
