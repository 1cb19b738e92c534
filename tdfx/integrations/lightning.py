"""A callback for Lightning's Trainer; ``pip install 'tdfx[lightning]'``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from tdfx.errors import ModelError
from tdfx.integrations.adapter import TrainerAdapter
from tdfx.passes.analysis.observe import Inputs
from tdfx.policies.policy import Policy
from tdfx.training.switch.switch import Switch
from tdfx.training.switch.when import When
from tdfx.wrappers.in_place import InPlaceModule

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
        from pytorch_lightning.utilities.exceptions import MisconfigurationException
    except ImportError as error:
        raise ImportError(
            "tdfx.integrations.lightning is a callback for Lightning, which is not installed. Install it: "
            "pip install 'tdfx[lightning]'"
        ) from error

_ADVICE = "Load it by trainer.fit, validate, test or predict with ckpt_path=, and this callback among the Trainer's."


class SwitchCallback(Callback):  # type: ignore[misc]
    """Factorizes what a Lightning ``Trainer`` trains, in the middle of training, and merges it at the end.

    The module stays the object that it is, with its class and methods; its layers change. Optimizers, schedulers, gradient
    accumulation, precision and DDP are the Trainer's as before, and its checkpoints, from before, at or after the switch,
    go on to the same weights as a run without interruption: put the same callback into the Trainer that resumes them. An
    average is taken along that the ``WeightAveraging`` callback keeps, or that is an ``AveragedModel`` in the module.

    Args:
        policy: What to rewrite and how far; ``tdfx.Policy()`` if left out.
        when: ``tdfx.AtStep``, ``tdfx.AtEpoch`` or ``tdfx.Settled``, in optimizer steps; or give ``epoch``.
        epoch: Whole epochs before the switch, at least 1.
        attribute: Path of the module in the ``LightningModule`` that is to be rewritten. If left out, its one child that has
            parameters; or all of it where there are several, or where the child is a single layer.
        merge: Whether to merge at the end of training, so that what is saved then has the original keys.
        example_inputs: What the module is called with, to time its layers; the first batch if left out.
        options: What else ``tdfx.Switch`` takes: ``rewarm``, ``recompile_seconds``, ``total_steps``. The last is the
            Trainer's own if left out, so that a switch which would take longer than it saves is not made; with None,
            switches are not weighed.

    Raises:
        PolicyError: A setting is out of range.
        ModelError: At the start of training, that ``attribute`` names no module, or a single layer.

    Example:
        >>> import pytest, tdfx; _ = pytest.importorskip("lightning")
        >>> from tdfx.integrations.lightning import SwitchCallback
        >>> SwitchCallback(tdfx.Policy(rank=tdfx.Ratio(of=0.25)), epoch=3).switch.done
        False
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        when: When | None = None,
        epoch: int | None = None,
        attribute: str | None = None,
        merge: bool = True,
        example_inputs: Inputs | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.attribute = attribute
        self._inside = TrainerAdapter(
            policy,
            when=when,
            epoch=epoch,
            merge=merge,
            example_inputs=example_inputs,
            options=options,
            advice=_ADVICE,
        )
        self._seen = 0

    @property
    def state_key(self) -> str:
        """Under which the Trainer keeps the callback's state; several callbacks may rewrite several modules."""
        key: str = self._generate_state_key(attribute=self.attribute)
        return key

    @property
    def switch(self) -> Switch:
        """What decides; ``print(callback.switch)`` says what it did."""
        return self._inside.switch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module follow the checkpoint that will be loaded."""
        target = self._part(pl_module).target
        self._inside.prepare(target, lambda: _state_in_checkpoint(trainer, self.state_key))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from a checkpoint, or begin."""
        self._inside.begin(
            self._trained(trainer, pl_module),
            trainer.optimizers,
            steps_per_epoch=lambda: _steps_per_epoch(trainer),
            steps_left=_steps_left(trainer, pl_module),
        )
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Count an optimizer step if there was one, and switch if it is time."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        part = self._trained(trainer, pl_module)
        context = getattr(trainer.precision_plugin, "autocast_context_manager", None)
        self._inside.step(
            part,
            trainer.optimizers,
            averaged=self._averages(trainer, pl_module),
            autocast=None if context is None else context(),
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge."""
        averaged = self._averages(trainer, pl_module)
        self._inside.end(self._trained(trainer, pl_module), trainer.optimizers, averaged=averaged)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off the module."""
        self._inside.release(self._part(pl_module).target)

    def state_dict(self) -> dict[str, Any]:
        """Return what the Trainer puts into its checkpoints."""
        return self._inside.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what the Trainer found in a checkpoint."""
        self._inside.load_state_dict(state_dict)

    def _part(self, whole: nn.Module) -> InPlaceModule:
        part = InPlaceModule(whole)
        if self.attribute is not None:
            return InPlaceModule(whole, self.attribute)
        trained = [
            name
            for name, one in part.model.named_children()
            if any(True for _ in one.parameters()) and not isinstance(one, AveragedModel)
        ]
        if len(trained) == 1 and any(True for _ in part.model.get_submodule(trained[0]).children()):
            return InPlaceModule(whole, trained[0])
        return part

    def _trained(self, trainer: Trainer, pl_module: LightningModule) -> InPlaceModule:
        """Return what is rewritten, in what the strategy has put around the module."""
        whole = trainer.strategy.model
        return self._part(pl_module if whole is None else whole)

    def _averages(self, trainer: Trainer, pl_module: LightningModule) -> list[Any]:
        target = self._part(pl_module)
        kept = [getattr(one, "_average_model", None) for one in getattr(trainer, "callbacks", [])]
        whole = [one for one in kept if isinstance(one, AveragedModel)]
        beside = [
            one
            for one in pl_module.modules()
            if isinstance(one, AveragedModel) and isinstance(one.module, type(target.target))
        ]
        return [*beside, *(_InAverage(one, self._path(pl_module)) for one in whole)]

    def _path(self, pl_module: LightningModule) -> str:
        inside = self._part(pl_module).target
        modules: Iterable[tuple[str, nn.Module]] = pl_module.named_modules()
        return next(name for name, one in modules if one is inside)


class _InAverage:
    """A module in an average of all of the ``LightningModule``, as an average of that module."""

    def __init__(self, average: AveragedModel, path: str) -> None:
        self._average = average
        self._path = path

    @property
    def module(self) -> nn.Module:
        """The averaged copy."""
        return self._average.module.get_submodule(self._path)

    @module.setter
    def module(self, made: nn.Module) -> None:
        if self._path:
            self._average.module.set_submodule(self._path, made)
        else:
            self._average.module = made


def _state_in_checkpoint(trainer: Trainer, key: str) -> Mapping[str, Any] | None:
    """Return the callback's state in the checkpoint whose weights are just being loaded.

    The Trainer hands it over only after the weights, for which it is needed.
    """
    loaded = getattr(getattr(trainer, "_checkpoint_connector", None), "_loaded_checkpoint", None) or {}
    state: Mapping[str, Any] | None = loaded.get("callbacks", {}).get(key)
    return state


def _steps_per_epoch(trainer: Trainer) -> int:
    batches = float(trainer.num_training_batches)
    if not math.isfinite(batches):
        raise ModelError(
            "The training loader has no length, so it is not known how many steps an epoch has. Pass when=tdfx.AtStep(...) "
            "in place of epoch=."
        )
    return math.ceil(batches / int(trainer.accumulate_grad_batches))


def _steps_left(trainer: Trainer, pl_module: LightningModule) -> int | None:
    """Return how many optimizer steps the training still has; None where it ends some other way, or counts otherwise."""
    if not pl_module.automatic_optimization:
        return None
    try:
        total = float(trainer.estimated_stepping_batches)
    except MisconfigurationException:  # how many batches make a step changes from epoch to epoch
        return None
    return int(total) - int(trainer.global_step) if math.isfinite(total) and total > 0 else None
