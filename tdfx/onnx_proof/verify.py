"""Proof by ONNX that two models are the same: one structure, one interface, one set of numbers."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tdfx.errors import InputError, ModelError
from tdfx.onnx_proof.report import VerifyReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tdfx.onnx_proof.arguments import Axes, Given

Model = nn.Module | str | Path
"""A module, or the path of an ONNX file."""


def verify(
    model: Model,
    reference: Model,
    example_inputs: Sequence[Tensor] | Tensor | Mapping[str, Tensor] | None = None,
    *,
    tolerance: float | None = None,
    dynamic_axes: Axes | None = None,
) -> VerifyReport:
    """Answer by ONNX whether two models have the same structure, the same interface, and compute the same numbers.

    Modules are exported in eval mode, and left as they were. The structure is the same if there is an isomorphism that
    keeps operators, attributes, argument order, constants, and the names, dtypes and shapes of weights. The interface is
    the names, dtypes, shapes and dynamic axes of inputs and outputs. The values of weights are compared by running both
    graphs in ONNX Runtime on the same inputs.

    A model that ``rewrite`` returned may stand on one side, or a file that ``export`` made of it. Its chains of factors are
    then contracted to one node each, by what the rewrite recorded, and so are the layers that they stand for; the report
    lists them. Such a node says how its data is strided, padded and grouped, as read from the graph of either side.
    Outputs are matched by position there. Below full rank the numbers need not agree: the report says by how much they do.

    Args:
        model: a module, or the path of an ONNX file.
        reference: what it should be equal to, likewise.
        example_inputs: inputs of both models: a tensor, a tuple of positional arguments, or a mapping by argument name. Two
            files can do without: then the inputs are random, the same each time, with 2 for dynamic axes.
        tolerance: largest relative error to accept, at least 0. By default ``16 * eps * sqrt(depth)``, with the eps of
            the coarsest floating-point type in the model's graph and the number of nodes on its longest path.
        dynamic_axes: for modules, axes to export as dynamic: argument -> axis -> name, as ``{"x": {0: "batch"}}``.

    Raises:
        InputError: if a module comes without ``example_inputs``, or they do not fit.
        ModelError: if ``model`` or ``reference`` is neither a module nor a path.
        ExportError: if a module cannot be exported, or a file cannot be read.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> report = verify(layer, layer, example_inputs=(torch.ones(1, 3),))
    >>> report.ok, report.nodes, report.max_error
    (True, 1, 0.0)

    """
    _check_models(model, reference)
    given = _check_inputs(example_inputs, needed=isinstance(model, nn.Module) or isinstance(reference, nn.Module))
    check_tolerance(tolerance)
    with tempfile.TemporaryDirectory(prefix="tdfx-verify-") as folder:
        path = _to_file(model, given, dynamic_axes, Path(folder, "model.onnx"))
        # One module on both sides need not be exported twice.
        same = path if reference is model else None
        other_path = same or _to_file(reference, given, dynamic_axes, Path(folder, "reference.onnx"))
        return _compare((path, other_path), given, tolerance)


def check_tolerance(tolerance: float | None) -> None:
    """Raise InputError unless this is a relative error, or None."""
    if tolerance is not None and not 0.0 <= tolerance < math.inf:
        raise InputError(f"tolerance={tolerance!r} is not a relative error: pass a number such as 1e-5, or None.")


def _check_models(model: object, reference: object) -> None:
    for role, one in (("model", model), ("reference", reference)):
        if not isinstance(one, (nn.Module, str, Path)):
            raise ModelError(
                f"{role} is a {type(one).__name__}: verify takes an nn.Module or the path of an .onnx file."
            )


def _check_inputs(given: object, needed: bool) -> Given | None:
    from tdfx.onnx_proof.arguments import check_given

    if given is None:
        if needed:
            raise InputError(
                "example_inputs is missing: a module is exported by running it on example inputs. "
                "Pass example_inputs=(x,), with tensors of the shape and dtype that the model takes; on the command line, "
                "--input with a shape."
            )
        return None
    return check_given(given)


def _to_file(model: Model, inputs: Given | None, axes: Axes | None, path: Path) -> Path:
    """Return the ONNX file of ``model``: its own, or ``path`` after an export."""
    if not isinstance(model, nn.Module):
        return Path(model)
    from tdfx.onnx_proof.exporter import Settings, export_module

    assert inputs is not None
    export_module(model, inputs, path, Settings(dynamic_axes=axes))
    return path


def _compare(paths: tuple[Path, Path], inputs: Given | None, tolerance: float | None) -> VerifyReport:
    from tdfx.onnx_proof.compare import compare_factorized
    from tdfx.onnx_proof.exporter import read_file
    from tdfx.onnx_proof.place import picture
    from tdfx.onnx_proof.running import compare_numbers, default_tolerance
    from tdfx.onnx_proof.weights import weight_difference

    start = time.perf_counter()
    (proto, graph), (other_proto, other) = (read_file(path) for path in paths)
    proof = compare_factorized(graph, other)
    found = proof.comparison
    numbers = compare_numbers(paths, (graph, other), inputs)
    accepted = default_tolerance(graph) if tolerance is None else tolerance
    apart = numbers.problem is None and not numbers.max_error <= accepted
    return VerifyReport(
        structure=None if found.structure is None else found.structure.text,
        interface=None if found.interface is None else found.interface.text,
        place=None if found.first is None else picture(found.first, *proof.graphs),
        max_error=numbers.max_error,
        tolerance=accepted,
        problem=numbers.problem,
        weight=weight_difference((proto, other_proto), paths, graph) if apart and not proof.chains else None,
        inputs="random" if inputs is None else "given",
        nodes=len(graph.nodes),
        contracted=proof.described,
        approximate=sum(not one.exact for one in proof.chains),
        settled_by=found.settled_by,
        seconds=time.perf_counter() - start,
    )
