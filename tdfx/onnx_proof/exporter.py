"""nn.Module -> ONNX file, without a trace on the module; and ONNX file -> ModelProto."""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir
import torch
from onnx import ModelProto, external_data_helper
from onnxscript import opset18
from onnxscript.function_libs.torch_lib.ops.core import aten_conv3d
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.onnx import ONNXProgram

from tdfx.errors import ExportError, InputError
from tdfx.onnx_proof.arguments import Axes, Given, Outputs, described, dynamic_shapes, in_order
from tdfx.onnx_proof.chains import METADATA_KEY, chains_of, to_metadata
from tdfx.onnx_proof.graph import Graph, compared_by_value, read_graph
from tdfx.wrappers.compiled import is_wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to export."""

    dynamic_axes: Axes | None = None
    output_names: tuple[str, ...] | None = None
    optimize: bool = False
    """False keeps the graph as the model is written: the optimizer folds weights into constants, and then equal models
    with unequal weights no longer have equal graphs."""


def export_module(module: nn.Module, inputs: Given, path: Path, settings: Settings | None = None) -> None:
    """Write ``module``, in eval mode, to ``path``; weights of any size, in a file beside it.

    Raises:
        InputError: if the module does not take the inputs, or has no such axes.
        ExportError: if the exporter cannot do it.

    """
    save_program(build_program(module, inputs, settings), path, external=f"{path.name}.data")


def build_program(module: nn.Module, inputs: Given, settings: Settings | None = None) -> ONNXProgram:
    """Return ``module``, in eval mode, as an ONNX model that shares its weights; errors as for ``export_module``."""
    module, settings = bare(module), settings or Settings()
    arguments, named = in_order(module, inputs)
    shapes = dynamic_shapes(module, inputs, settings.dynamic_axes)
    try:
        with eval_mode(module), _quiet():
            program = torch.onnx.export(
                module,
                arguments,
                kwargs=named,
                dynamo=True,
                optimize=settings.optimize,
                verbose=False,
                dynamic_shapes=shapes,
                output_names=settings.output_names,
                custom_translation_table={torch.ops.aten.conv3d.default: _conv3d},
            )
    except Exception as error:
        run_module(module, inputs)  # where the inputs are to blame, this says so
        raise ExportError(
            f"torch.onnx cannot export {type(module).__name__}: {_reason(error)} "
            f"Make the model exportable, or verify its exportable parts one by one."
        ) from error
    assert program is not None
    chains = chains_of(module)
    if chains:
        program.model.metadata_props[METADATA_KEY] = to_metadata(chains)
    return program


def save_program(program: ONNXProgram, path: Path, external: str | None) -> None:
    """Write an exported model to a file; its weights too, or into another of that name beside it."""
    onnx_ir.save(program.model, path, external_data=external)


def run_module(module: nn.Module, inputs: Given) -> Outputs:
    """Return the tensors that ``module``, in eval mode, gives for some inputs, in the order of an export.

    Raises:
        InputError: if it does not take them.

    """
    module = bare(module)
    arguments, named = in_order(module, inputs)
    try:
        with eval_mode(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = module(*arguments, **named)
    except Exception as error:  # whatever the model raises, it is about these inputs
        raise InputError(
            f"{type(module).__name__} does not accept the example inputs {described(inputs)}: {type(error).__name__}: "
            f"{_first_line(error)}. Pass example_inputs (--input on the command line) with the shapes, dtypes and device "
            f"that its forward takes."
        ) from error
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return tuple(one for one in leaves if isinstance(one, torch.Tensor))


def bare(module: nn.Module) -> nn.Module:
    """Take a module out of ``torch.compile`` and DistributedDataParallel, which have no graph of their own."""
    while is_wrapped(module) or isinstance(module, DistributedDataParallel):
        inner = module._orig_mod if is_wrapped(module) else module.module
        assert isinstance(inner, nn.Module)
        module = inner
    return module


def read_file(path: Path) -> tuple[ModelProto, Graph]:
    """Read an ONNX file, as ``load_file`` does, and the graph in it.

    Raises:
        ExportError: if there is no such file, or no valid graph in it.

    """
    model = load_file(path)
    try:
        _check_texts(model)
        return model, read_graph(model)
    except ExportError:
        raise
    except Exception as error:  # the bytes may hold anything
        raise ExportError(
            f"{str(path)!r} holds a damaged ONNX graph: {_reason(error)} Export the model again."
        ) from error


def _check_texts(model: ModelProto) -> None:
    """Raise ValueError where protobuf found bytes that are no text, which it hands on as they are."""
    graph = model.graph
    named = [*graph.initializer, *graph.input, *graph.output, *graph.node]
    texts: list[object] = [one.name for one in named]
    for node in graph.node:
        texts += [node.op_type, node.domain, *node.input, *node.output, *(one.name for one in node.attribute)]
    for port in (*graph.input, *graph.output):
        texts += [size.dim_param for size in port.type.tensor_type.shape.dim]
    texts += [text for one in model.metadata_props for text in (one.key, one.value)]
    wrong = next((one for one in texts if not isinstance(one, str)), None)
    if wrong is not None:
        raise ValueError(f"the name {wrong!r} is not UTF-8")


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
    return f"{type(error).__name__}: {_first_line(error)}."


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else "no message"


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
