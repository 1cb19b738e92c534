"""``TrainerAdapter``: run a ``Switch`` inside the trainer of another framework.

A trainer keeps its own references to the model and writes its own checkpoints. So the model is rewritten in place, follows
the form of a checkpoint that is loaded, and the state of the switch is saved with the trainer's checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tdfx.api import merge, record_dense
from tdfx.errors import ModelError
from tdfx.integrations.capture import Capture
from tdfx.integrations.copies import Copies
from tdfx.integrations.follow import FollowCheckpoint, Names, factorize_like, names_of, restore_order, sites_of
from tdfx.integrations.moment import Moment
from tdfx.kinds.registry import is_candidate
from tdfx.layers.factorized import Factorized
from tdfx.optim.averages import as_holders
from tdfx.passes.analysis.observe import Inputs
from tdfx.plans.plan import Plan
from tdfx.policies.policy import Policy
from tdfx.training.methods.step_hooks import groups_by_parameter
from tdfx.training.switch.switch import Switch
from tdfx.training.switch.when import AtStep, When
from tdfx.wrappers.in_place import InPlaceModule
from tdfx.wrappers.unwrap import unwrap


class TrainerAdapter:
    """The base of the callbacks of all trainers. A callback calls these methods at the right moments of its trainer.

    Args:
        policy: What to rewrite and how far; ``tdfx.Policy()`` if left out.
        when: ``tdfx.AtStep``, ``tdfx.AtEpoch`` or ``tdfx.Settled``, in optimizer steps. With neither this nor ``epoch``, it
            is an early step, as ``Switch`` chooses it from the total number of steps, which the trainer knows.
        epoch: Epochs before the switch, at least 1; in the place of ``when``.
        merge: Whether to merge at the end of training, so that what is saved afterwards has the original keys.
        example_inputs: Inputs of the module, to time its layers; the first batch if left out.
        averaged: Averages of the model that others keep, as for ``rewrite``, or a function that returns them. Those that the
            trainer's callbacks keep are found without it.
        options: Other arguments of ``tdfx.Switch``: ``rewarm``, ``recompile_seconds``, ``collect``, ``total_steps`` (the
            trainer's own number if left out; None to switch even if that takes longer than it saves).

    Raises:
        PolicyError: A setting is out of range.
    """

    switch: Switch
    """The switch; ``print(callback.switch)`` shows its decisions."""
    key = ""
    """Which part of the model is rewritten, if there are several callbacks."""
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
        averaged: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.merge = merge
        self.merged = False
        self._make_switch: Callable[[When], Switch] = lambda when: Switch(policy, when=when, **options)
        self._moment = Moment(when, epoch)
        self._takes_total_steps = "total_steps" not in options
        self._total_steps: int | None = options.get("total_steps")
        # The step is known only when training begins; any step does to check the settings now.
        self.switch = self._make_switch(when or AtStep(1))
        self._inputs, self._averaged = example_inputs, averaged
        self._saved: Mapping[str, Any] | None = None
        self._trained: tuple[nn.Module, Sequence[Optimizer]] | None = None
        self._capture: Capture | None = None
        self._running: tuple[InPlaceModule, Sequence[Optimizer]] | None = None
        """The module and the optimizers of the training that is under way."""

    @property
    def replica(self) -> DistributedDataParallel | None:
        """The DistributedDataParallel in which the model ran; None if there is none, or it has not run yet."""
        return None if self._capture is None else self._capture.replica()

    @property
    def plan(self) -> Plan | None:
        """The plan of what was switched, in this run or in the run whose state was loaded; None for nothing."""
        return self.switch.plan if self._saved is None else _plan_of(self._saved)

    def prepare(
        self,
        module: nn.Module,
        checkpoint_state: Callable[[], Mapping[str, Any] | None] = lambda: None,
        locate: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        """Let a module, or the part of it that is rewritten, take the form of each checkpoint that is loaded into it.

        Args:
            module: The module, in which the part need not exist yet.
            checkpoint_state: Returns the callback's state in the checkpoint that is being loaded, if it is known.
            locate: Returns the part of the module, or of a copy of it; it must not be a single layer.
        """
        self.release(module)
        follow = FollowCheckpoint(lambda: _plan_of(checkpoint_state()) or self.plan, self.advice, locate, self.key)
        cast("Any", module).register_load_state_dict_pre_hook(follow)

    def release(self, module: nn.Module) -> None:
        """Remove all hooks from a module, also those of an earlier callback for the same part."""
        hooks = module._load_state_dict_pre_hooks
        for number, hook in [(number, getattr(hook, "hook", hook)) for number, hook in hooks.items()]:
            if isinstance(hook, FollowCheckpoint) and hook.key == self.key:
                del hooks[number]
        if self._capture is not None:
            self._capture.remove()
        self._running = None
        self.switch.pause()

    def factorize_as_saved(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Give a module and its optimizers the form that they had in the loaded state."""
        if (plan := self.plan) is not None and not (self._saved or {}).get("merged", False):
            factorize_like(InPlaceModule(module), plan, sites_of(plan), self.advice, optimizers)

    def factorize_like_state(
        self, part: InPlaceModule, state: Mapping[str, Any], optimizers: Sequence[Optimizer] = ()
    ) -> None:
        """Give a module, which may be sharded, the form that it had when a state was saved, dense or factorized."""
        plan = None if state["merged"] else _plan_of(state)
        factorize_like(part, plan, [] if plan is None else sites_of(plan), self.advice, optimizers)

    def begin(
        self,
        part: InPlaceModule,
        optimizers: Sequence[Optimizer],
        *,
        steps_per_epoch: Callable[[], int],
        steps_left: int | None,
        length: int | None = None,
    ) -> None:
        """Begin training, or go on from the loaded state; the states of the optimizers are loaded already.

        Args:
            part: The module that is trained.
            optimizers: The optimizers that train it.
            steps_per_epoch: Returns how many optimizer steps an epoch has; called only for a switch at an epoch.
            steps_left: Optimizer steps until the training ends; None if the trainer does not know.
            length: Optimizer steps from which an early step is chosen, where they are known better than ``steps_left``.

        Raises:
            ModelError: Several processes train it, and cannot switch together.
            PolicyError: The state was saved with other settings, or no early step can be chosen.
            OptimizerError: The optimizers hold other parameters than those of the state.
        """
        check_not_layer(part.target)
        _check_processes(part)
        saved = self._saved if self._saved is not None and _has_begun(self._saved) else None
        switch = self.switch
        if saved is not None and not saved["merged"]:
            state, when = self._moment.resumed(saved["switch"], steps_per_epoch)
            switch = self._make_switch(when)
            switch.load_state_dict(state, optimizer=optimizers)
        elif saved is not None or not self._goes_on(part.model):
            switch = self._make_switch(self._moment.first(steps_per_epoch, self._total_steps or length or steps_left))
        if saved is not None:
            # Checkpoints of shards hold the states by the names of the parameters.
            restore_order(optimizers, saved["names"], part.model, states=not part.is_sharded)
        self.switch, self.merged = switch, False
        self._saved = None
        if self._takes_total_steps:
            # The switch counts its own steps, and the trainer may have taken others before or after.
            self.switch.total_steps = None if steps_left is None else self.switch.steps + max(1, steps_left)
        self._trained = part.model, optimizers
        self._capture = Capture(part.wrapped_target)
        self._running = part, optimizers
        self.switch.begin(part)

    def _goes_on(self, model: nn.Module) -> bool:
        """Return True if the switch has counted steps of this model, which may be trained several times before a merge."""
        is_same = self._trained is not None and self._trained[0] is model
        return is_same and self.switch.steps > 0 and not self.merged

    def step(
        self,
        part: InPlaceModule,
        optimizers: Sequence[Optimizer],
        *,
        holders: Sequence[object] = (),
        autocast: AbstractContextManager[Any] | None = None,
    ) -> bool:
        """Count an optimizer step of a part, and switch if it is time.

        Args:
            part, optimizers: As for ``begin``.
            holders: The objects that may keep averages or other copies of the model, such as the other callbacks.
            autocast: The context in which the model runs and in which its layers are timed.

        Returns:
            True if it was rewritten.

        Raises:
            ModelError: Several processes train it, and it is neither in DistributedDataParallel nor sharded by FSDP2.
        """
        _check_processes(part)
        part.reshard()
        inputs = self._inputs
        averages: list[Any] | None = None
        if self.switch.due:
            copies = Copies(part.model, part.target)
            averages = self._averages(copies, holders)
            copies.warn_of_others(holders, averages)
        if inputs is None and self._capture is not None:
            inputs = self._capture.inputs
        with autocast or nullcontext():
            rewritten = self.switch.step(
                part, optimizer=optimizers, example_inputs=inputs, emit="modules", averaged=averages
            )
        if rewritten is part:
            return False
        part.replace_with(rewritten)
        return True

    def _averages(self, copies: Copies, holders: Sequence[object]) -> list[Any]:
        """Return the averages of the module that is rewritten: those that the user passed, and those of others."""
        passed = self._averaged
        if callable(passed) and not hasattr(passed, "module"):  # an AveragedModel can be called, too
            passed = passed()
        averages = [copies.as_average(average) for average in as_holders(passed)]
        modules = {id(average.module) for average in averages}
        return averages + [average for average in copies.averages(holders) if id(average.module) not in modules]

    @property
    def is_merge_due(self) -> bool:
        """True if a training is under way whose module holds factors that will be merged at its end."""
        running = self._running
        return (
            self.merge and running is not None and any(isinstance(m, Factorized) for m in running[0].target.modules())
        )

    def end(self, part: InPlaceModule, optimizers: Sequence[Optimizer], *, holders: Sequence[object] = ()) -> None:
        """End training: merge, if that was asked for; ``holders`` are as for ``step``."""
        self._running = None
        self.switch.pause()
        part.reshard()
        layers = [module for module in part.target.modules() if isinstance(module, Factorized)]
        if not layers and self.switch.done:
            record_dense(part.model)
        if not self.merge or not layers:
            # The trainer may have loaded its best checkpoint, with other parameters.
            part.rebuild_reducer()
            return
        held = set().union(*map(groups_by_parameter, optimizers))
        # The optimizers do not hold the factors of a checkpoint that was loaded in the meantime.
        trained = all(id(weight) in held for layer in layers for weight in layer.weights)
        averages = self._averages(Copies(part.model, part.target), holders)
        # They are dense if they were merged before the trainer loaded such a checkpoint.
        averages = [average for average in averages if any(isinstance(m, Factorized) for m in average.module.modules())]
        part.replace_with(merge(part, optimizer=optimizers if trained else None, averaged=averages))
        record_dense(part.model)
        self.merged = True

    def average(self) -> None:
        """Average what the processes have collected, before one of them saves it for all; all must call this together."""
        if self._running is not None and (self._running[0].ddp is not None or self._running[0].is_sharded):
            self.switch.average(self._running[0])

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside model and optimizers, in plain types and tensors."""
        if self._saved is not None:
            return dict(self._saved)
        names: Names = []
        if self._trained is not None:
            InPlaceModule(self._trained[0]).reshard()
            names = names_of(self._trained[1], self._trained[0])
        return {"switch": self.switch.state_dict(), "merged": self.merged, "names": names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a state until training begins; until then it says which form the model has in a checkpoint.

        In a training that is under way, as a learning rate finder goes back to its start, it is loaded at once.
        """
        if self._running is None:
            self._saved = state
            return
        part, optimizers = self._running
        self.switch.load_state_dict(state["switch"], optimizer=optimizers)
        self.merged = bool(state["merged"])
        self.switch.begin(part)


def check_not_layer(module: nn.Module) -> None:
    """Raise ModelError if a module is a single layer, which cannot be rewritten in place."""
    if is_candidate(module) or isinstance(module, Factorized):
        raise ModelError(
            f"The module to be rewritten is a single {type(module).__name__}, which a rewrite replaces by a module of "
            f"another class. Name the module that holds it."
        )


def refuse_engine(engine: str, instead: str) -> None:
    """Raise ModelError: the model is sharded by an engine whose shards cannot be rewritten; FSDP2 can be used instead."""
    raise ModelError(
        f"The training uses {engine}, which keeps the parameters in a form that cannot be rewritten in the middle of it. "
        f"Train with FSDP2, {instead}, or with DDP."
    )


def _check_processes(part: InPlaceModule) -> None:
    """Raise ModelError unless all processes that train a module can rewrite it together."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and part.ddp is None and not part.is_sharded:
        raise ModelError(
            f"{dist.get_world_size()} processes train this {type(part.target).__name__}, and it is neither in "
            f"DistributedDataParallel nor sharded by fully_shard (FSDP2), so they could not switch together. Train with DDP "
            f"or FSDP2, or in a loop of your own with tdfx.Switch."
        )
    if part.is_sharded:
        unwrap(part)  # refuses other kinds of parallelism, and uses of FSDP2 that are not supported


def _has_begun(state: Mapping[str, Any]) -> bool:
    """Return True if a state is that of a training; trainers also save checkpoints before any."""
    switch = state["switch"]
    return bool(switch["step"] or switch["done"] or switch["plan"])


def _plan_of(state: Mapping[str, Any] | None) -> Plan | None:
    text = None if state is None else state["switch"]["plan"]
    return None if text is None else Plan.from_json(text)
