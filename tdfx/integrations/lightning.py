"""A callback for Lightning's Trainer; ``pip install 'tdfx[lightning]'``."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tdfx.integrations.adapter import TrainerAdapter, check_not_layer, refuse_engine
from tdfx.integrations.held import held_layers, warn_of_held
from tdfx.integrations.moment import steps_per_epoch
from tdfx.layers.holders import Held
from tdfx.policies.policy import Policy
from tdfx.wrappers.in_place import InPlaceModule

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
        from pytorch_lightning.callbacks import Checkpoint
        from pytorch_lightning.utilities.exceptions import MisconfigurationException
    except ImportError as error:
        raise ImportError(
            "tdfx.integrations.lightning is a callback for Lightning, which is not installed. Install it: "
            "pip install 'tdfx[lightning]'"
        ) from error

_REFUSED = {"DeepSpeedStrategy", "FSDPStrategy", "XLAFSDPStrategy"}
"""The strategies of Lightning that shard the model in a form that cannot be rewritten."""


class SwitchCallback(TrainerAdapter, Callback):  # type: ignore[misc]
    """Factorizes the module of a Lightning ``Trainer`` in the middle of training, and merges it at the end.

    The module stays the same object, with its class and methods; only its layers change. Optimizers, schedulers, gradient
    accumulation, precision and DDP stay the Trainer's. To resume from a checkpoint, from before, at or after the switch, put
    the same callback into the Trainer: the weights become those of a run without interruption. An ``AveragedModel`` in the
    module or in another callback is rewritten too, and so is the average of ``WeightAveraging`` and of
    ``StochasticWeightAveraging``. The callback goes before those that save the model at the end.

    Args:
        policy: What to rewrite and how far; ``tdfx.Policy()`` if left out.
        attribute: Path of the module to rewrite in the ``LightningModule``. If left out, its only child that has parameters;
            or the whole module if there are several, or if the child is a single layer.
        settings: As for ``TrainerAdapter``: ``when`` or ``epoch``, ``merge``, ``example_inputs``, ``averaged``, options of
            ``Switch``.

    Raises:
        PolicyError: A setting is out of range, or no early step can be chosen since the training has no known length.
        ModelError: At the start of training, if ``attribute`` names no module, or a single layer, or the strategy shards the
            model.

    Example:
        >>> import pytest, tdfx; _ = pytest.importorskip("lightning")
        >>> from tdfx.integrations.lightning import SwitchCallback
        >>> SwitchCallback(tdfx.Policy(rank=tdfx.Ratio(of=0.25)), epoch=3).switch.done
        False
    """

    advice = "Load it with trainer.fit, validate, test or predict and ckpt_path=, in a Trainer that has this callback."

    def __init__(self, policy: Policy | None = None, *, attribute: str | None = None, **settings: Any) -> None:
        super().__init__(policy, **settings)
        self.attribute = attribute
        self.key = attribute or ""
        self._counted = 0
        self._held: list[tuple[object, Held]] = []
        """Layers of the module that other callbacks hold."""
        self._eager = ExitStack()

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint; several callbacks may rewrite several modules."""
        key: str = self._generate_state_key(attribute=self.attribute)
        return key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module, and averages of it, take the form of the checkpoint that will be loaded."""
        _check_strategy(trainer.strategy)
        _put_first(trainer)
        # Layers that configure_model makes do not exist yet.
        if type(pl_module).configure_model.__module__.partition(".")[0] in {"lightning", "pytorch_lightning"}:
            check_not_layer(self._part(pl_module).target)
        if _has_base(trainer.strategy, {"ModelParallelStrategy"}):
            self._follow_before_loading(trainer, pl_module)
        modules = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
        for module in [*(each for each in modules if type(each) is type(pl_module)), pl_module]:
            self.prepare(
                module,
                lambda: _state_in_checkpoint(trainer, self.state_key),
                lambda hooked: self._part(hooked).target,
            )

    def _follow_before_loading(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the module and its optimizers take the form of a checkpoint before ``ModelParallelStrategy`` reads it.

        It reads the shards of those parameters which the module has, so ``load_state_dict`` comes too late.
        """
        strategy = trainer.strategy
        load = strategy.load_checkpoint

        @functools.wraps(load)
        def load_checkpoint(path: Any, *arguments: Any, **named: Any) -> Any:
            state = _state_in_file(Path(strategy.broadcast(path)), self.state_key)
            if state is not None:
                self.factorize_like_state(self._trained_part(trainer, pl_module), state, trainer.optimizers)
            return load(path, *arguments, **named)

        strategy.load_checkpoint = load_checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from a checkpoint, or begin."""
        self.begin(
            self._trained_part(trainer, pl_module),
            trainer.optimizers,
            steps_per_epoch=lambda: steps_per_epoch(trainer.num_training_batches, trainer.accumulate_grad_batches),
            steps_left=_steps_left(trainer) if pl_module.automatic_optimization else None,
            length=_steps_left(trainer),
        )
        self._counted = trainer.global_step
        self._held = list(held_layers(_others(trainer), pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Run the steps of a compiled ``LightningModule`` eagerly while moments are collected: it calls no hooks."""
        if self.switch.collecting and getattr(pl_module, "_compiler_ctx", None) is not None:
            self._eager.enter_context(cast("Any", torch.compiler.set_stance("force_eager")))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Count an optimizer step if there was one, and switch if it is time."""
        self._eager.close()
        if trainer.global_step == self._counted:
            return
        self._counted = trainer.global_step
        autocast = getattr(trainer.precision_plugin, "autocast_context_manager", nullcontext)()
        part, holders = self._trained_part(trainer, pl_module), _others(trainer)
        if self.step(part, trainer.optimizers, holders=holders, autocast=autocast):
            _rename_in_finetuning(trainer, pl_module)
            warn_of_held(self._held, pl_module)
        self.merge_before_saving(trainer, pl_module)

    def merge_before_saving(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge if the training ends here, before another callback saves its last checkpoint."""
        if self.is_merge_due and _is_ending(trainer):
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge, if that was not done at the last step."""
        is_merge_due = self.is_merge_due
        paths = {module: path for path, module in pl_module.named_modules()}
        self.end(self._trained_part(trainer, pl_module), trainer.optimizers, holders=_others(trainer))
        _rename_in_finetuning(trainer, pl_module)
        for callback in trainer.callbacks:
            # StochasticWeightAveraging gives its batch norms their momentum back after this.
            momenta = getattr(callback, "momenta", None)
            if isinstance(momenta, dict) and momenta.keys() <= paths.keys():
                callback.momenta = {pl_module.get_submodule(paths[norm]): value for norm, value in momenta.items()}
        if is_merge_due:
            _save_last_again(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what all processes have collected; the first one writes the checkpoint."""
        if trainer.world_size > 1 and not trainer.interrupted:
            self.average()
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook on a module whose training has failed."""
        self._eager.close()
        self.switch.pause()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks from the module and the strategy."""
        vars(trainer.strategy).pop("load_checkpoint", None)
        self.release(pl_module)

    def _part(self, whole: nn.Module) -> InPlaceModule:
        """Return the module to rewrite, as a part of a ``LightningModule`` or of the wrapper around one."""
        part = InPlaceModule(whole)
        if self.attribute is not None:
            return InPlaceModule(whole, self.attribute)
        trained = {
            name: list(child.children())
            for name, child in part.model.named_children()
            if list(child.parameters()) and not isinstance(child, AveragedModel)
        }
        return InPlaceModule(whole, *trained) if len(trained) == 1 and all(trained.values()) else part

    def _trained_part(self, trainer: Trainer, pl_module: LightningModule) -> InPlaceModule:
        """Return the module to rewrite, as a part of what the strategy has wrapped around the ``LightningModule``."""
        whole = trainer.strategy.model
        return self._part(pl_module if whole is None else whole)


def _has_base(value: object, names: set[str]) -> bool:
    return any(cls.__name__ in names for cls in type(value).__mro__)


def _check_strategy(strategy: object) -> None:
    """Raise ModelError if a strategy keeps the model in a form that cannot be rewritten."""
    if _has_base(strategy, _REFUSED):
        refuse_engine(
            f"Lightning's {type(strategy).__name__}",
            "by strategy=ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) and fully_shard in "
            "configure_model",
        )


def _put_first(trainer: Trainer) -> None:
    """Put this package's callbacks before all others, so that whoever saves the model at the end saves the merged one.

    Only those that put an average into the module at the end come before them.
    """
    averaging = [callback for callback in trainer.callbacks if hasattr(callback, "_average_model")]
    switches = [callback for callback in trainer.callbacks if isinstance(callback, TrainerAdapter)]
    first = [*averaging, *switches]
    others = [each for each in trainer.callbacks if each not in first and not isinstance(each, _MergeBeforeSaving)]
    saving = [callback for callback in others if isinstance(callback, Checkpoint)]
    rest = [callback for callback in others if callback not in saving]
    # A new list, because the Trainer is going through the old one.
    trainer.callbacks = [*first, *rest, _MergeBeforeSaving(), *saving]


class _MergeBeforeSaving(Callback):  # type: ignore[misc]
    """Sees whether a callback before it, such as early stopping, ends the training, and merges before a checkpoint."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Merge if the training ends here."""
        for callback in trainer.callbacks:
            if isinstance(callback, SwitchCallback):
                callback.merge_before_saving(trainer, pl_module)

    on_validation_end = on_train_epoch_end = on_train_batch_end


def _is_ending(trainer: Trainer) -> bool:
    """Return True after the last optimizer step of a training."""
    loop = trainer.fit_loop
    epochs = trainer.current_epoch + bool(trainer.is_last_batch)
    if _is_reached(trainer.global_step, loop.max_steps) or _is_reached(epochs, loop.max_epochs):
        return True
    enough = epochs >= (loop.min_epochs or 0) and trainer.global_step >= (loop.min_steps or 0)
    return bool(trainer.should_stop) and enough


def _save_last_again(trainer: Trainer) -> None:
    """Save a ``last.ckpt`` of this step again: it was not known yet that the training would end."""
    for callback in trainer.checkpoint_callbacks:
        path = getattr(callback, "last_model_path", "")
        if path and getattr(callback, "_last_global_step_saved", None) == trainer.global_step:
            trainer.save_checkpoint(path, getattr(callback, "save_weights_only", False))


def _is_reached(count: int, limit: int | None) -> bool:
    return limit is not None and limit != -1 and count >= limit


def _others(trainer: Trainer) -> list[object]:
    """Return the other callbacks."""
    ours = (TrainerAdapter, _MergeBeforeSaving)
    return [callback for callback in trainer.callbacks if not isinstance(callback, ours)]


def _rename_in_finetuning(trainer: Trainer, pl_module: LightningModule) -> None:
    """Give the callbacks that unfreeze layers, and save the groups of the optimizers by name, the present names."""
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    for callback in trainer.callbacks:
        saved = getattr(callback, "_internal_optimizer_metadata", None)
        if not isinstance(saved, dict):
            continue
        for index in list(saved):
            groups = trainer.optimizers[index].param_groups
            if all(id(parameter) in names for group in groups for parameter in group["params"]):
                saved[index] = [
                    {**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in groups
                ]


def _state_in_checkpoint(trainer: Trainer, key: str) -> Mapping[str, Any] | None:
    """Return the callback's state in the checkpoint whose weights are being loaded; the Trainer passes it only later."""
    loaded = getattr(getattr(trainer, "_checkpoint_connector", None), "_loaded_checkpoint", None) or {}
    state: Mapping[str, Any] | None = loaded.get("callbacks", {}).get(key)
    return state


def _state_in_file(path: Path, key: str) -> Mapping[str, Any] | None:
    """Return the callback's state in a checkpoint, a file or a folder of shards, before the Trainer has read it."""
    if path.is_dir():
        path /= "meta.pt"
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state: Mapping[str, Any] | None = loaded.get("callbacks", {}).get(key)
    return state


def _steps_left(trainer: Trainer) -> int | None:
    """Return how many optimizer steps are left; None if the training ends otherwise.

    Where it is optimized manually, these are batches at the beginning and mean nothing later.
    """
    try:
        total = float(trainer.estimated_stepping_batches)
    except MisconfigurationException:  # the number of accumulated batches changes between epochs
        return None
    return int(total) - int(trainer.global_step) if math.isfinite(total) and total > 0 else None
