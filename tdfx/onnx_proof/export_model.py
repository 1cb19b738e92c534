"""Export to ONNX for inference, proved before the file is there."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tdfx.errors import ExportError, InputError, ModelError
from tdfx.onnx_proof.report import ExportReport
from tdfx.onnx_proof.verify import check_tolerance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.onnx import ONNXProgram

    from tdfx.onnx_proof.arguments import Axes

SINGLE_FILE_BYTES = 2_000_000_000
"""Up to this many bytes of weights stand in the .onnx file itself: protobuf, its format, ends at 2 GiB."""


def export(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Sequence[Tensor] | Tensor | Mapping[str, Tensor],
    dynamic_axes: Axes | None = None,
    output_names: Sequence[str] | None = None,
    optimize: bool = False,
    tolerance: float | None = None,
) -> ExportReport:
    """Write a model, factorized or not, to an ONNX file for inference, and prove that the file computes what it does.

    The file is run in ONNX Runtime on the example inputs, and again with one more in each dynamic axis, and must give
    what the model gives in eval mode; its inputs must have the names of ``forward``'s arguments and the axes that were
    asked for. Only then does it take the place of what was at ``path``, at once. Weights of more than 2 GB go to a second
    file beside it. The model is left as it was.

    The file of a factorized model also says which nodes are chains of factors, so that ``verify`` can compare it with the
    original.

    Args:
        model: any module; ``torch.compile`` and DistributedDataParallel around it are left out.
        path: the file to write.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping by argument name.
        dynamic_axes: axes whose size is left open: argument -> axis -> name, as ``{"x": {0: "batch"}}``. All others have
            the sizes of the example inputs for good.
        output_names: names for the outputs, in order; by default the exporter makes some up.
        optimize: True to let the exporter fold constants and fuse nodes. The graph is then no longer the one that
            ``verify`` compares modules by.
        tolerance: largest relative error to accept, as for ``verify``.

    Raises:
        ModelError: if ``model`` is not a module.
        InputError: if the model does not accept the example inputs, or they have no such axes.
        ExportError: if the model cannot be exported, the proof fails, or the file cannot be written. What was at ``path``
            before is then unchanged.

    Example:
        >>> import tempfile, tdfx, torch
        >>> layer, axes = torch.nn.Linear(3, 2), {"input": {0: "batch"}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = folder + "/layer.onnx"
        ...     report = tdfx.export(layer, path, example_inputs=(torch.ones(2, 3),), dynamic_axes=axes)
        >>> report.inputs, report.max_error <= report.tolerance
        (('input: float[?0, 3]',), True)
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}, not a torch.nn.Module. Pass the module to export.")
    target = _check_path(path)
    check_tolerance(tolerance)
    names = _check_names(output_names)
    from tdfx.onnx_proof.arguments import check_given
    from tdfx.onnx_proof.exporter import Settings, build_program
    from tdfx.onnx_proof.prove import prove

    given = check_given(example_inputs)
    program = build_program(model, given, Settings(dynamic_axes=dynamic_axes, output_names=names, optimize=optimize))
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            written = _write(program, Path(folder, target.name))
            proof = prove(written[0], model, given, dynamic_axes, tolerance)
            files = _move(written, target)
    except OSError as error:
        raise ExportError(
            f"{str(path)!r} could not be written: {error}. What was there before is unchanged. Name a file in a folder that "
            f"exists, with room on its disk."
        ) from error
    return ExportReport(files=files, size=sum(one.stat().st_size for one in files), **proof)


def _check_path(path: str | Path) -> Path:
    """Return the file that a path leads to, through links."""
    target = Path(os.path.realpath(path))
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ExportError(f"Cannot write {str(path)!r}. Name a file in a folder that exists and that you may write to.")
    return target


def _check_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(one, str) and one for one in names):
        raise InputError(f"output_names={names!r} is not a list of names: pass one for each output, as ['logits'].")
    if len(set(names)) < len(names):
        raise InputError(f"output_names={list(names)!r} has a name twice: outputs are told apart by their names.")
    return tuple(names)


def _write(program: ONNXProgram, path: Path) -> list[Path]:
    """Write a model into a folder of its own: one file, or one for the graph and one for the weights."""
    from tdfx.onnx_proof.exporter import save_program

    tensors = (one.const_value for one in program.model.graph.initializers.values())
    size = sum(one.nbytes for one in tensors if one is not None)
    # A name that no file had before: until the graph's file is replaced, it goes on with the weights that it names.
    external = f"{path.name}.{secrets.token_hex(4)}.data" if size > SINGLE_FILE_BYTES else None
    save_program(program, path, external)
    files = [path, *([path.with_name(external)] if external is not None else [])]
    for one in files:
        with one.open("rb") as file:
            os.fsync(file.fileno())
    return files


def _move(written: list[Path], target: Path) -> tuple[Path, ...]:
    """Put new files in place, the weights first, and remove the weights of the file that was there."""
    graph, *weights = written
    placed = [one.replace(target.with_name(one.name)) for one in weights]
    graph.replace(target)
    own = re.compile(rf"{re.escape(target.name)}\.[0-9a-f]{{8}}\.data")
    for one in target.parent.iterdir():
        if own.fullmatch(one.name) and one not in placed:
            with contextlib.suppress(OSError):
                one.unlink()
    return (target, *placed)
