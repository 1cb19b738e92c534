"""A ``Switch`` inside of somebody else's trainer, which holds on to the model and writes checkpoints of its own."""

from __future__ import annotations

import inspect
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
from tdfx.integrations.follow import FollowCheckpoint, Names, factorize_like, names_of, put_in_order
from tdfx.kinds.registry import is_candidate
from tdfx.layers.factorized import Factorized
from tdfx.passes.analysis.observe import Inputs
from tdfx.plans.plan import Plan
from tdfx.policies.policy import Policy
from tdfx.training.switch.switch import Switch
from tdfx.training.switch.when import AtEpoch, AtStep, When
from tdfx.wrappers.compiled import is_wrapped
from tdfx.wrappers.in_place import InPlaceModule


class TrainerAdapter:
    """What the callbacks of all trainers have in common: they only say when what happens.

    Args:
        policy: As for ``Switch``.
        when: As for ``Switch``; or ``epoch``.
        epoch: Epochs before the switch; how many steps that is, the trainer knows.
        merge: Whether to merge the model when training ends.
        example_inputs: As for ``plan``; None to take the first batch that the model is called with.
        options: What else ``Switch`` is made with; without ``total_steps``, it is the trainer that says how many there are.
        advice: What an error says to do where factors are to be loaded and it is not known how they were split.

    Raises:
        PolicyError: A setting is out of range.
    """

    def __init__(
        self,
        policy: Policy | None,
        *,
        when: When | None,
        epoch: int | None,
        merge: bool,
        example_inputs: Inputs | None,
        options: Mapping[str, Any],
        advice: str,
    ) -> None:
        if (when is None) == (epoch is None):
            raise PolicyError(
                f"when={when!r} and epoch={epoch!r}: one of them says when to switch. Pass for example epoch=3, or "
                f"when=tdfx.AtStep(500), or when=tdfx.Settled(timeout=20_000)."
            )
        if epoch is not None:
            check_whole("epoch", epoch, "the epochs before the switch", "epoch=3")
        self.merge = merge
        self.merged = False
        self.advice = advice
        self._make: Callable[[When], Switch] = lambda one: Switch(policy, when=one, **options)
        self._epoch = epoch
        self._asks_for_total = "total_steps" not in options
        # With any step, if the right one is not known yet: settings that are wrong shall be found now.
        self.switch = self._make(when or AtStep(1))
        self._inputs = example_inputs
        self._saved: Mapping[str, Any] | None = None
        self._trained: tuple[nn.Module, Sequence[Optimizer]] | None = None
        self._capture: _Capture | None = None

    @property
    def replica(self) -> DistributedDataParallel | None:
        """The wrapper in which the model was seen to run; None where there is none, or it has not run yet."""
        return None if self._capture is None else self._capture.replica

    @property
    def plan(self) -> Plan | None:
        """All that was switched so far, or had been in the run whose state was loaded."""
        return self.switch.plan if self._saved is None else _plan_of(self._saved)

    def prepare(self, module: nn.Module, coming: Callable[[], Mapping[str, Any] | None] = lambda: None) -> None:
        """Let a module follow what will be loaded into it.

        Args:
            module: What will be trained.
            coming: Returns the state of the callback that comes with the weights, where that can be known.

        Raises:
            ModelError: It is a single layer.
        """
        if is_candidate(module) or isinstance(module, Factorized):
            raise ModelError(
                f"The module to be rewritten is a single {type(module).__name__}, in whose place another module would have "
                f"to stand. Name the module that holds it."
            )
        self.release(module)
        cast("Any", module).register_load_state_dict_pre_hook(
            FollowCheckpoint(lambda: _plan_of(coming()) or self.plan, self.advice)
        )

    def release(self, module: nn.Module) -> None:
        """Take everything off a module again."""
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, one in hooks.items() if isinstance(getattr(one, "hook", one), FollowCheckpoint)]:
            del hooks[key]
        if self._capture is not None:
            self._capture.remove()

    def factorize_as_saved(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Give a module, and what trains it, the form that the loaded state says."""
        plan = self.plan
        if plan is not None and not (self._saved or {}).get("merged", False):
            wanted = [one.parameter or one.name for one in plan.factorized]
            factorize_like(module, plan, wanted, self.advice, optimizers)

    def begin(
        self,
        part: InPlaceModule,
        optimizers: Sequence[Optimizer],
        *,
        steps_per_epoch: Callable[[], int],
        steps_left: int | None,
    ) -> None:
        """Training begins, or goes on from the state that was loaded, with the optimizers' states loaded too.

        Args:
            part: What is trained.
            optimizers: What trains it.
            steps_per_epoch: Returns how many optimizer steps an epoch has; called where the switch is at an epoch.
            steps_left: Optimizer steps until the training ends; None where the trainer does not know.
        """
        if self._epoch is not None and self.switch.plan is None and not self.switch.done:
            self.switch = self._make(AtEpoch(self._epoch, steps_per_epoch=steps_per_epoch()))
        saved, self._saved = self._saved, None
        if saved is not None:
            self.switch.load_state_dict(saved["switch"], optimizer=optimizers)
            self.merged = bool(saved["merged"])
            put_in_order(optimizers, saved["names"], part.model)
        if self._asks_for_total:
            # The switch may have counted other trainings, and the trainer steps of which the switch knows nothing.
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
        """Count an optimizer step, and switch if it is time.

        Args:
            part: What is trained.
            optimizers: What trains it.
            averaged: As for ``rewrite``.
            autocast: The context in which the model runs, and in which its layers are timed.

        Raises:
            ModelError: Several processes train it, and it is in no wrapper that is known here.
        """
        if part.ddp is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ModelError(
                f"{dist.get_world_size()} processes train this {type(part.target).__name__}, and it is not in "
                f"DistributedDataParallel, so that they could not switch together. Train with DDP, or in a loop of your "
                f"own with tdfx.Switch."
            )
        inputs = self._inputs
        if inputs is None and self._capture is not None:
            inputs = self._capture.inputs
        with autocast or nullcontext():
            made = self.switch.step(
                part,
                optimizer=optimizers,
                example_inputs=inputs,
                emit="modules",
                averaged=list(averaged) or None,
            )
        if made is not part:
            part.replace_with(made)

    def end(self, part: InPlaceModule, optimizers: Sequence[Optimizer], *, averaged: Sequence[Any] = ()) -> None:
        """Training ends: merge, if that was asked for."""
        layers = [one for one in part.target.modules() if isinstance(one, Factorized)]
        if not self.merge or not layers:
            # Its parameters may be others all the same, where the best checkpoint was loaded.
            part.rebuild_reducer()
            return
        held = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
        # Of a checkpoint that was loaded meanwhile the optimizers know nothing.
        trained = all(id(weight) in held for layer in layers for weight in layer.weights)
        part.replace_with(merge(part, optimizer=optimizers if trained else None, averaged=list(averaged) or None))
        self.merged = True

    def state_dict(self) -> dict[str, Any]:
        """Return in plain types and tensors what a resumed run needs beside model and optimizers."""
        if self._saved is not None:
            return dict(self._saved)
        names: Names = [] if self._trained is None else names_of(self._trained[1], self._trained[0])
        return {"switch": self.switch.state_dict(), "merged": self.merged, "names": names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state when training begins; until then it says what form the model is to have."""
        self._saved = state


def _plan_of(state: Mapping[str, Any] | None) -> Plan | None:
    text = None if state is None else state["switch"]["plan"]
    return None if text is None else Plan.from_json(text)


class _Capture:
    """Keeps the inputs of the first training step of a module, and finds the wrapper that it runs in."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: Inputs | None = None
        self._replica: weakref.ref[DistributedDataParallel] | None = None
        self._module = module
        # No part of what a compiler makes of the model.
        self._hook = cast("Any", torch.compiler).disable(self._see)
        module.register_forward_pre_hook(self._hook, with_kwargs=True)

    @property
    def replica(self) -> DistributedDataParallel | None:
        """The DistributedDataParallel in which the module ran, if there is one."""
        return None if self._replica is None else self._replica()

    def remove(self) -> None:
        """Stop looking; handles know nothing of a module that has become another."""
        for key in [key for key, one in self._module._forward_pre_hooks.items() if one is self._hook]:
            del self._module._forward_pre_hooks[key]
            self._module._forward_pre_hooks_with_kwargs.pop(key, None)

    def _see(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        # Lightning lends the forward of its module to other methods, whose inputs are not the model's.
        if module is not self._module or not module.training or not _is_its_own(module):
            return
        self.remove()
        active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        self._replica = None if active is None else weakref.ref(active)
        given = tree_map_only(Tensor, Tensor.detach, (args, named))
        self.inputs = _as_inputs(module, *given)


def _is_its_own(module: nn.Module) -> bool:
    return is_wrapped(module) or inspect.ismethod(module.forward)


def _as_inputs(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Inputs:
    """Return arguments as example inputs: by place, or all by name."""
    if not named:
        return args
    inner = module._orig_mod if is_wrapped(module) else module
    bound = inspect.signature(cast("nn.Module", inner).forward).bind(*args, **named)
    found: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        kind = bound.signature.parameters[key].kind
        found.update(value if kind is inspect.Parameter.VAR_KEYWORD else {key: value})
    return found
