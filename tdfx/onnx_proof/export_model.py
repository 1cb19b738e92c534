"""Export a model to ONNX for inference; the file appears only after a check that it computes what the model does."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tdfx.checkpoint.atomic import atomic_writer
from tdfx.errors import ExportError, InputError, ModelError
from tdfx.onnx_proof.report import ExportReport
from tdfx.onnx_proof.verify import check_tolerance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.onnx import ONNXProgram

    from tdfx.onnx_proof.module_inputs import Axes

SINGLE_FILE_BYTES = 2_000_000_000
"""Weights of up to this many bytes are stored in the .onnx file itself: its format, protobuf, ends at 2 GiB."""


def export(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Sequence[Any] | Tensor | Mapping[str, Any],
    dynamic_axes: Axes | None = None,
    output_names: Sequence[str] | None = None,
    optimize: bool = False,
    tolerance: float | None = None,
) -> ExportReport:
    """Write a model, factorized or not, to an ONNX file for inference, and prove that the file computes the same.

    The file is run in ONNX Runtime on the example inputs, and again with one more in each dynamic axis, and must give the
    model's outputs in eval mode; its inputs must have the names of ``forward``'s arguments and the dynamic axes. Only then
    does it replace what was at ``path``. Weights of more than 2 GB go to a second file beside it. The model is left as it
    was.

    The file of a factorized model also lists which nodes are chains of factors, so that ``verify`` can compare it with the
    original.

    Args:
        model: any module; ``torch.compile`` and DistributedDataParallel around it are removed.
        path: the file to write.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping by argument name. Tensors may be in
            lists, dicts and dataclasses, where they become inputs such as ``batch_mask``; numbers, None and text are
            constants of the file.
        dynamic_axes: axes of variable size: argument -> axis -> name, as ``{"x": {0: "batch"}}``. All other axes keep the
            sizes of the example inputs.
        output_names: names for the outputs, in order; by default the exporter chooses names.
        optimize: True to let the exporter fold constants and fuse nodes. The graph then differs from the one that
            ``verify`` compares modules by.
        tolerance: largest relative error to accept, as for ``verify``.

    Raises:
        ModelError: ``model`` is not a module.
        InputError: The model does not accept the example inputs, or they have no such axes.
        ExportError: The model cannot be exported, the check fails, or the file cannot be written. What was at ``path``
            before is then unchanged.

    Example:
        >>> import tempfile, tdfx, torch
        >>> layer, axes = torch.nn.Linear(3, 2), {"input": {0: "batch"}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = folder + "/layer.onnx"
        ...     report = tdfx.export(layer, path, example_inputs=(torch.ones(2, 3),), dynamic_axes=axes)
        >>> report.inputs, report.max_error <= report.tolerance
        (('input: float[batch, 3]',), True)
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}, not a torch.nn.Module. Pass the module to export.")
    target = Path(os.path.realpath(path))
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ExportError(f"Cannot write {str(path)!r}. Name a file in a folder that exists and that you may write to.")
    check_tolerance(tolerance)
    names = _check_names(output_names)
    import onnx_ir

    from tdfx.onnx_proof.check_export import check_export
    from tdfx.onnx_proof.module_inputs import as_example_inputs
    from tdfx.onnx_proof.torch_to_onnx import build_program

    inputs = as_example_inputs(example_inputs)
    program = build_program(model, inputs, dynamic_axes, names, optimize)
    weights = _external_file(program, target)
    try:
        with contextlib.ExitStack() as on_failure:
            if weights is not None:
                on_failure.callback(weights.unlink, missing_ok=True)
            with atomic_writer(target) as file:
                temporary = Path(file.name)
                onnx_ir.save(program.model, temporary, external_data=None if weights is None else weights.name)
                checks = check_export(temporary, model, inputs, dynamic_axes, tolerance)
                if weights is not None:
                    with weights.open("rb") as written:
                        os.fsync(written.fileno())
            on_failure.pop_all()
    except OSError as error:
        raise ExportError(
            f"{str(path)!r} could not be written: {error}. What was there before is unchanged. Name a file in a folder that "
            f"exists, with room on its disk."
        ) from error
    _remove_old_weights(target, keep=weights)
    files = (target,) if weights is None else (target, weights)
    return ExportReport(files=files, size=sum(written.stat().st_size for written in files), **checks)


def _check_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"output_names={names!r} is not a list of names: pass one for each output, as ['logits'].")
    if len(set(names)) < len(names):
        raise InputError(f"output_names={list(names)!r} has a name twice: outputs are told apart by their names.")
    return tuple(names)


def _external_file(program: ONNXProgram, target: Path) -> Path | None:
    """Return a file for weights that do not fit into the .onnx file; its name is new, so that the old weights stay."""
    values = (initializer.const_value for initializer in program.model.graph.initializers.values())
    size = sum(value.nbytes for value in values if value is not None)
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}.data") if size > SINGLE_FILE_BYTES else None


def _remove_old_weights(target: Path, keep: Path | None) -> None:
    pattern = re.compile(rf"{re.escape(target.name)}\.[0-9a-f]{{8}}\.data")
    with contextlib.suppress(OSError):
        for path in target.parent.iterdir():
            if pattern.fullmatch(path.name) and path != keep:
                path.unlink(missing_ok=True)
