"""Prove by ONNX that two models are the same: one structure, one interface, the same numbers."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tdfx.errors import InputError, ModelError
from tdfx.onnx_proof.report import VerifyReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tdfx.onnx_proof.module_inputs import Axes, ExampleInputs

Model = nn.Module | str | Path
"""A module, or the path of an ONNX file."""


def verify(
    model: Model,
    reference: Model,
    example_inputs: Sequence[Any] | Tensor | Mapping[str, Any] | None = None,
    *,
    tolerance: float | None = None,
    dynamic_axes: Axes | None = None,
) -> VerifyReport:
    """Report by ONNX whether two models have the same structure and interface, and compute the same numbers.

    Modules are exported in eval mode, and left as they were. The structure is the same if there is an isomorphism that
    keeps operators, attributes, argument order, constants, and the names, dtypes and shapes of weights. The interface is
    the names, dtypes, shapes and dynamic axes of inputs and outputs. The values of weights are compared by running both
    graphs in ONNX Runtime on the same inputs.

    Either side may be a model that ``rewrite`` returned, or a file that ``export`` made of it. Its chains of factors are
    then contracted to one node each, by the names that the rewrite recorded, and so are the dense layers that they replace;
    the report lists them. A contracted node states stride, padding and groups as read from the graph of its own side.
    Outputs are then matched by position. Below full rank the numbers need not agree: the report gives the error.

    Args:
        model: a module, or the path of an ONNX file.
        reference: what the model should be equal to, likewise.
        example_inputs: inputs of both models: a tensor, a tuple of positional arguments, or a mapping by argument name, in
            which tensors may be in lists, dicts and dataclasses, beside numbers and None. For two files they may be left
            out: the inputs are then random, the same each time, with 2 for dynamic axes.
        tolerance: largest relative error to accept, at least 0. By default ``16 * eps * sqrt(depth)``, with the eps of
            the coarsest floating-point type in the model's graph and the number of nodes on its longest path.
        dynamic_axes: for modules, axes to export as dynamic: argument -> axis -> name, as ``{"x": {0: "batch"}}``. By
            default those of the file on the other side; ``{}`` for none.

    Raises:
        InputError: A module comes without ``example_inputs``, or they do not fit.
        ModelError: ``model`` or ``reference`` is neither a module nor a path.
        ExportError: A module cannot be exported, or a file cannot be read.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> report = verify(layer, layer, example_inputs=(torch.ones(1, 3),))
    >>> report.ok, report.nodes, report.max_error
    (True, 1, 0.0)

    """
    for role, value in (("model", model), ("reference", reference)):
        if not isinstance(value, (nn.Module, str, Path)):
            raise ModelError(
                f"{role} is a {type(value).__name__}: verify takes an nn.Module or the path of an .onnx file."
            )
    if example_inputs is None and (isinstance(model, nn.Module) or isinstance(reference, nn.Module)):
        raise InputError(
            "example_inputs is missing: a module is exported by running it on example inputs. Pass example_inputs=(x,), "
            "with tensors of the shape and dtype that the model takes; on the command line, --input with a shape."
        )
    from tdfx.onnx_proof.module_inputs import as_example_inputs

    inputs = None if example_inputs is None else as_example_inputs(example_inputs)
    check_tolerance(tolerance)
    if dynamic_axes is None and inputs is not None:
        dynamic_axes = _axes_of_file(model, reference, inputs)
    with tempfile.TemporaryDirectory(prefix="tdfx-verify-") as folder:
        path = _to_file(model, inputs, dynamic_axes, Path(folder, "model.onnx"))
        other = (
            path if reference is model else _to_file(reference, inputs, dynamic_axes, Path(folder, "reference.onnx"))
        )
        return _compare((path, other), inputs, tolerance)


def check_tolerance(tolerance: float | None) -> None:
    """Raise InputError unless this is a relative error, or None."""
    if tolerance is not None and not 0.0 <= tolerance < math.inf:
        raise InputError(f"tolerance={tolerance!r} is not a relative error: pass a number such as 1e-5, or None.")


def _axes_of_file(model: Model, reference: Model, inputs: ExampleInputs) -> Axes | None:
    """Return the dynamic axes of the inputs of a file, as far as the module beside it has them; None for two of a kind."""
    match model, reference:
        case (nn.Module() as module, str() | Path() as file) | (str() | Path() as file, nn.Module() as module):
            from tdfx.onnx_proof.module_inputs import known_axes
            from tdfx.onnx_proof.onnx_file import read_file
            from tdfx.onnx_proof.torch_to_onnx import without_wrappers

            _, graph = read_file(Path(file))
            return known_axes(without_wrappers(module), inputs, {port.name: port.names for port in graph.inputs})
    return None


def _to_file(model: Model, inputs: ExampleInputs | None, axes: Axes | None, path: Path) -> Path:
    """Return the ONNX file of ``model``: its own, or ``path`` after an export."""
    if not isinstance(model, nn.Module):
        return Path(model)
    from tdfx.onnx_proof.torch_to_onnx import export_module

    assert inputs is not None
    export_module(model, inputs, path, axes)
    return path


def _compare(paths: tuple[Path, Path], inputs: ExampleInputs | None, tolerance: float | None) -> VerifyReport:
    from tdfx.onnx_proof.compare_graphs import compare_factorized
    from tdfx.onnx_proof.compare_outputs import compare_numbers, default_tolerance, weight_difference
    from tdfx.onnx_proof.first_difference import draw_difference
    from tdfx.onnx_proof.onnx_file import read_file

    start = time.perf_counter()
    (proto, graph), (reference_proto, reference_graph) = (read_file(path) for path in paths)
    result = compare_factorized(graph, reference_graph)
    structure, interface, first = result.comparison.structure, result.comparison.interface, result.comparison.first
    numbers = compare_numbers(paths, (graph, reference_graph), inputs)
    accepted = default_tolerance(graph) if tolerance is None else tolerance
    explain = numbers.problem is None and not numbers.max_error <= accepted
    return VerifyReport(
        structure=None if structure is None else structure.text,
        interface=None if interface is None else interface.text,
        place=None if first is None else draw_difference(first, *result.graphs),
        max_error=numbers.max_error,
        tolerance=accepted,
        problem=numbers.problem,
        weight=weight_difference((proto, reference_proto), paths, graph) if explain else None,
        inputs="random" if inputs is None else "given",
        nodes=len(graph.nodes),
        contracted=result.contracted,
        approximate=sum(not chain.exact for chain in result.chains),
        settled_by=result.comparison.settled_by,
        seconds=time.perf_counter() - start,
    )
