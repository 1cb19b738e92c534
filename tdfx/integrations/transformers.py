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
from torch.optim.swa_utils import AveragedModel

from tdfx.checkpoint.sealed_file import read_sealed, write_sealed
from tdfx.errors import CheckpointError
from tdfx.integrations.adapter import TrainerAdapter, check_not_layer, refuse_engine
from tdfx.integrations.moment import steps_per_epoch
from tdfx.optim.surgery import as_optimizers
from tdfx.wrappers.in_place import InPlaceModule

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise ImportError(
        "tdfx.integrations.transformers is a callback for Transformers, which is not installed. Install it: "
        "pip install 'tdfx[transformers]'"
    ) from error

FILE = "tdfx.pt"
"""The file in a checkpoint's folder that holds the state of the callback."""


class SwitchCallback(TrainerAdapter, TrainerCallback):  # type: ignore[misc]
    """Factorizes the model of a Transformers ``Trainer`` in the middle of training, and merges it at the end.

    The model stays the same object, with its class, ``config`` and methods; only its layers change. Optimizer, scheduler,
    gradient accumulation, mixed precision and DDP stay the Trainer's. A checkpoint that is written after the switch holds
    the factors, and a file beside them says how they were split. To resume a checkpoint, also one from before the switch::

        trainer.train(resume_from_checkpoint=callback.resume(trainer, True))

    After training, ``trainer.save_model()`` and ``model.save_pretrained()`` write a dense model for ``from_pretrained``.

    The arguments are those of ``TrainerAdapter``.

    An ``AveragedModel`` that another callback keeps is rewritten too. The callback goes before the others, so that one that
    saves the model when the training ends saves the merged one.

    Raises:
        PolicyError: A setting is out of range, or no early step can be chosen since the training has no known length.
        ModelError: When the Trainer is made, or training begins, if DeepSpeed or FSDP shards the model.

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
            others = [callback for callback in trainer.callback_handler.callbacks if callback is not self]
            trainer.callback_handler.callbacks = [self, *others]
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

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state of the callback into the Trainer's checkpoint."""
        self.average()
        if state.is_world_process_zero:
            write_sealed(self.state_dict(), Path(args.output_dir, f"checkpoint-{state.global_step}", FILE))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Merge."""
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
        """Return the other callbacks, and the averages that a Trainer of the user's class keeps itself."""
        trainer = self._trainer and self._trainer()
        if trainer is None:
            return []
        averages = [value for value in vars(trainer).values() if isinstance(value, AveragedModel)]
        others = [each for each in trainer.callback_handler.callbacks if not isinstance(each, TrainerAdapter)]
        return [averages, *others]


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
    """Raise ModelError if an engine shards the model; the Trainer also knows of what Accelerate was launched with."""
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(args, "deepspeed", None):
        refuse_engine("DeepSpeed")
    if getattr(trainer, "is_fsdp_enabled", False) or getattr(args, "fsdp", None):
        refuse_engine("FSDP")


def _batches(loader: Any) -> float:
    """Return how many batches a loader has; infinity if it has no length."""
    try:
        return len(loader)
    except TypeError:
        return math.inf
