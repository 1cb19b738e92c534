"""What may be wrapped around a model in training, and how what comes of the model is wrapped again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from tdfx.distributed.processes import Agree, Lead, Ready, Spread, Together, alone, itself, unasked
from tdfx.errors import ModelError
from tdfx.wrappers.compiled import Compiled, compile_in_place, compile_settings_of, is_wrapped, wrap_compiled
from tdfx.wrappers.in_place import InPlaceModule


def _trusted(value: object, message: str) -> None:
    """Trust the only process there is."""


def _left(tensors: Iterable[Tensor]) -> None:
    """Leave the tensors of the only process there is."""


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A model out of its wrappers."""

    model: nn.Module
    """The model itself."""
    wrap: Callable[[nn.Module], nn.Module]
    """Wraps another model as this one was, with the same settings."""
    spread: Spread = alone
    """How the processes that train the model share work, so that each has the same bits."""
    agree: Agree = itself
    """From a value of plain types that each process has, to that of the first process; all must call it."""
    check_same: Callable[[object, str], None] = _trusted
    """Raises ModelError with a message on every process unless all have an equal value; all must call it."""
    level: Callable[[Iterable[Tensor]], None] = _left
    """Gives tensors that each process has computed the bits of the first process; all must call it."""
    together: Together = nullcontext
    """Makes a context in which what one process raises is raised on all; all must enter and leave it."""
    ready: Ready = unasked
    """Raises what another process has failed with; all must call it, before what they must do together."""
    shards: bool = False
    """True if each process holds a part of every parameter."""
    lead: Lead = field(default_factory=Lead)
    """Lets the first process do what all need not do."""


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
        with ranks.together():
            inner, replicas, again = unwrap(model.module), Replicas(model, ranks), compile_settings_of(model)

        def wrap(made: nn.Module) -> nn.Module:
            found = replicas.wrap(inner.wrap(made))
            compile_in_place(found, again)
            return found

        return replace(
            inner,
            wrap=wrap,
            spread=ranks.spread,
            agree=ranks.agree,
            check_same=ranks.check_same,
            level=ranks.level,
            lead=Lead(ranks.agree, ranks.leads),
            together=ranks.together,
            ready=ranks.ready,
        )
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
        ranks = sharded.ranks
        return Wrapped(
            sharded.plain,
            lambda made: compiled.again(sharded.shard(made)),
            spread=ranks.spread,
            agree=ranks.agree,
            check_same=ranks.check_same,
            together=ranks.together,
            ready=ranks.ready,
            shards=True,
            lead=Lead(ranks.agree, ranks.leads),
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
