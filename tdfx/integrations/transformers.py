"""A callback for the Trainer of Transformers; ``pip install 'tdfx[transformers]'``."""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from tdfx.integrations.moment import steps_per_epoch
from tdfx.integrations.versions import check_version

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "tdfx.integrations.transformers is a callback for Transformers, which is not installed. Install it: "
        "pip install 'tdfx[transformers]'"
    ) from error
else:
    check_version("transformers", transformers.__version__, "4.57")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tdfx.checkpoint.sealed_file import read_sealed, write_sealed
from tdfx.errors import CheckpointError
from tdfx.integrations.adapter import TrainerAdapter, check_not_layer, refuse_engine
from tdfx.integrations.pretrained import FILE, load_pretrained
from tdfx.optim.surgery import as_optimizers
from tdfx.wrappers.in_place import InPlaceModule, is_sharded

__all__ = ["SwitchCallback", "load_pretrained"]


class SwitchCallback(TrainerAdapter, TrainerCallback):  # type: ignore[misc]
    """Factorizes the model of a Transformers ``Trainer`` in the middle of training, and merges it at the end.

    The model stays the same object, with its class, ``config`` and methods; only its layers change. Optimizer, scheduler,
    gradient accumulation, mixed precision and DDP stay the Trainer's. A checkpoint that is written after the switch holds
    the factors, and a file beside them says how they were split. To resume a checkpoint, also one from before the switch::

        trainer.train(resume_from_checkpoint=callback.resume(trainer, True))

    The checkpoint of the last step is dense, and so is what ``trainer.save_model()`` and ``model.save_pretrained()`` write
    after training. What is saved before, or with ``merge=False``, holds factors: its ``config.json`` says so, and
    ``from_pretrained`` loads it where this module is imported, and refuses it elsewhere; see ``load_pretrained``.

    The arguments are those of ``TrainerAdapter``.

    An ``AveragedModel`` that another callback keeps is rewritten too. The callback goes before the others, so that one that
    saves the model when the training ends saves the merged one.

    Raises:
        PolicyError: A setting is out of range, or no early step can be chosen since the training has no known length.
        ModelError: When the Trainer is made, or training begins, if DeepSpeed or FSDP1 shards the model.

    Example:
        >>> import pytest, tdfx; _ = pytest.importorskip("transformers")
        >>> from tdfx.integrations.transformers import SwitchCallback
        >>> SwitchCallback(tdfx.Policy(rank=tdfx.Ratio(of=0.25)), epoch=3).switch.done
        False
    """

    advice = (
        "Give the model their form first: trainer.train(resume_from_checkpoint=callback.resume(trainer, checkpoint))."
    )

    _resumed = False
    _trainer: Callable[[], Trainer | None] | None = None
    """Returns the Trainer of the training that is under way, if it was found."""

    def resume(self, trainer: Trainer, checkpoint: bool | str | Path = True) -> str:
        """Give a Trainer's model the form that it had in a checkpoint, so that the Trainer can load it.

        Args:
            trainer: The Trainer of this callback, before it trains.
            checkpoint: The checkpoint's folder; True for the last one in the Trainer's ``output_dir``.

        Returns:
            The folder, for ``trainer.train(resume_from_checkpoint=...)``.

        Raises:
            CheckpointError: There is no checkpoint, or it was written without this callback.
        """
        folder = get_last_checkpoint(trainer.args.output_dir) if checkpoint is True else str(checkpoint)
        if folder is None:
            raise CheckpointError(
                f"There is no checkpoint in {trainer.args.output_dir!r}. Pass the folder of one, or train from the start."
            )
        if not Path(folder, FILE).exists():
            raise CheckpointError(
                f"{folder!r} holds no {FILE}, so it is not known whether and how its model is factorized: it was written "
                f"without this callback, or the process was killed while it was written. Resume the checkpoint before it."
            )
        saved = read_sealed(Path(folder, FILE))
        self.prepare(trainer.model)
        self.load_state_dict(saved)
        self.factorize_as_saved(trainer.model, as_optimizers(trainer.optimizer))
        if trainer.model_init is not None:
            self._factorize_next(trainer)
        self._resumed = True
        return str(folder)

    def _factorize_next(self, trainer: Trainer) -> None:
        """Give the model that ``model_init`` makes when the training begins the form of the loaded state, too."""
        build = trainer.model_init

        @functools.wraps(build)
        def build_factorized(*trial: Any) -> Any:
            trainer.model_init = build
            model = build(*trial)
            self.prepare(model)
            self.factorize_as_saved(model, [])
            return model

        trainer.model_init = build_factorized

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse what cannot be switched, and let the model take the form of what is loaded into it."""
        _check_engine(args, _calling_trainer())
        check_not_layer(kwargs["model"])
        self.prepare(kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Go on from a checkpoint, or begin."""
        trainer = _calling_trainer()
        _check_engine(args, trainer)
        self._trainer = None if trainer is None else weakref.ref(trainer)
        # The callback may have been added after on_init_end, or the model may be a new one since.
        self.prepare(kwargs["model"])
        if trainer is not None:
            # A new list, because the Trainer is going through the old one. Whoever saves at the end saves the merged model.
            callbacks = trainer.callback_handler.callbacks
            others = [each for each in callbacks if each is not self and getattr(each, "switch", None) is not self]
            trainer.callback_handler.callbacks = [self, *others, _MergeAtStop(self)]
            if _is_sharded(trainer):
                _follow_best_checkpoint(trainer, self)
        if state.global_step and not self._resumed:
            step = f"The Trainer goes on from step {state.global_step}"
            raise CheckpointError(f"{step}, and the callback has no state of that step. {self.advice}")
        self._resumed = False
        loader, accumulated = kwargs["train_dataloader"], args.gradient_accumulation_steps
        self.begin(
            self._part(kwargs["model"]),
            as_optimizers(kwargs["optimizer"]),
            steps_per_epoch=lambda: steps_per_epoch(_batches(loader), accumulated),
            steps_left=state.max_steps - state.global_step if state.max_steps > 0 else None,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count an optimizer step, and switch if it is time."""
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        autocast = torch.autocast(args.device.type, dtype) if args.bf16 or args.fp16 else None
        part, optimizers = self._part(kwargs["model"]), as_optimizers(kwargs["optimizer"])
        self.step(part, optimizers, holders=self._others(), autocast=autocast)
        if state.global_step >= state.max_steps > 0:
            self.merge_before_saving(kwargs["model"], kwargs["optimizer"])

    def merge_before_saving(self, model: nn.Module, optimizer: Any) -> None:
        """Merge at the last step, before the Trainer saves a checkpoint of it."""
        if self.is_merge_due:
            self.end(self._part(model), as_optimizers(optimizer), holders=self._others())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state of the callback into the Trainer's checkpoint."""
        self.average()
        if state.is_world_process_zero:
            write_sealed(self.state_dict(), Path(args.output_dir, f"checkpoint-{state.global_step}", FILE))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Merge, if that was not done at the last step, or the best checkpoint that was loaded since has factors."""
        self.end(self._part(kwargs["model"]), as_optimizers(kwargs["optimizer"]), holders=self._others())

    def _part(self, model: nn.Module) -> InPlaceModule:
        """Return the model in its wrappers."""
        trainer = self._trainer and self._trainer()
        if trainer is not None:
            part = InPlaceModule(trainer.model_wrapped)
            if part.model is model:
                return part
        return InPlaceModule(self.replica or model)

    def _others(self) -> list[object]:
        """Return the Trainer, which may keep copies itself in attributes of a user's class, and the other callbacks."""
        trainer = self._trainer and self._trainer()
        if trainer is None:
            return []
        ours = (TrainerAdapter, _MergeAtStop)
        others = [each for each in trainer.callback_handler.callbacks if not isinstance(each, ours)]
        return [trainer, *others]


class _MergeAtStop(TrainerCallback):  # type: ignore[misc]
    """The last callback of all: it sees whether another one has stopped the training, and merges before a checkpoint."""

    def __init__(self, switch: SwitchCallback) -> None:
        self.switch = switch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Merge if the training stops here."""
        if control.should_training_stop:
            self.switch.merge_before_saving(kwargs["model"], kwargs["optimizer"])

    on_epoch_end = on_evaluate = on_step_end


def _is_sharded(trainer: Trainer) -> bool:
    """Return True if FSDP2 shards the model of a Trainer."""
    return is_sharded(trainer.model_wrapped)


def _follow_best_checkpoint(trainer: Trainer, switch: SwitchCallback) -> None:
    """Let a sharded model take the form of the best checkpoint before the Trainer loads that.

    It reads the shards of those parameters which the model has, so ``load_state_dict`` comes too late.
    """
    load = type(trainer)._load_best_model

    def load_best_model() -> None:
        folder = trainer.state.best_model_checkpoint
        if folder is not None and Path(folder, FILE).exists():
            switch.factorize_like_state(InPlaceModule(trainer.model_wrapped), read_sealed(Path(folder, FILE)))
        load(trainer)

    trainer._load_best_model = load_best_model


def _calling_trainer() -> Trainer | None:
    """Return the Trainer that calls a callback, which it does not pass to it; None if it is not found."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    return None


def _check_engine(args: TrainingArguments, trainer: Trainer | None) -> None:
    """Raise ModelError if an engine keeps the model in a form that cannot be rewritten; FSDP2 does not.

    The Trainer also knows of what Accelerate was launched with.
    """
    instead = "by TrainingArguments(fsdp=True, fsdp_config={'version': 2})"
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(args, "deepspeed", None):
        refuse_engine("DeepSpeed", instead)
    settings = getattr(args, "fsdp_config", None) or {}
    if getattr(args, "fsdp", None) and settings.get("xla"):
        refuse_engine("FSDP of PyTorch/XLA", instead)
    if _fsdp_version(args, trainer) == 1:
        refuse_engine("FSDP1", instead)


def _fsdp_version(args: TrainingArguments, trainer: Trainer | None) -> int | None:
    """Return which FSDP shards the model; None for none."""
    plugin = getattr(getattr(getattr(trainer, "accelerator", None), "state", None), "fsdp_plugin", None)
    if plugin is not None:
        return int(getattr(plugin, "fsdp_version", 1))
    settings = getattr(args, "fsdp_plugin_args", None) or getattr(args, "fsdp_config", None) or {}
    return int(settings.get("fsdp_version", settings.get("version", 1))) if getattr(args, "fsdp", None) else None


def _batches(loader: Any) -> float:
    """Return how many batches a loader has; infinity if it has no length."""
    try:
        return len(loader)
    except TypeError:
        return math.inf
