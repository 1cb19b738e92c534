"""nn.Module -> ONNX file, without a trace on the module; and ONNX file -> ModelProto."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import TYPE_CHECKING, Any

import onnx
import torch
from onnx import ModelProto, external_data_helper
from onnxscript import opset18
from onnxscript.function_libs.torch_lib.ops.core import aten_conv3d
from torch import Tensor, nn

from tdfx.errors import ExportError
from tdfx.onnx_proof.graph import compared_by_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def export_module(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write ``module``, in eval mode, to ``path``; weights of any size, in a file beside it.

    ``optimize=False`` keeps the graph as the model is written: the optimizer folds weights into constants, and then
    equal models with unequal weights no longer have equal graphs.

    Raises:
        ExportError: if the exporter cannot do it.

    """
    try:
        with eval_mode(module), _quiet():
            torch.onnx.export(
                module,
                inputs,
                path,
                dynamo=True,
                optimize=False,
                verbose=False,
                external_data=True,
                custom_translation_table={torch.ops.aten.conv3d.default: _conv3d},
            )
    except Exception as error:
        raise ExportError(
            f"torch.onnx cannot export {type(module).__name__}: {_reason(error)} "
            f"Make the model exportable, or verify its exportable parts one by one."
        ) from error


def load_file(path: Path) -> ModelProto:
    """Read an ONNX file; of tensors stored in other files only those whose values count are read.

    Raises:
        ExportError: if there is no such file, or it holds no ONNX graph.

    """
    if not path.is_file():
        raise ExportError(f"{str(path)!r} is not a file: give the path of an .onnx file, or pass the nn.Module itself.")
    try:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if external_data_helper.uses_external_data(tensor) and compared_by_value(tensor):
                external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
    except Exception as error:  # protobuf's, onnx's and the system's, which have no other base
        raise ExportError(f"{str(path)!r} cannot be read as ONNX: {error}. Export the model again.") from error
    if not model.ir_version or not model.graph.output:
        raise ExportError(f"{str(path)!r} holds no ONNX graph: no version or no outputs. Export the model again.")
    return model


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put ``module`` into eval mode, and each submodule back into its own mode afterwards, whatever happens."""
    modes = [(one, one.training) for one in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for one, training in modes:  # through train(), for modules that do more than set a flag
            if one.training != training:
                one.train(training)
        for one, training in modes:  # train() reaches the children, so the flags have the last word
            one.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own internals away from the user; exceptions pass.

    For the time of the export this holds for the whole process, and so for other threads too.
    """
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _reason(error: BaseException) -> str:
    """Return the first line of the innermost cause: the exporter's own message is advice on how to debug it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'no message'}."


def _conv3d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = (1, 1, 1),
    padding: Any = (0, 0, 0),
    dilation: Any = (1, 1, 1),
    groups: int = 1,
) -> Any:
    """Translate conv3d with a bias of zeros where there is none.

    onnxscript (0.7.2) makes that bias with shape [channels, 2], which ONNX Runtime refuses.
    """
    op: Any = opset18
    if bias is None:
        bias = op.Expand(op.CastLike(0.0, input), op.Shape(weight, start=0, end=1))
    translate: Callable[..., Any] = aten_conv3d
    return translate(input, weight, bias, stride, padding, dilation, groups)
