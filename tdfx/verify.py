"""Proof by ONNX that two models are the same: one graph, one set of numbers."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tdfx.errors import InputError, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

Model = nn.Module | str | Path
"""A module, or the path of an ONNX file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What ``verify`` found; true if the model and the reference are the same."""

    difference: str | None
    """The first difference between the graphs, in topological order; None if they match."""
    max_error: float
    """Largest ``max|a - b| / max|b|`` over the outputs, on the CPU; nan if they cannot be compared."""
    tolerance: float
    """The largest ``max_error`` that counts as rounding; no unit."""
    problem: str | None
    """Why the outputs cannot be compared; None if they can."""
    nodes: int
    """Number of nodes in the model's graph, with functions inlined."""
    settled_by: str
    """The stage that decided on the graphs: "interface", "walk" or "isomorphism"."""
    seconds: float
    """Time for comparing the graphs and running them, in s; the export is not in it."""

    @property
    def graphs_match(self) -> bool:
        """True if no difference was found; read from ``difference``, so it cannot disagree."""
        return self.difference is None

    @property
    def numbers_match(self) -> bool:
        """True if the outputs agree within the tolerance; NaN never agrees."""
        return self.problem is None and self.max_error <= self.tolerance

    @property
    def ok(self) -> bool:
        """True if graphs and numbers agree."""
        return self.graphs_match and self.numbers_match

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        graphs = f"same graph ({self.nodes} nodes)" if self.graphs_match else f"the graphs differ: {self.difference}"
        numbers = "same numbers" if self.numbers_match else "the numbers differ"
        numbers += f" (largest relative error {self.max_error:.1e}, tolerance {self.tolerance:.1e})"
        if self.problem is not None:
            numbers = f"the numbers cannot be compared: {self.problem}"
        return f"{'verified' if self.ok else 'NOT verified'}\n  {graphs}\n  {numbers}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON; an error that is no finite number becomes None."""
        return {
            "ok": self.ok,
            "graphs_match": self.graphs_match,
            "numbers_match": self.numbers_match,
            "difference": self.difference,
            "max_error": self.max_error if math.isfinite(self.max_error) else None,
            "tolerance": self.tolerance,
            "problem": self.problem,
            "nodes": self.nodes,
            "settled_by": self.settled_by,
            "seconds": self.seconds,
        }


def verify(
    model: Model,
    reference: Model,
    example_inputs: Sequence[Tensor] | Tensor | None = None,
    *,
    tolerance: float | None = None,
) -> VerifyReport:
    """Prove that two models have the same ONNX graph and compute the same numbers.

    Modules are exported in eval mode, and left as they were. The graphs match if there is an isomorphism that keeps
    operators, attributes, argument order, constants, and the names, dtypes and shapes of inputs, outputs and weights.
    The values of weights are compared by running both graphs in ONNX Runtime on the same inputs.

    Args:
        model: a module, or the path of an ONNX file.
        reference: what it should be equal to, likewise.
        example_inputs: inputs of both models. Two files can do without: then the inputs are random, the same each time,
            with 2 for dynamic axes.
        tolerance: largest relative error to accept, at least 0. By default ``16 * eps * sqrt(depth)``, with the eps of
            the coarsest floating-point type in the model's graph and the number of nodes on its longest path.

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
    inputs = _check_inputs(example_inputs, needed=isinstance(model, nn.Module) or isinstance(reference, nn.Module))
    if tolerance is not None and not 0.0 <= tolerance < math.inf:
        raise InputError(f"tolerance={tolerance!r} is not a relative error: pass a number such as 1e-5, or None.")
    with tempfile.TemporaryDirectory(prefix="tdfx-verify-") as folder:
        path = _to_file(model, inputs, Path(folder, "model.onnx"))
        other = _to_file(reference, inputs, Path(folder, "reference.onnx"))
        return _compare((path, other), inputs, tolerance)


def _check_models(model: object, reference: object) -> None:
    for role, one in (("model", model), ("reference", reference)):
        if not isinstance(one, (nn.Module, str, Path)):
            raise ModelError(
                f"{role} is a {type(one).__name__}: verify takes an nn.Module or the path of an .onnx file."
            )


def _check_inputs(given: object, needed: bool) -> tuple[Tensor, ...] | None:
    if given is None:
        if needed:
            raise InputError(
                "example_inputs is missing: a module is exported by running it on example inputs. "
                "Pass example_inputs=(x,), with tensors of the shape and dtype that the model takes."
            )
        return None
    inputs = (given,) if isinstance(given, Tensor) else given
    if not isinstance(inputs, (tuple, list)) or not all(isinstance(one, Tensor) for one in inputs):
        kinds = ", ".join(type(one).__name__ for one in inputs) if isinstance(inputs, (tuple, list)) else ""
        found = f"({kinds})" if kinds else f"a {type(given).__name__}"
        raise InputError(f"example_inputs must be a tuple of tensors, not {found}: pass example_inputs=(x,).")
    return tuple(inputs)


def _to_file(model: Model, inputs: tuple[Tensor, ...] | None, path: Path) -> Path:
    """Return the ONNX file of ``model``: its own, or ``path`` after an export."""
    if not isinstance(model, nn.Module):
        return Path(model)
    from tdfx.onnx_proof.export import export_module

    assert inputs is not None
    export_module(model, inputs, path)
    return path


def _compare(paths: tuple[Path, Path], inputs: tuple[Tensor, ...] | None, tolerance: float | None) -> VerifyReport:
    from tdfx.onnx_proof.compare import compare_graphs
    from tdfx.onnx_proof.export import load_file
    from tdfx.onnx_proof.graph import read_graph
    from tdfx.onnx_proof.running import compare_numbers, default_tolerance

    start = time.perf_counter()
    graph, other = (read_graph(load_file(path)) for path in paths)
    structure = compare_graphs(graph, other)
    numbers = compare_numbers(paths, (graph, other), inputs)
    return VerifyReport(
        difference=structure.difference,
        max_error=numbers.max_error,
        tolerance=default_tolerance(graph) if tolerance is None else tolerance,
        problem=numbers.problem,
        nodes=len(graph.nodes),
        settled_by=structure.settled_by,
        seconds=time.perf_counter() - start,
    )
