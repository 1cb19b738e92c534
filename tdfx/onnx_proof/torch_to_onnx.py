"""Export a module to ONNX with torch's exporter, and run it as the export does: in eval mode, left as it was."""

from __future__ import annotations

import io
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import onnx_ir
import torch
from onnxscript import opset18
from onnxscript.function_libs.torch_lib.ops.core import aten_conv3d
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.onnx import ONNXProgram
from torch.utils._pytree import tree_leaves, tree_map_only

from tdfx.errors import ExportError, InputError, first_line
from tdfx.onnx_proof import alias_groups
from tdfx.onnx_proof.alias_groups import aliases_of
from tdfx.onnx_proof.factor_chains import METADATA_KEY, chains_of, to_metadata
from tdfx.onnx_proof.module_inputs import (
    Axes,
    ExampleInputs,
    Outputs,
    call_arguments,
    describe_inputs,
    dynamic_shapes,
    graph_names,
    is_plain,
)
from tdfx.onnx_proof.plain_forward import PlainForward, from_records, gives_tensors_only, output_tensors
from tdfx.passes.analysis.sandbox import scratch_copy
from tdfx.wrappers.compiled import is_wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def export_module(module: nn.Module, inputs: ExampleInputs, path: Path, dynamic_axes: Axes | None = None) -> None:
    """Write ``module``, in eval mode, to ``path``, with its weights in a file beside it; errors as for ``build_program``."""
    onnx_ir.save(build_program(module, inputs, dynamic_axes).model, path, external_data=f"{path.name}.data")


def build_program(
    module: nn.Module,
    inputs: ExampleInputs,
    dynamic_axes: Axes | None = None,
    output_names: tuple[str, ...] | None = None,
    optimize: bool = False,
) -> ONNXProgram:
    """Return ``module``, in eval mode, as an ONNX model that shares its weights.

    The exporter's messages about its own internals are hidden, for other threads of the process too. Its optimizer folds
    weights into constants, so that equal models with unequal weights no longer have equal graphs; it is off by default.

    Raises:
        InputError: The module does not accept the inputs, or has no such axes.
        ExportError: The exporter cannot export it.
    """
    module = without_wrappers(module)
    arguments, named = _distinct(call_arguments(module, inputs))
    shapes: Any = dynamic_shapes(module, inputs, dynamic_axes)
    exported, input_names = module, None
    if not is_plain(inputs) or not _gives_tensors_only(module, inputs):
        exported, input_names = PlainForward(module, arguments, named), graph_names(module, inputs)
        arguments, named = tuple(leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, torch.Tensor)), {}
        shapes = None if shapes is None else {"tensors": tuple(shapes.values())}
    try:
        with eval_mode(exported), _without_messages():
            program = torch.onnx.export(
                exported,
                arguments,
                kwargs=named,
                dynamo=True,
                optimize=optimize,
                verbose=False,
                dynamic_shapes=shapes,
                input_names=input_names,
                output_names=output_names,
                custom_translation_table={torch.ops.aten.conv3d.default: _conv3d},
            )
    except Exception as error:
        run_module(module, inputs)  # raises InputError if the inputs are the cause
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter's own message only advises on debugging
            cause = cause.__cause__
        raise ExportError(
            f"torch.onnx cannot export {type(module).__name__}: {type(cause).__name__}: {first_line(cause)}. "
            f"Make the model exportable, or verify its exportable parts one by one."
        ) from error
    assert program is not None
    if exported is not module:
        for name, value in list(program.model.graph.initializers.items()):
            value.name = name.removeprefix(PlainForward.PREFIX)
    if groups := aliases_of(module):
        program.model.metadata_props[alias_groups.METADATA_KEY] = alias_groups.to_metadata(groups)
    if chains := chains_of(module):
        program.model.metadata_props[METADATA_KEY] = to_metadata(chains)
    return program


def _distinct(arguments: Any) -> Any:
    """Copy tensors that occur more than once: torch.export would make one input of them."""
    seen: set[int] = set()

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        again = id(tensor) in seen
        seen.add(id(tensor))
        return tensor.clone() if again else tensor

    return tree_map_only(torch.Tensor, copied, arguments)


def _gives_tensors_only(module: nn.Module, inputs: ExampleInputs) -> bool:
    """Return True if an exporter can take what a copy of ``module`` gives as it is."""
    with _without_messages():
        return gives_tensors_only(_outputs_of(scratch_copy(module, training=False), inputs))


@contextmanager
def _without_messages() -> Iterator[None]:
    """Hide warnings, and what is printed."""
    output = io.StringIO()
    with warnings.catch_warnings(action="ignore"), redirect_stdout(output), redirect_stderr(output):
        yield


def run_module(module: nn.Module, inputs: ExampleInputs) -> Outputs:
    """Return the tensors that ``module`` outputs in eval mode, in the order of an export.

    Raises InputError if the module does not accept the inputs, and ExportError if it gives objects without tensors.
    """
    return output_tensors(_outputs_of(without_wrappers(module), inputs))


def _outputs_of(module: nn.Module, inputs: ExampleInputs) -> Any:
    try:
        arguments, named = from_records(call_arguments(module, inputs))
        with eval_mode(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
            return module(*arguments, **named)
    except Exception as error:  # whatever the model raises, these inputs cause it
        raise InputError(
            f"{type(module).__name__} does not accept the example inputs {describe_inputs(inputs)}: "
            f"{type(error).__name__}: {first_line(error)}. Pass example_inputs (--input on the command line) with the "
            f"shapes, dtypes and device that its forward takes."
        ) from error


def without_wrappers(module: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile`` and DistributedDataParallel, which cannot be exported."""
    while is_wrapped(module) or isinstance(module, DistributedDataParallel):
        inner = module._orig_mod if is_wrapped(module) else module.module
        assert isinstance(inner, nn.Module)
        module = inner
    return module


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put ``module`` into eval mode, and each submodule back into its own mode afterwards."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for submodule, training in modes:  # through train(), for modules that do more than set a flag
            if submodule.training != training:
                submodule.train(training)
        for submodule, training in modes:  # train() also changes the children, so set all flags once more
            submodule.training = training


def _conv3d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = (1, 1, 1),
    padding: Any = (0, 0, 0),
    dilation: Any = (1, 1, 1),
    groups: int = 1,
) -> Any:
    """Translate conv3d, with a bias of zeros if there is none.

    onnxscript (0.7.2) makes that bias with shape [channels, 2], which ONNX Runtime refuses.
    """
    op: Any = opset18
    if bias is None:
        bias = op.Expand(op.CastLike(0.0, input), op.Shape(weight, start=0, end=1))
    translate: Callable[..., Any] = aten_conv3d
    return translate(input, weight, bias, stride, padding, dilation, groups)
