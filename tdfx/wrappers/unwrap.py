"""Takes a model out of its wrappers before a rewrite, and wraps the rewritten model in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from tdfx.distributed.processes import Processes, Solo
from tdfx.errors import ModelError
from tdfx.layers.holders import Surroundings
from tdfx.wrappers.compiled import CompiledParts, compile_in_place, compile_settings_of, is_wrapped, wrap_compiled
from tdfx.wrappers.in_place import InPlaceModule


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """A model without its wrappers, and how to put them around another model."""

    model: nn.Module
    """The model itself."""
    wrap: Callable[[nn.Module], nn.Module]
    """Wraps another model as this one was, with the same settings."""
    processes: Processes = field(default_factory=Solo)
    """The processes that train the model together."""
    shards: bool = False
    """True if each process holds only its shard of every parameter."""
    compiled: bool = False
    """True if ``torch.compile`` has compiled the model or a part of it."""
    staying: nn.Module | None = None
    """The module that stays the same object, where another one will not take the model's place."""
    surroundings: Surroundings | None = None
    """The model around that module, if it is a part of one."""


def unwrap(model: nn.Module) -> Unwrapped:
    """Take a model out of ``torch.compile``, DistributedDataParallel and FSDP2; raise ModelError for other wrappers."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}, not a torch.nn.Module. Pass the module that you train.")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ModelError(
            "A CUDA graph is being captured, so the computations of a rewrite would be repeated at every replay. Rewrite "
            "before the capture, and capture graphs of the old model anew afterwards: they refer to its weights."
        )
    if torch.is_inference_mode_enabled():
        raise ModelError(
            "This runs inside torch.inference_mode(), where every new tensor is one that can never be trained: factors and "
            "optimizer state would be such tensors. Leave that block first, or use torch.no_grad() instead."
        )
    if isinstance(model, InPlaceModule):
        return _unwrap_target(model)
    if is_wrapped(model):
        inner = unwrap(cast("nn.Module", model._orig_mod))
        return replace(inner, wrap=lambda rewritten: wrap_compiled(model, inner.wrap(rewritten)), compiled=True)
    if isinstance(model, DistributedDataParallel):
        return _unwrap_ddp(model)
    _check_wrapper(model)
    compiled = CompiledParts.of(model)
    if any(is_instance_by_name(module, "FSDPModule") for module in model.modules()):
        return _unwrap_fsdp(model, compiled)
    has_parts = bool(compiled.in_place or compiled.wrapped)
    return Unwrapped(compiled.unwrap_parts(model), compiled.recompile, compiled=has_parts)


def _unwrap_target(part: InPlaceModule) -> Unwrapped:
    """Return the module that is rewritten in place, with the processes that train the model around it."""
    if part.is_sharded:
        return _unwrap_sharded_target(part)
    surroundings = Surroundings(part.model, part.target) if part.path else None
    inner = replace(unwrap(part.target), staying=part.target, surroundings=surroundings)
    if part.ddp is None:
        return inner
    return replace(
        unwrap(part.ddp), model=inner.model, wrap=inner.wrap, staying=inner.staying, surroundings=surroundings
    )


def _unwrap_sharded_target(part: InPlaceModule) -> Unwrapped:
    _check_wrapper(part.model)
    whole = CompiledParts.of(part.model)
    is_compiled_outside = part.called is not part.target and is_instance_by_name(part.called, "FSDPModule")
    if whole.wrapped or is_compiled_outside:
        raise ModelError(_compiled_and_sharded(min(whole.wrapped, default="")))
    from tdfx.distributed.fsdp import Sharded  # imported late, as below

    sharded, compiled = Sharded(part.model), CompiledParts.of(part.target)

    def wrap(rewritten: nn.Module) -> nn.Module:
        sharded.check_paths(rewritten, part.path)
        return compiled.recompile(rewritten)

    target = sharded.model.get_submodule(part.path)
    surroundings = Surroundings(sharded.model, target) if part.path else None
    return Unwrapped(target, wrap, sharded.ranks, shards=True, staying=part.target, surroundings=surroundings)


def _compiled_and_sharded(path: str) -> str:
    name = f"Its part {path!r}" if path else "The model"
    return (
        f"{name} is wrapped by torch.compile, around or inside of which fully_shard was called, so it cannot be taken "
        f"out of both. Compile it in place, part.compile(), or compile the whole model."
    )


def _unwrap_ddp(model: DistributedDataParallel) -> Unwrapped:
    # Imported late: it takes longer to import than all of tdfx.
    from tdfx.distributed.ddp import check_replicas, ranks_of, wrap_like

    ranks = ranks_of(model)
    with ranks.raise_on_all():
        inner = unwrap(model.module)
        check_replicas(model, ranks)
        recompile = compile_settings_of(model)

    def wrap(rewritten: nn.Module) -> nn.Module:
        wrapped = wrap_like(model, inner.wrap(rewritten))
        compile_in_place(wrapped, recompile)
        return wrapped

    return replace(inner, wrap=wrap, processes=ranks, compiled=inner.compiled or recompile is not None)


def _unwrap_fsdp(model: nn.Module, compiled: CompiledParts) -> Unwrapped:
    if compiled.wrapped:
        raise ModelError(_compiled_and_sharded(min(compiled.wrapped)))
    from tdfx.distributed.fsdp import Sharded  # imported late, as above

    sharded = Sharded(model)
    return Unwrapped(
        sharded.model, lambda rewritten: compiled.recompile(sharded.shard(rewritten)), sharded.ranks, shards=True
    )


def _check_wrapper(model: nn.Module) -> None:
    """Raise ModelError for a wrapper that tdfx cannot take off."""
    if isinstance(model, DataParallel | AveragedModel):
        raise ModelError(
            f"The model is wrapped in {type(model).__name__}, which keeps the parameters that it was given. Pass "
            f"model.module, and wrap the returned model again."
        )
    for path, module in model.named_modules():
        if is_instance_by_name(module, "FullyShardedDataParallel"):
            raise ModelError(
                f"{f'Its part {path!r}' if path else 'The model'} is wrapped in FullyShardedDataParallel, which keeps the "
                f"weights as slices of one flat parameter. Shard it with torch.distributed.fsdp.fully_shard instead, or "
                f"rewrite the model before it is wrapped."
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("The model is TorchScript, which cannot be rewritten. Pass the module it was made from.")


def is_instance_by_name(value: object, *names: str) -> bool:
    """Return True for an instance of a class, or of its subclass, with one of the names; the class need not be importable.

    >>> is_instance_by_name(nn.Conv2d(1, 1, 1), "Linear", "_ConvNd")
    True
    """
    return any(base.__name__ in names for base in type(value).__mro__)
