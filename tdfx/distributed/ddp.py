"""Takes a model out of DistributedDataParallel, and wraps the rewritten model with the same settings."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tdfx.distributed.ranks import Ranks
from tdfx.errors import ModelError
from tdfx.layers.module_state import COMPILED, HOOKS, STATE_DICT_HOOKS

_NOT_COPIED = ("reducer", "logger", "process_group", "device_mesh", COMPILED)
"""Attributes that a new wrapper makes for itself, or that cannot be copied."""

_BUCKET_STATE = ("error_dict", "p_memory_dict", "q_memory_dict")
"""What the state of a PowerSGD hook keeps of each gradient bucket: errors and factors."""


def ranks_of(model: DistributedDataParallel) -> Ranks:
    """Return the processes that train the model of a wrapper."""
    return Ranks([model.process_group], model.device)


def check_replicas(model: DistributedDataParallel, ranks: Ranks) -> None:
    """Raise ModelError on all processes unless they hold the same model and its wrapper can be set up for another one."""
    if reason := _obstacle(model):
        raise ModelError(
            f"The model is in DistributedDataParallel with {reason}, which is bound to the parameters that it was set up "
            f"for. Pass model.module on every process, and wrap what comes back again."
        )
    named = model.module.named_parameters()
    parameters = [(name, tuple(parameter.shape), str(parameter.dtype)) for name, parameter in named]
    ranks.check_same(
        (type(model.module).__name__, model.training, parameters),
        "The processes of the DistributedDataParallel hold models of different structure or mode, so that they could not go "
        "through a rewrite together. Bring them to the same place in training before.",
    )


def wrap_like(model: DistributedDataParallel, rewritten: nn.Module) -> DistributedDataParallel:
    """Wrap another model with the settings, hooks and attributes of a wrapper, without any communication.

    All processes must hold the same values already. The old wrapper can be kept, but it must not run with gradients any
    more: both would wait for the gradients of shared parameters.
    """
    before, after = ({name for name, _ in module.named_parameters()} for module in (model.module, rewritten))
    if lost := sorted(model.parameters_to_ignore & (before - after)):
        raise ModelError(
            f"DistributedDataParallel ignores {lost[0]!r}, and the rewritten model has no such parameter, so its factors "
            f"would be reduced although the parameter was not. Keep that site: Policy(exclude=(...,))."
        )
    wrapper = object.__new__(type(model))
    _set_up(wrapper, model, rewritten)
    _stop_waiting(model)
    _SUCCESSORS[model] = weakref.ref(wrapper)
    return wrapper


_SUCCESSORS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DistributedDataParallel]] = weakref.WeakKeyDictionary()
"""Wrapper -> the wrapper that replaced it."""


def rebuild_reducer(model: DistributedDataParallel) -> None:
    """Set up a wrapper, or its successor, in place for the parameters that require gradients now, without communication.

    A wrapper waits for the gradients of the parameters that required them when it was made. All processes must call this at
    the same time, between an optimizer step and the next forward.
    """
    while model in _SUCCESSORS:
        successor = _SUCCESSORS[model]()
        if successor is None:
            return
        model = successor
    _stop_waiting(model)
    _set_up(model, model, model.module)


def _set_up(new: DistributedDataParallel, old: DistributedDataParallel, module: nn.Module) -> None:
    """Give a wrapper, which may be the old one itself, the old one's settings, for the parameters of a module."""
    group, ignored = old.process_group, old.parameters_to_ignore
    hooks = list(old._comm_hooks)
    builtin = "" if hooks else old._get_ddp_logging_data().get("comm_hook", "")  # type: ignore[no-untyped-call]
    state = {name: value for name, value in old.__dict__.items() if name not in _NOT_COPIED}
    state["_modules"] = {**old._modules, "module": module}
    for name in (*HOOKS, *STATE_DICT_HOOKS):
        state[name] = copy.copy(state[name])
    state["_module_parameters"] = [parameter for name, parameter in module.named_parameters() if name not in ignored]
    state.update(_comm_hooks=[], _has_rebuilt_buckets=False, _lazy_init_ran=False)
    state["_static_graph_delay_allreduce_enqueued"] = False
    # This is how a wrapper is restored from a pickle, without the checks and broadcasts of the constructor.
    new.__setstate__(state)  # type: ignore[no-untyped-call]
    if hasattr(old, "device_mesh"):
        new.device_mesh = old.device_mesh
    if new.process_group is not group:
        new._update_process_group(group)  # type: ignore[no-untyped-call]
    for hook, hook_state in hooks:
        new.register_comm_hook(_without_buckets(hook_state), hook)
    kinds = dist.BuiltinCommHookType  # type: ignore[attr-defined]
    for kind in (kinds.ALLREDUCE, kinds.FP16_COMPRESS):
        if builtin == str(kind):
            new._register_builtin_comm_hook(kind)  # type: ignore[no-untyped-call]


def _obstacle(model: DistributedDataParallel) -> str:
    """Return the setting for which a wrapper cannot be set up again, or an empty text."""
    if model.mixed_precision is not None:
        return "mixed_precision"
    if model._delay_all_reduce_params:
        return "delay_all_reduce_named_params"
    if model._use_python_reducer:
        return "the Python reducer (optimize_ddp='python_reducer')"
    fused = any("hook_then_optimizer" in getattr(hook, "__qualname__", "") for hook, _ in model._comm_hooks)
    if fused or any(hasattr(parameter, "_in_backward_optimizers") for parameter in model.module.parameters()):
        return "an optimizer that runs in the backward pass"
    return ""


def _without_buckets(state: Any) -> Any:
    """Return the state of a communication hook without what it keeps of each bucket."""
    if not all(hasattr(state, name) for name in _BUCKET_STATE):
        return state
    fresh = copy.copy(state)
    for name in _BUCKET_STATE:  # a PowerSGD state has slots
        setattr(fresh, name, {})
    return fresh


def _stop_waiting(model: DistributedDataParallel) -> None:
    """Let a wrapper no longer wait for the gradients of its last forward, which now go to another wrapper."""
    model.reducer._reset_state()
    model._has_rebuilt_buckets = False
