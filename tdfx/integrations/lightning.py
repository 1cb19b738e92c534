"""A callback for Lightning's Trainer; ``pip install 'tdfx[lightning]'``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from tdfx.integrations.adapter import TrainerAdapter, steps_per_epoch
from tdfx.policies.policy import Policy
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


class SwitchCallback(TrainerAdapter, Callback):  # type: ignore[misc]
    """Factorizes the module of a Lightning ``Trainer`` in the middle of training, and merges it at the end.

    The module stays the same object, with its class and methods; only its layers change. Optimizers, schedulers, gradient
    accumulation, precision and DDP stay the Trainer's. To resume from a checkpoint, from before, at or after the switch, put
    the same callback into the Trainer: the weights become those of a run without interruption. An average that the
    ``WeightAveraging`` callback keeps, or an ``AveragedModel`` in the module, is rewritten too.

    Args:
        policy: What to rewrite and how far; ``tdfx.Policy()`` if left out.
        attribute: Path of the module to rewrite in the ``LightningModule``. If left out, its only child that has parameters;
            or the whole module if there are several, or if the child is a single layer.
        settings: As for ``TrainerAdapter``: ``when`` or ``epoch``, ``merge``, ``example_inputs``, options of ``Switch``.

    Raises:
        PolicyError: A setting is out of range.
        ModelError: At the start of training, if ``attribute`` names no module, or a single layer.

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
        self._counted = 0

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint; several callbacks may rewrite several modules."""
        key: str = self._generate_state_key(attribute=self.attribute)
        return key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module take the form of the checkpoint that will be loaded."""
        self.prepare(self._part(pl_module).target, lambda: _state_in_checkpoint(trainer, self.state_key))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from a checkpoint, or begin."""
        self.begin(
            self._trained_part(trainer, pl_module),
            trainer.optimizers,
            steps_per_epoch=lambda: steps_per_epoch(trainer.num_training_batches, trainer.accumulate_grad_batches),
            steps_left=_steps_left(trainer, pl_module),
        )
        self._counted = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Count an optimizer step if there was one, and switch if it is time."""
        if trainer.global_step == self._counted:
            return
        self._counted = trainer.global_step
        part, averages = self._trained_part(trainer, pl_module), self._averages(trainer, pl_module)
        autocast = getattr(trainer.precision_plugin, "autocast_context_manager", nullcontext)()
        self.step(part, trainer.optimizers, averaged=averages, autocast=autocast)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge."""
        part = self._trained_part(trainer, pl_module)
        self.end(part, trainer.optimizers, averaged=self._averages(trainer, pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks from the module."""
        self.release(self._part(pl_module).target)

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

    def _averages(self, trainer: Trainer, pl_module: LightningModule) -> list[Any]:
        """Return the averages of the module to rewrite: in the ``LightningModule``, and of a callback's whole average."""
        inside = self._part(pl_module).target
        path = next(name for name, module in pl_module.named_modules() if module is inside)
        in_module = [module for module in pl_module.modules() if isinstance(module, AveragedModel)]
        averages = [getattr(callback, "_average_model", None) for callback in getattr(trainer, "callbacks", [])]
        return [
            *(average for average in in_module if isinstance(average.module, type(inside))),
            *(_PartOfAverage(average, path) for average in averages if isinstance(average, AveragedModel)),
        ]


class _PartOfAverage:
    """A submodule of an average of the whole ``LightningModule``, which looks like an average of that submodule."""

    def __init__(self, average: AveragedModel, path: str) -> None:
        self._average = average
        self._path = path

    @property
    def module(self) -> nn.Module:
        """The averaged copy."""
        return self._average.module.get_submodule(self._path)

    @module.setter
    def module(self, module: nn.Module) -> None:
        if self._path:
            self._average.module.set_submodule(self._path, module)
        else:
            self._average.module = module


def _state_in_checkpoint(trainer: Trainer, key: str) -> Mapping[str, Any] | None:
    """Return the callback's state in the checkpoint whose weights are being loaded; the Trainer passes it only later."""
    loaded = getattr(getattr(trainer, "_checkpoint_connector", None), "_loaded_checkpoint", None) or {}
    state: Mapping[str, Any] | None = loaded.get("callbacks", {}).get(key)
    return state


def _steps_left(trainer: Trainer, pl_module: LightningModule) -> int | None:
    """Return how many optimizer steps are left; None if the training ends otherwise or is optimized manually."""
    if not pl_module.automatic_optimization:
        return None
    try:
        total = float(trainer.estimated_stepping_batches)
    except MisconfigurationException:  # the number of accumulated batches changes between epochs
        return None
    return int(total) - int(trainer.global_step) if math.isfinite(total) and total > 0 else None
