"""Running a model on example inputs to see what enters each site, and which parameters functions take as weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tdfx.cost.setting import Setting, autocast_now
from tdfx.distributed.processes import Ready, unasked
from tdfx.kinds.functional import FunctionCall, parse_call
from tdfx.kinds.registry import is_candidate, kind_of, operation_of
from tdfx.layers.factorized import Factorized
from tdfx.layers.parameter import FactorizedParameter
from tdfx.passes.analysis.gather import GatherShards
from tdfx.passes.analysis.guard import ParameterGuard, WritesParameterError, custom_functions
from tdfx.passes.analysis.sandbox import isolated
from tdfx.passes.analysis.tracer import scratch_copy, with_own_parameters
from tdfx.passes.analysis.uses import METADATA_FUNCTIONS

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""Example inputs: the positional arguments of the model, one tensor for a single one, or keyword arguments by name."""


@dataclass(frozen=True, slots=True)
class Entered:
    """What entered a layer or a function in one call."""

    shape: tuple[int, ...]
    setting: Setting
    """Where and how the call computed, as far as its input shows; the dtype is the input's."""

    @classmethod
    def of(cls, tensor: Tensor, given: Collection[int]) -> Entered:
        """Describe a tensor; ``given`` are the addresses of the storages of the model's own inputs."""
        kind = tensor.device.type
        setting = Setting(
            device=kind,
            dtype=tensor.dtype,
            autocast=autocast_now(kind),
            channels_last=is_channels_last(tensor),
            wants_input_gradient=_address(tensor) not in given,
        )
        return cls(tuple(tensor.shape), setting)


def is_channels_last(tensor: Tensor) -> bool:
    """Return True for a batch of images or volumes, or a kernel, whose channels are innermost in memory.

    >>> is_channels_last(torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    True
    """
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = layouts.get(tensor.dim())
    return layout is not None and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous()


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass without a storage
        return 0


@dataclass(slots=True)
class Observed:
    """What one forward pass did."""

    entering: defaultdict[str, list[Entered]] = field(default_factory=lambda: defaultdict(list))
    """Path of a layer -> what entered it, call by call."""
    functional: defaultdict[int, list[tuple[FunctionCall, Entered]]] = field(default_factory=lambda: defaultdict(list))
    """Parameter, by its identity -> the calls of functions that took it as their weight, with what entered them."""
    kept: defaultdict[object, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """Path of a layer, or parameter by its identity -> the first samples of what entered, call by call, where asked for."""
    reads: set[int] = field(default_factory=set)
    """Parameters, by identity, that were read for anything else, outside of the layers that hold them."""


@torch.no_grad()
def observe(
    module: nn.Module,
    inputs: Inputs,
    *,
    training: bool,
    shards: bool = False,
    ready: Ready = unasked,
    keep: int = 0,
) -> Observed:
    """Run a throwaway copy of a module once, and return what it did.

    Args:
        module: It is left as it was, and so is the stream of random numbers.
        inputs: They are cloned, since a model may write to them.
        training: The mode to run it in.
        shards: Whether its parameters are in shards; every process that holds some must then call this.
        keep: About how many values of each input to keep, in whole samples and at least one; 0 for none.
        ready: What to call before values of shards are gathered.
    """
    copy = scratch_copy(module, mode=training)
    with GatherShards(ready) if shards else nullcontext():
        try:
            return _run(copy, inputs, {}, keep)
        except WritesParameterError:
            copy = scratch_copy(module, mode=training)
            return _run(copy, inputs, with_own_parameters(copy), keep)


def _run(copy: nn.Module, inputs: Inputs, originals: Mapping[int, int], keep: int) -> Observed:
    """Run a module, and speak of its parameters as those of which they are copies."""
    observed = Observed()
    arguments, named = tree_map_only(Tensor, Tensor.clone, split_inputs(inputs))
    given = {_address(one) for one in tree_leaves((arguments, named)) if isinstance(one, Tensor)} - {0}
    watching = _Watching(observed, given, keep)
    for path, layer in copy.named_modules():
        if is_candidate(layer) or isinstance(layer, Factorized):
            watching.attach(path, layer)
    with (
        isolated(copy),
        nullcontext() if originals else ParameterGuard(copy),
        watching,
        custom_functions(watching.see),
    ):
        copy(*arguments, **named)
    for one, original in originals.items():
        if one in observed.functional:
            observed.functional[original] = observed.functional.pop(one)
            observed.kept[original] = observed.kept.pop(one, [])
        if one in observed.reads:
            observed.reads.add(original)
    return observed


def split_inputs(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and keyword arguments."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs), {}


def _dims_of(layer: nn.Module) -> int:
    """Return the spatial dimensions in which a layer computes; 0 where it does not say."""
    operation = None if isinstance(layer, Factorized) else operation_of(layer)
    return 0 if operation is None else operation.dims


class _Watching(TorchFunctionMode):
    """Sees every function of torch that is called, and knows which of them a stock layer calls for itself."""

    def __init__(self, observed: Observed, given: Collection[int], keep: int) -> None:
        super().__init__()
        self.observed = observed
        self.given = given
        self.keep = keep
        self.inside = 0
        self.paths: dict[int, str] = {}

    def attach(self, path: str, layer: nn.Module) -> None:
        """Note what enters a layer, and where one that does what its kind does begins and ends."""
        self.paths[id(layer)] = path
        own = isinstance(layer, Factorized) or kind_of(layer).is_intact(layer)

        def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.inside += own
            given = (one for one in (*arguments, *named.values()) if isinstance(one, Tensor))
            entering = next(given, None)
            if isinstance(entering, Tensor):
                self.observed.entering[path].append(Entered.of(entering, self.given))
                self._keep(path, entering, layer)

        def after(*_: Any) -> None:
            self.inside -= own

        layer.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        layer.register_forward_hook(after, always_call=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if not self.inside:
            self._note(func, args, named)
        return func(*args, **named)

    def _note(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> None:
        call = parse_call(func, args, named)
        if call is None:
            if func not in METADATA_FUNCTIONS:
                self._note_reads((args, named))
            return
        entering = call.rest.get("input")
        if isinstance(call.weight, nn.Parameter) and isinstance(entering, Tensor):
            self.observed.functional[id(call.weight)].append((call, Entered.of(entering, self.given)))
            self._keep(id(call.weight), entering, call.dims)
        elif isinstance(call.weight, FactorizedParameter) and isinstance(entering, Tensor):
            self.observed.entering[self.paths[id(call.weight)]].append(Entered.of(entering, self.given))
        self._note_reads(call.rest)

    def _keep(self, key: object, entering: Tensor, computes: nn.Module | int) -> None:
        """Keep the first samples of what enters a layer, or a function of some spatial dimensions."""
        if not self.keep:
            return
        dims = computes if isinstance(computes, int) else _dims_of(computes)
        if entering.dim() > dims + 1:
            each = max(1, entering.numel() // max(1, len(entering)))
            entering = entering[: max(1, self.keep // each)]
        # Without a batch, the first dimension is the channels, and all of it is one sample.
        self.observed.kept[key].append(entering.clone())

    def see(self, function: type, arguments: Any) -> None:
        """Note that a user's own autograd function reads what it is given: what it does inside is its own affair."""
        if not self.inside:
            self._note_reads(arguments)

    def _note_reads(self, values: Any) -> None:
        found: Iterable[Any] = tree_leaves(values)
        self.observed.reads.update(id(one) for one in found if isinstance(one, nn.Parameter))
