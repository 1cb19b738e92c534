"""A callback for the Trainer of Transformers; ``pip install 'tdfx[transformers]'``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from tdfx.checkpoint.sealed_file import read_sealed, write_sealed
from tdfx.errors import CheckpointError
from tdfx.integrations.adapter import TrainerAdapter, steps_per_epoch
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

    Raises:
        PolicyError: A setting is out of range.

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
        self.load_state_dict(read_sealed(Path(folder, FILE)))
        self.factorize_as_saved(trainer.model, as_optimizers(trainer.optimizer))
        self._resumed = True
        return str(folder)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the model take the form of what is loaded into it, such as the best checkpoint at the end."""
        self.prepare(kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Go on from a checkpoint, or begin."""
        if state.global_step and not self._resumed:
            step = f"The Trainer goes on from step {state.global_step}"
            raise CheckpointError(f"{step}, and the callback has no state of that step. {self.advice}")
        self._resumed = False
        loader, accumulated = kwargs["train_dataloader"], args.gradient_accumulation_steps
        self.begin(
            InPlaceModule(kwargs["model"]),
            as_optimizers(kwargs["optimizer"]),
            steps_per_epoch=lambda: steps_per_epoch(_batches(loader), accumulated),
            steps_left=state.max_steps - state.global_step if state.max_steps > 0 else None,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count an optimizer step, and switch if it is time."""
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        autocast = torch.autocast(args.device.type, dtype) if args.bf16 or args.fp16 else None
        self.step(InPlaceModule(self.replica or kwargs["model"]), as_optimizers(kwargs["optimizer"]), autocast=autocast)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state of the callback into the Trainer's checkpoint."""
        if state.is_world_process_zero:
            write_sealed(self.state_dict(), Path(args.output_dir, f"checkpoint-{state.global_step}", FILE))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Merge."""
        self.end(InPlaceModule(self.replica or kwargs["model"]), as_optimizers(kwargs["optimizer"]))


def _batches(loader: Any) -> float:
    """Return how many batches a loader has; infinity if it has no length."""
    try:
        return len(loader)
    except TypeError:
        return math.inf
