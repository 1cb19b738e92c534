"""What may be wrapped around a model in training, and how what comes of the model is wrapped again."""

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
from tdfx.wrappers.compiled import Compiled, compile_in_place, compile_settings_of, is_wrapped, wrap_compiled
from tdfx.wrappers.in_place import InPlaceModule


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A model out of its wrappers."""

    model: nn.Module
    """The model itself."""
    wrap: Callable[[nn.Module], nn.Module]
    """Wraps another model as this one was, with the same settings."""
    processes: Processes = field(default_factory=Solo)
    """The processes that train the model together."""
    shards: bool = False
    """True if each process holds a part of every parameter."""


def unwrap(model: nn.Module) -> Wrapped:
    """Take a model out of ``torch.compile``, DistributedDataParallel and FSDP2.

    Raises:
        ModelError: It is no module, or is wrapped in what cannot be taken off and put on again.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}, not a torch.nn.Module. Pass the module that you train.")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ModelError(
            "A CUDA graph is being captured, and what a rewrite computes must not be replayed with every step. Do it before "
            "the capture, and capture graphs of the old model anew afterwards: they hold on to its weights."
        )
    if isinstance(model, InPlaceModule):
        return _unwrap_part(model)
    if is_wrapped(model):
        inner = unwrap(cast("nn.Module", model._orig_mod))
        return replace(inner, wrap=lambda made: wrap_compiled(model, inner.wrap(made)))
    if isinstance(model, DistributedDataParallel):
        from tdfx.distributed.ddp import Replicas  # as below

        ranks = Replicas.ranks_of(model)
        with ranks.raise_on_all():
            inner, replicas = unwrap(model.module), Replicas(model, ranks)
            recompile = compile_settings_of(model)

        def wrap(rewritten: nn.Module) -> nn.Module:
            wrapped = replicas.wrap(inner.wrap(rewritten))
            compile_in_place(wrapped, recompile)
            return wrapped

        return replace(inner, wrap=wrap, processes=ranks)
    _refuse(model)
    compiled = Compiled.of(model)
    if any(_is_a(one, "FSDPModule") for one in model.modules()):
        if compiled.wrapped:
            raise ModelError(
                f"Its part {min(compiled.wrapped)!r} is wrapped by torch.compile, around or inside of which fully_shard was "
                f"called, so it cannot be taken out of both. Compile the part in place, part.compile(), or compile "
                f"the model as a whole."
            )
        from tdfx.distributed.fsdp import Sharded  # it takes longer to import than all of tdfx

        sharded = Sharded(model)
        return Wrapped(
            sharded.plain,
            lambda rewritten: compiled.again(sharded.shard(rewritten)),
            processes=sharded.ranks,
            shards=True,
        )
    return Wrapped(compiled.plain(model), compiled.again)


def _unwrap_part(part: InPlaceModule) -> Wrapped:
    """Return the module that a part stands for, with the agreement of the processes that train the whole."""
    inner = unwrap(part.inside)
    if inner.shards:
        raise ModelError(
            f"{type(part.inside).__name__} is sharded by fully_shard, which keeps account of the modules that it was called "
            f"on, so none of them can become another in place. Rewrite it in a loop of your own, with tdfx.Switch."
        )
    return inner if part.replica is None else replace(unwrap(part.replica), model=inner.model, wrap=inner.wrap)


def _refuse(model: nn.Module) -> None:
    for wrapper in (DataParallel, AveragedModel):
        if isinstance(model, wrapper):
            raise ModelError(
                f"The model is wrapped in {wrapper.__name__}, which holds on to the parameters it was given. Pass "
                f"model.module, and wrap what comes back again."
            )
    sharded = [name for name, one in model.named_modules() if _is_a(one, "FullyShardedDataParallel")]
    if sharded:
        where = f"Its part {sharded[0]!r}" if sharded[0] else "The model"
        raise ModelError(
            f"{where} is wrapped in FullyShardedDataParallel, which keeps the weights as slices of one flat parameter. "
            f"Shard it with torch.distributed.fsdp.fully_shard instead, or rewrite the model before it is wrapped."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("The model is TorchScript, which cannot be rewritten. Pass the module it was made from.")


def _is_a(module: nn.Module, kind: str) -> bool:
    # By name, because importing the class takes longer than all of tdfx.
    return any(one.__name__ == kind for one in type(module).__mro__)
