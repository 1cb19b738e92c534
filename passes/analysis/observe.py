"""Running a model on example inputs to see what enters each site, and which parameters functions take as weights."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from tdfx.cost.setting import Setting, autocast_now
from tdfx.devices import short_name
from tdfx.distributed.processes import Processes
from tdfx.kinds.attention import attend
from tdfx.kinds.functional import FunctionCall
from tdfx.kinds.parse_products import Views, product_name
from tdfx.kinds.registry import is_candidate, kind_of
from tdfx.kinds.views import FORMS
from tdfx.layers.factorized import Factorized
from tdfx.layers.parameter import FactorizedParameter
from tdfx.passes.analysis.guard import (
    GatherShards,
    ParameterGuard,
    WritesParameterError,
    storage_address,
    watch_custom_functions,
)
from tdfx.passes.analysis.sandbox import clone_parameters, isolated, scratch_copy
from tdfx.passes.analysis.uses import METADATA_FUNCTIONS

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""Example inputs: the model's positional arguments, one tensor for a single argument, or keyword arguments by name."""


@dataclass(frozen=True, slots=True)
class Entered:
    """The input of one call of a layer or a function."""

    shape: tuple[int, ...]
    setting: Setting
    """Where and how the call computed, as far as its input shows; the dtype is the input's."""

    @classmethod
    def of(cls, tensor: Tensor, input_addresses: Collection[int], shape: tuple[int, ...] | None = None) -> Entered:
        """Describe a tensor, given the addresses of the storages of the model's own inputs, and its shape as a flow."""
        kind = tensor.device.type
        setting = Setting(
            device=short_name(tensor.device),
            dtype=tensor.dtype,
            autocast=autocast_now(kind),
            channels_last=is_channels_last(tensor),
            wants_input_gradient=storage_address(tensor) not in input_addresses,
        )
        return cls(tuple(tensor.shape) if shape is None else shape, setting)


def is_channels_last(tensor: Tensor) -> bool:
    """Return True for a batch of images or volumes, or a kernel, whose channels are innermost in memory.

    >>> is_channels_last(torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    True
    """
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return layout is not None and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous()


@dataclass(slots=True)
class Observed:
    """What one forward pass did."""

    entering: defaultdict[str, list[Entered]] = field(default_factory=lambda: defaultdict(list))
    """Path of a layer -> its input, call by call."""
    functional: defaultdict[int, list[tuple[FunctionCall, Entered]]] = field(default_factory=lambda: defaultdict(list))
    """Parameter, by identity -> the calls of functions that took it as their weight, with their inputs."""
    multiplied: dict[int, str] = field(default_factory=dict)
    """Parameters, by identity, that take part in a product in a way that factors cannot, with the name of the product."""
    reads: set[int] = field(default_factory=set)
    """Parameters, by identity, that were read for anything else, outside of the layers that hold them."""


def observe(module: nn.Module, inputs: Inputs, *, training: bool, gather: Processes | None = None) -> Observed:
    """Run a scratch copy of a module once, and return what it did; the module and the random generators stay as they are.

    ``gather`` are the processes that hold shards of its parameters, all of which must call this; None without shards.
    """
    try:
        with torch.no_grad():
            return _observe(module, inputs, training, gather)
    except RuntimeError:
        if gather is not None:
            raise
        with torch.enable_grad():  # which a forward needs that takes gradients itself
            return _observe(module, inputs, training, gather)


def _observe(module: nn.Module, inputs: Inputs, training: bool, gather: Processes | None) -> Observed:
    scratch = scratch_copy(module, training=training)
    with nullcontext() if gather is None else GatherShards(gather):
        try:
            return _run(scratch, inputs, {})
        except WritesParameterError:
            scratch = scratch_copy(module, training=training)
            return _run(scratch, inputs, clone_parameters(scratch))


def _run(scratch: nn.Module, inputs: Inputs, originals: Mapping[int, int]) -> Observed:
    """Run a scratch copy and report what it did.

    ``originals`` maps each cloned parameter to the one to report it as, by identity; it is empty if the copy shares its
    parameters, which are guarded then.
    """
    observed = Observed()
    arguments, named = tree_map_only(Tensor, Tensor.clone, split_inputs(inputs))
    tensors = (value for value in tree_leaves((arguments, named)) if isinstance(value, Tensor))
    recorder = _CallRecorder(observed, set(map(storage_address, tensors)) - {0})
    for path, layer in scratch.named_modules():
        if is_candidate(layer) or isinstance(layer, Factorized):
            recorder.attach(path, layer)
    guard = ParameterGuard(scratch)
    with (
        isolated(scratch),
        nullcontext() if originals else guard,
        _watch_old_modules(scratch, recorder.record_old_module),
        recorder,
        watch_custom_functions(recorder.record_custom_function),
    ):
        try:
            output = scratch(*arguments, **named)
            recorder.record_output(list(output) if inspect.isgenerator(output) else output)
        except Exception as error:
            if guard.written and not isinstance(
                error, WritesParameterError
            ):  # load_state_dict() makes another error of it
                raise WritesParameterError(str(error)) from error
            raise
    for clone, original in originals.items():
        if clone in observed.functional:
            observed.functional[original] = observed.functional.pop(clone)
        if clone in observed.reads:
            observed.reads.add(original)
        if clone in observed.multiplied:
            observed.multiplied[original] = observed.multiplied.pop(clone)
    return observed


@contextmanager
def _watch_old_modules(scratch: nn.Module, on_call: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call ``on_call`` with every module of the user's own model that the copy calls, reached through another object."""
    copied, weights = set(map(id, scratch.modules())), set(map(id, scratch.parameters()))

    def before(module: nn.Module, _: Any) -> None:
        if id(module) not in copied and not weights.isdisjoint(map(id, module._parameters.values())):
            on_call(module)

    handle = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def split_inputs(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and keyword arguments."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs), {}


class _CallRecorder(TorchFunctionMode):
    """Records every call of a torch function, except the calls that a stock layer makes itself."""

    def __init__(self, observed: Observed, input_addresses: Collection[int]) -> None:
        super().__init__()
        self.observed = observed
        self.input_addresses = input_addresses
        self.depth_in_layers = 0
        self.paths: dict[int, str] = {}
        self.views = Views()
        self.old: set[int] = set()
        """Parameters, by identity, of modules that are not those of the copy."""
        self.parts: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
        """Tensor that was taken out of a parameter, or is another form of one -> the parameter, by identity."""

    def attach(self, path: str, layer: nn.Module) -> None:
        """Record what enters a layer; inside a layer that computes what its kind does, record nothing else."""
        self.paths[id(layer)] = path
        is_stock = isinstance(layer, Factorized) or kind_of(layer).is_intact(layer)

        inside: list[nn.Module] = []

        def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            inside.append(layer)
            self.depth_in_layers += is_stock
            x = next((value for value in (*arguments, *named.values()) if isinstance(value, Tensor)), None)
            if x is not None:
                self._record_input(path, x)

        def after(*_: Any) -> None:
            if inside:  # else a hook of the user's has failed before the layer ran
                inside.pop()
                self.depth_in_layers -= is_stock

        # Within the user's own hooks, so that what these read is recorded, and what enters the layer after they changed it.
        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after, always_call=True, prepend=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            with self:
                return attend(*args, **named)
        if self.depth_in_layers:
            return func(*args, **named)
        result = func(*args, **named)
        if self.views.record(func, args, named, result):
            return result
        self._record(func, args, named)
        if args and getattr(func, "__name__", "") in FORMS and (source := self._source(args[0])) is not None:
            self.parts.update({part: source for part in tree_leaves(result) if isinstance(part, Tensor)})
        return result

    def _source(self, value: Any) -> int | None:
        """Return the parameter, by identity, that a value is, or was taken from; None if it is neither."""
        if (view := self.views.of(value)) is not None:
            return id(view.parameter)
        return self.parts.get(value) if isinstance(value, Tensor) else None

    def _record(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if func in METADATA_FUNCTIONS:
            return
        call = self.views.call(func, args, named)
        if call is not None and id(call.weight) in self.old:
            return
        is_use = call is not None and isinstance(call.weight, nn.Parameter | FactorizedParameter)
        if (name := product_name(func)) is not None:
            operands = tree_leaves(call.rest if call is not None and is_use else (args, named))
            sources = [self._source(operand) for operand in operands if isinstance(operand, Tensor)]
            self.observed.multiplied.update({source: name for source in sources if source is not None})
        if call is None:
            self._record_reads((args, named))
            return
        x = call.rest.get("input")
        first = x[0] if isinstance(x, tuple) else x
        if isinstance(call.weight, nn.Parameter) and isinstance(first, Tensor):
            entered = Entered.of(first, self.input_addresses, call.flow_shape(call.weight.shape))
            self.observed.functional[id(call.weight)].append((call, entered))
        elif isinstance(call.weight, FactorizedParameter) and isinstance(first, Tensor):
            shape = call.flow_shape(call.weight.shape)
            self.observed.entering[self.paths[id(call.weight)]].append(Entered.of(first, self.input_addresses, shape))
        self._record_reads(call.rest)

    def record_custom_function(self, function: type, arguments: Any) -> None:
        """Record that a user's autograd function reads its arguments; its inside is not looked at."""
        if not self.depth_in_layers:
            self._record_reads(arguments)

    def record_old_module(self, module: nn.Module) -> None:
        """Record that a module was called which a rewrite does not change: its weights have to stay."""
        weights = set(map(id, module.parameters(recurse=False)))
        self.old |= weights
        self.observed.reads |= weights

    def record_output(self, output: Any) -> None:
        """Record that what the model returns is read by other code."""
        self._record_reads(output)

    def _record_input(self, path: str, x: Tensor) -> None:
        self.observed.entering[path].append(Entered.of(x, self.input_addresses))

    def _record_reads(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and (view := self.views.of(value)) is not None:
                self.observed.reads.add(id(view.parameter))
