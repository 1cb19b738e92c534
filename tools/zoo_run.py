"""Run a model so that it can be compared: prepare its values, and record outputs, buffers and gradients."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import keystr, tree_flatten_with_path
from zoo_inputs import ModelCall

_SEED = 11

Tensors = dict[str, Tensor]
"""Tensors by their names or paths."""


@dataclass(frozen=True, slots=True)
class Observation:
    """The results of one run of a model."""

    outputs: Tensors
    structure: str
    """Types and nesting of what the model returned."""
    buffers: Tensors = field(default_factory=dict)
    gradients: Tensors = field(default_factory=dict)


@contextmanager
def preserved(model: nn.Module, mode: bool) -> Iterator[None]:
    """Set train or eval mode, and afterwards restore the mode of every module and the values of every buffer."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        with _mode(model, mode):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


@contextmanager
def _mode(model: nn.Module, mode: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(mode)
        yield
    finally:
        for module, before in modes:
            module.training = before


def warm_up(model: nn.Module, call: ModelCall, steps: int = 2) -> None:
    """Give BatchNorm the statistics of real data: an average over a few forwards in train mode.

    With the initial statistics the signal dies or explodes in a deep network, and two unrelated models agree in eval mode.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with _mode(model, True), torch.no_grad():
        for step in range(steps if norms else 0):
            _seed(step)
            fresh, _ = call.fresh()
            model(*fresh.arguments, **fresh.named)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class Float64Constants(TorchFunctionMode):
    """Replaces float32 by float64 wherever a model's code names it, as RAFT does for its grid of coordinates.

    In float32 a few ReLUs change sides under rounding, which changes gradients in jumps that no tolerance can foresee.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*(torch.float64 if value is torch.float32 else value for value in args), **named)


@torch.no_grad()
def add_noise_to_constants(model: nn.Module) -> None:
    """Add noise to parameters that are constant at initialization, because they hide faults from the comparison.

    Examples are a head of zeros (ViT), a layer scale of 1e-6 (ConvNeXt), and a bias of zeros, whose loss nobody would see.
    """
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            terms = parameter[0].numel() if parameter.dim() > 1 else 100
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=terms**-0.5)


def observe(
    model: nn.Module,
    call: ModelCall,
    *,
    mode: bool,
    wanted: Mapping[str, nn.Parameter] | None = None,
    watched: Iterable[str] = (),
) -> Observation:
    """Run a model once, from a fixed seed, in train mode if ``mode``, and leave it as it was.

    The gradients of the ``wanted`` parameters and of the inputs are recorded, unless it is None, and the outputs of the
    submodules whose paths are ``watched``.
    """
    fresh, inputs = call.fresh()
    with preserved(model, mode), _recording(model, watched) as recorded, torch.set_grad_enabled(wanted is not None):
        _seed(_SEED)
        returned = model(*fresh.arguments, **fresh.named)
        outputs, structure = flatten(returned)
        inner, inner_structure = flatten(dict(recorded))
        gradients = {} if wanted is None else _gradients(outputs, inputs, wanted)
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        all_outputs = {**outputs, **{f"inside{name}": output for name, output in inner.items()}}
        detached = {name: output.detach() for name, output in all_outputs.items()}
    return Observation(detached, f"{structure} {inner_structure}", buffers, gradients)


def flatten(value: Any) -> tuple[Tensors, str]:
    """Return the tensors in a structure by their path, and a description of the structure; dataclasses are entered.

    >>> tensors, structure = flatten({"out": torch.zeros(2), "list": [torch.ones(1), None]})
    >>> sorted(tensors)
    ["['list'][0]", "['out']"]
    """
    tensors: Tensors = {}
    kinds: list[str] = []
    pairs, spec = tree_flatten_with_path(value)
    for path, leaf in pairs:
        name = keystr(path)
        if isinstance(leaf, Tensor):
            tensors[name] = leaf
            kinds.append(str(leaf.dtype))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            inner, structure = flatten({item.name: getattr(leaf, item.name) for item in fields(leaf)})
            tensors |= {f"{name}{key}": tensor for key, tensor in inner.items()}
            kinds.append(f"{type(leaf).__qualname__}({structure})")
        else:
            kinds.append(type(leaf).__qualname__)
    return tensors, f"{spec} {kinds}"


def _gradients(outputs: Tensors, inputs: list[Tensor], wanted: Mapping[str, nn.Parameter]) -> Tensors:
    """Return the gradients of a fixed random projection of all outputs, each output scaled to the same norm."""
    generator = torch.Generator().manual_seed(_SEED)
    terms = []
    for output in outputs.values():
        if output.is_floating_point() and output.requires_grad:
            direction = torch.randn(output.shape, generator=generator, dtype=output.dtype)
            norm = output.detach().norm().clamp_min(torch.finfo(output.dtype).tiny)
            terms.append((output * direction).sum() / norm)
    named = {**{f"(input {index})": tensor for index, tensor in enumerate(inputs)}, **wanted}
    gradients = torch.autograd.grad(torch.stack(terms).sum(), list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


@contextmanager
def _recording(model: nn.Module, watched: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Record what submodules return, at the last time that they are called."""
    recorded: dict[str, Any] = {}

    def record(path: str, module: nn.Module, arguments: Any, output: Any) -> None:
        recorded[path] = output

    handles = [model.get_submodule(path).register_forward_hook(partial(record, path)) for path in watched]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
