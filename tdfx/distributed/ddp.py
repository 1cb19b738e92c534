"""Models in DistributedDataParallel: out of it, and into it again with the same settings."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tdfx.distributed.ranks import Ranks
from tdfx.errors import ModelError
from tdfx.layers.copying import COMPILED, HOOKS

_HOOKS = (
    *HOOKS,
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_OWN = ("reducer", "logger", "process_group", "device_mesh", COMPILED)
"""What belongs to one wrapper alone, or must not be copied."""


class Replicas:
    """A model in DistributedDataParallel, whose processes each hold all of it."""

    def __init__(self, model: DistributedDataParallel, ranks: Ranks) -> None:
        """Take a wrapper, once its processes were found to hold the same model.

        Args:
            model: The wrapper.
            ranks: Its processes, each of which must make this call.

        Raises:
            ModelError: They do not, or the wrapper is used in a way that cannot be set up again.
        """
        reason = _obstacle(model)
        if reason:
            raise ModelError(
                f"The model is in DistributedDataParallel with {reason}, which is bound to the parameters that it was set "
                f"up for. Pass model.module on every process, and wrap what comes back again."
            )
        self.model = model
        held = [(name, tuple(one.shape), str(one.dtype)) for name, one in model.module.named_parameters()]
        ranks.check_same(
            (type(model.module).__name__, model.training, held),
            "The processes of the DistributedDataParallel hold models of different structure or mode, so that they could "
            "not go through a rewrite together. Bring them to the same place in training before.",
        )

    @classmethod
    def ranks_of(cls, model: DistributedDataParallel) -> Ranks:
        """Return the processes that train the model of a wrapper."""
        return Ranks([model.process_group], model.device)

    def wrap(self, made: nn.Module) -> DistributedDataParallel:
        """Wrap another model with the settings, hooks and attributes of this one, sending nothing.

        All processes must hold the same values already: those that both models have do so since this one was wrapped. The
        former wrapper can be kept, but must not run with gradients any more: both would wait for those of what they share.

        Raises:
            ModelError: This one was told to leave alone a parameter that the other does not have.
        """
        _check_ignored(self.model, made)
        new = object.__new__(type(self.model))
        _set_up(new, self.model, made)
        _let_go(self.model)
        _FOLLOWERS[self.model] = weakref.ref(new)
        return new


_FOLLOWERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DistributedDataParallel]] = weakref.WeakKeyDictionary()
"""Wrapper -> the one that took its place."""


def renew(model: DistributedDataParallel) -> None:
    """Set a wrapper up again, in place, for the parameters that require gradients now, sending nothing.

    A wrapper reduces the gradients of those that required some when it was made, and waits for all of them. Where another
    wrapper has taken the place of this one, that one is set up again. All processes must do this at the same time, between
    an optimizer step and the next forward.
    """
    while model in _FOLLOWERS:
        follower = _FOLLOWERS[model]()
        if follower is None:
            return
        model = follower
    _let_go(model)
    _set_up(model, model, model.module)


def _set_up(new: DistributedDataParallel, old: DistributedDataParallel, made: nn.Module) -> None:
    """Give a wrapper, which may be the old one itself, what the old one has, for the parameters of a given model."""
    group, ignored = old.process_group, old.parameters_to_ignore
    hooks = list(old._comm_hooks)
    builtin = "" if hooks else old._get_ddp_logging_data().get("comm_hook", "")  # type: ignore[no-untyped-call]
    state = {name: value for name, value in old.__dict__.items() if name not in _OWN}
    state["_modules"] = {**old._modules, "module": made}
    for name in _HOOKS:
        state[name] = copy.copy(state[name])
    state["_module_parameters"] = [one for name, one in made.named_parameters() if name not in ignored]
    state.update(_comm_hooks=[], _has_rebuilt_buckets=False, _lazy_init_ran=False)
    state["_static_graph_delay_allreduce_enqueued"] = False
    # This is how a wrapper is made from a pickled one, without the checks and broadcasts of its constructor.
    new.__setstate__(state)  # type: ignore[no-untyped-call]
    if hasattr(old, "device_mesh"):
        new.device_mesh = old.device_mesh
    if new.process_group is not group:
        new._update_process_group(group)  # type: ignore[no-untyped-call]
    _carry_communication(new, hooks, builtin)


def _obstacle(model: DistributedDataParallel) -> str:
    if model.mixed_precision is not None:
        return "mixed_precision"
    if model._delay_all_reduce_params:
        return "delay_all_reduce_named_params"
    if model._use_python_reducer:
        return "the Python reducer (optimize_ddp='python_reducer')"
    fused = any(
        "hook_then_optimizer" in hook.__qualname__ for hook, _ in model._comm_hooks if hasattr(hook, "__qualname__")
    )
    if fused or any(hasattr(one, "_in_backward_optimizers") for one in model.module.parameters()):
        return "an optimizer that runs in the backward pass"
    return ""


def _check_ignored(old: DistributedDataParallel, made: nn.Module) -> None:
    held = {name for name, _ in old.module.named_parameters()}
    now = {name for name, _ in made.named_parameters()}
    lost = sorted(old.parameters_to_ignore & (held - now))
    if lost:
        raise ModelError(
            f"DistributedDataParallel was told to leave {lost[0]!r} alone, and the model that comes of this has no such "
            f"parameter, so what comes in its place would be trained in another way. Keep that site: "
            f"Policy(exclude=(...,))."
        )


def _carry_communication(new: DistributedDataParallel, hooks: list[tuple[Any, Any]], builtin: str) -> None:
    """Register the hooks that reduce gradients; what a hook keeps of its old buckets is left behind."""
    for hook, state in hooks:
        new.register_comm_hook(_without_buckets(state), hook)
    if hooks:
        return
    kinds = dist.BuiltinCommHookType  # type: ignore[attr-defined]
    for kind in (kinds.ALLREDUCE, kinds.FP16_COMPRESS):
        if builtin == str(kind):
            new._register_builtin_comm_hook(kind)  # type: ignore[no-untyped-call]


def _without_buckets(state: Any) -> Any:
    """Return the state of a hook for other buckets: PowerSGD keeps errors and factors of each."""
    names = ("error_dict", "p_memory_dict", "q_memory_dict")
    if not all(hasattr(state, name) for name in names):
        return state
    made = copy.copy(state)
    for name in names:
        setattr(made, name, {})
    return made


def _let_go(model: DistributedDataParallel) -> None:
    """Let a wrapper no longer wait for the gradients of a forward pass that it saw: they come to another one now."""
    model.reducer._reset_state()
    model._has_rebuilt_buckets = False
