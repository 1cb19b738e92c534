"""``TrainerAdapter``: run a ``Switch`` inside the trainer of another framework.

A trainer keeps its own references to the model and writes its own checkpoints. So the model is rewritten in place, follows
the form of a checkpoint that is loaded, and the state of the switch is saved with the trainer's checkpoints.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from tdfx.api import merge
from tdfx.checks import check_whole
from tdfx.errors import ModelError, PolicyError
from tdfx.integrations.follow import FollowCheckpoint, Names, factorize_like, names_of, restore_order
from tdfx.kinds.registry import is_candidate
from tdfx.layers.factorized import Factorized
from tdfx.passes.analysis.observe import Inputs
from tdfx.plans.plan import Plan
from tdfx.policies.policy import Policy
from tdfx.training.methods.step_hooks import groups_by_parameter
from tdfx.training.switch.switch import Switch
from tdfx.training.switch.when import AtEpoch, AtStep, When
from tdfx.wrappers.compiled import inner_module, is_wrapped
from tdfx.wrappers.in_place import InPlaceModule


class TrainerAdapter:
    """The base of the callbacks of all trainers. A callback calls these methods at the right moments of its trainer.

    Args:
        policy: What to rewrite and how far; ``tdfx.Policy()`` if left out.
        when: ``tdfx.AtStep``, ``tdfx.AtEpoch`` or ``tdfx.Settled``, in optimizer steps; or pass ``epoch``.
        epoch: Epochs before the switch, at least 1.
        merge: Whether to merge at the end of training, so that what is saved afterwards has the original keys.
        example_inputs: Inputs of the module, to time its layers; the first batch if left out.
        options: Other arguments of ``tdfx.Switch``: ``rewarm``, ``recompile_seconds``, ``total_steps`` (the trainer's own
            number if left out; None to switch even if that takes longer than it saves).

    Raises:
        PolicyError: A setting is out of range.
    """

    switch: Switch
    """The switch; ``print(callback.switch)`` shows its decisions."""
    advice = ""
    """What an error tells the user to do if factors are loaded and it is not known how they were split."""

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        when: When | None = None,
        epoch: int | None = None,
        merge: bool = True,
        example_inputs: Inputs | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if (when is None) == (epoch is None):
            raise PolicyError(
                f"when={when!r} and epoch={epoch!r}: exactly one of them must say when to switch. Pass for example epoch=3, "
                f"or when=tdfx.AtStep(500), or when=tdfx.Settled(timeout=20_000)."
            )
        if epoch is not None:
            check_whole("epoch", epoch, "the epochs before the switch", "epoch=3")
        self.merge = merge
        self.merged = False
        self._make_switch: Callable[[When], Switch] = lambda when: Switch(policy, when=when, **options)
        self._epoch = epoch
        self._takes_total_steps = "total_steps" not in options
        # The step of an epoch is known only when training begins; any step does to check the settings now.
        self.switch = self._make_switch(when or AtStep(1))
        self._inputs = example_inputs
        self._saved: Mapping[str, Any] | None = None
        self._trained: tuple[nn.Module, Sequence[Optimizer]] | None = None
        self._capture: _Capture | None = None

    @property
    def replica(self) -> DistributedDataParallel | None:
        """The DistributedDataParallel in which the model ran; None if there is none, or it has not run yet."""
        return None if self._capture is None else self._capture.replica()

    @property
    def plan(self) -> Plan | None:
        """The plan of what was switched, in this run or in the run whose state was loaded; None for nothing."""
        return self.switch.plan if self._saved is None else _plan_of(self._saved)

    def prepare(
        self, module: nn.Module, checkpoint_state: Callable[[], Mapping[str, Any] | None] = lambda: None
    ) -> None:
        """Let a module, which must not be a single layer, take the form of each checkpoint that is loaded into it.

        ``checkpoint_state`` returns the callback's state in the checkpoint that is being loaded, if it is known.
        """
        if is_candidate(module) or isinstance(module, Factorized):
            raise ModelError(
                f"The module to be rewritten is a single {type(module).__name__}, which a rewrite replaces by a module of "
                f"another class. Name the module that holds it."
            )
        self.release(module)
        cast("Any", module).register_load_state_dict_pre_hook(
            FollowCheckpoint(lambda: _plan_of(checkpoint_state()) or self.plan, self.advice)
        )

    def release(self, module: nn.Module) -> None:
        """Remove all hooks from a module."""
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", hook), FollowCheckpoint)]:
            del hooks[key]
        if self._capture is not None:
            self._capture.remove()

    def factorize_as_saved(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Give a module and its optimizers the form that they had in the loaded state."""
        if (plan := self.plan) is not None and not (self._saved or {}).get("merged", False):
            paths = [site.parameter or site.name for site in plan.factorized]
            factorize_like(module, plan, paths, self.advice, optimizers)

    def begin(
        self,
        part: InPlaceModule,
        optimizers: Sequence[Optimizer],
        *,
        steps_per_epoch: Callable[[], int],
        steps_left: int | None,
    ) -> None:
        """Begin training, or go on from the loaded state; the states of the optimizers are loaded already.

        Args:
            part: The module that is trained.
            optimizers: The optimizers that train it.
            steps_per_epoch: Returns how many optimizer steps an epoch has; called only for a switch at an epoch.
            steps_left: Optimizer steps until the training ends; None if the trainer does not know.
        """
        if self._epoch is not None and self.switch.plan is None and not self.switch.done:
            self.switch = self._make_switch(AtEpoch(self._epoch, steps_per_epoch=steps_per_epoch()))
        saved, self._saved = self._saved, None
        if saved is not None:
            self.switch.load_state_dict(saved["switch"], optimizer=optimizers)
            self.merged = bool(saved["merged"])
            restore_order(optimizers, saved["names"], part.model)
        if self._takes_total_steps:
            # The switch counts its own steps, and the trainer may have taken others before or after.
            self.switch.total_steps = None if steps_left is None else self.switch.steps + max(1, steps_left)
        self._trained = part.model, optimizers
        self._capture = _Capture(part.wrapped_target)

    def step(
        self,
        part: InPlaceModule,
        optimizers: Sequence[Optimizer],
        *,
        averaged: Sequence[Any] = (),
        autocast: AbstractContextManager[Any] | None = None,
    ) -> None:
        """Count an optimizer step of a part, and switch if it is time.

        Args:
            part, optimizers: As for ``begin``.
            averaged: As for ``rewrite``.
            autocast: The context in which the model runs and in which its layers are timed.

        Raises:
            ModelError: Several processes train it, and it is not in DistributedDataParallel.
        """
        if part.ddp is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ModelError(
                f"{dist.get_world_size()} processes train this {type(part.target).__name__}, and it is not in "
                f"DistributedDataParallel, so they could not switch together. Train with DDP, or in a loop of your own with "
                f"tdfx.Switch."
            )
        inputs, averages = self._inputs, list(averaged) or None
        if inputs is None and self._capture is not None:
            inputs = self._capture.inputs
        with autocast or nullcontext():
            rewritten = self.switch.step(
                part, optimizer=optimizers, example_inputs=inputs, emit="modules", averaged=averages
            )
        if rewritten is not part:
            part.replace_with(rewritten)

    def end(self, part: InPlaceModule, optimizers: Sequence[Optimizer], *, averaged: Sequence[Any] = ()) -> None:
        """End training: merge, if that was asked for."""
        layers = [module for module in part.target.modules() if isinstance(module, Factorized)]
        if not self.merge or not layers:
            # The trainer may have loaded its best checkpoint, with other parameters.
            part.rebuild_reducer()
            return
        held = set().union(*map(groups_by_parameter, optimizers))
        # The optimizers do not hold the factors of a checkpoint that was loaded in the meantime.
        trained = all(id(weight) in held for layer in layers for weight in layer.weights)
        part.replace_with(merge(part, optimizer=optimizers if trained else None, averaged=list(averaged) or None))
        self.merged = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside model and optimizers, in plain types and tensors."""
        if self._saved is not None:
            return dict(self._saved)
        names: Names = [] if self._trained is None else names_of(self._trained[1], self._trained[0])
        return {"switch": self.switch.state_dict(), "merged": self.merged, "names": names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a state until training begins; until then it says which form the model has in a checkpoint."""
        self._saved = state


def _plan_of(state: Mapping[str, Any] | None) -> Plan | None:
    text = None if state is None else state["switch"]["plan"]
    return None if text is None else Plan.from_json(text)


def steps_per_epoch(batches: float, accumulated: int) -> int:
    """Return how many optimizer steps an epoch has; raise ModelError if the number of batches is infinite."""
    if not math.isfinite(batches):
        raise ModelError(
            "The training data has no length, so it is not known how many steps an epoch has. Pass when=tdfx.AtStep(...) in "
            "place of epoch=."
        )
    return math.ceil(batches / accumulated)


class _Capture:
    """A hook that keeps the inputs of the first training step of a module, and the DistributedDataParallel around it."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: Inputs | None = None
        self.replica: Callable[[], DistributedDataParallel | None] = lambda: None
        """Returns the DistributedDataParallel in which the module ran, if there is one."""
        self._module = module
        # A compiled model must not trace into the hook.
        self._hook = cast("Any", torch.compiler).disable(self._keep)
        module.register_forward_pre_hook(self._hook, with_kwargs=True)

    def remove(self) -> None:
        """Remove the hook; a handle would not find it in a module that was replaced in place."""
        for key in [key for key, hook in self._module._forward_pre_hooks.items() if hook is self._hook]:
            del self._module._forward_pre_hooks[key]
            self._module._forward_pre_hooks_with_kwargs.pop(key, None)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Lightning replaces the forward of its module by other methods for a while, whose inputs are not the model's.
        has_own_forward = is_wrapped(module) or inspect.ismethod(module.forward)
        if module is not self._module or not module.training or not has_own_forward:
            return
        self.remove()
        active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if active is not None:
            self.replica = weakref.ref(active)
        self.inputs = _as_inputs(module, *tree_map_only(Tensor, Tensor.detach, (args, kwargs)))


def _as_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Return arguments as example inputs: positional, or all by name."""
    if not kwargs:
        return args
    bound = inspect.signature(inner_module(module).forward).bind(*args, **kwargs)
    inputs: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        kind = bound.signature.parameters[key].kind
        inputs.update(value if kind is inspect.Parameter.VAR_KEYWORD else {key: value})
    return inputs
