"""A callback for the Trainer of Transformers; ``pip install 'tdfx[transformers]'``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdfx.checkpoint.sealed_file import read_sealed, write_sealed
from tdfx.errors import CheckpointError, ModelError
from tdfx.integrations.adapter import TrainerAdapter
from tdfx.optim.surgery import as_optimizers
from tdfx.passes.analysis.observe import Inputs
from tdfx.policies.policy import Policy
from tdfx.training.switch.switch import Switch
from tdfx.training.switch.when import When
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
"""What a checkpoint's folder holds of the switch."""

_ADVICE = "Give the model their form first: trainer.train(resume_from_checkpoint=callback.resume(trainer, checkpoint))."


class SwitchCallback(TrainerCallback):  # type: ignore[misc]
    """Factorizes what a Transformers ``Trainer`` trains, in the middle of training, and merges it at the end.

    The model stays the object that it is, with its class, ``config`` and methods; its layers change. Optimizer, scheduler,
    gradient accumulation, mixed precision and DDP are the Trainer's as before. A checkpoint that the Trainer writes after
    the switch holds the factors, and how they were split in a file beside them. To resume one, from before the switch too::

        trainer.train(resume_from_checkpoint=callback.resume(trainer, True))

    After training, ``trainer.save_model()`` and ``model.save_pretrained()`` write a dense model, as ``from_pretrained``
    takes it.

    Args:
        policy: What to rewrite and how far; ``tdfx.Policy()`` if left out.
        when: ``tdfx.AtStep``, ``tdfx.AtEpoch`` or ``tdfx.Settled``, in optimizer steps; or give ``epoch``.
        epoch: Whole epochs before the switch, at least 1.
        merge: Whether to merge at the end of training.
        example_inputs: What the model is called with, to time its layers; the first batch if left out.
        options: What else ``tdfx.Switch`` takes: ``rewarm``, ``recompile_seconds``, ``total_steps``. The last is the
            Trainer's own if left out, so that a switch which would take longer than it saves is not made; with None,
            switches are not weighed.

    Raises:
        PolicyError: A setting is out of range.

    Example:
        >>> import pytest, tdfx; _ = pytest.importorskip("transformers")
        >>> from tdfx.integrations.transformers import SwitchCallback
        >>> SwitchCallback(tdfx.Policy(rank=tdfx.Ratio(of=0.25)), epoch=3).switch.done
        False
    """

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
        self._inside = TrainerAdapter(
            policy,
            when=when,
            epoch=epoch,
            merge=merge,
            example_inputs=example_inputs,
            options=options,
            advice=_ADVICE,
        )
        self._resumed = False

    @property
    def switch(self) -> Switch:
        """What decides; ``print(callback.switch)`` says what it did."""
        return self._inside.switch

    def resume(self, trainer: Trainer, checkpoint: bool | str | Path = True) -> str:
        """Give a Trainer's model the form that it had in a checkpoint, so that the Trainer can load it.

        Args:
            trainer: Of which this is a callback, before it trains.
            checkpoint: The checkpoint's folder; True for the last one in the Trainer's ``output_dir``.

        Returns:
            The folder, to be passed on to ``trainer.train(resume_from_checkpoint=...)``.

        Raises:
            CheckpointError: There is none, or it was written without this callback.
        """
        folder = get_last_checkpoint(trainer.args.output_dir) if checkpoint is True else str(checkpoint)
        if folder is None:
            raise CheckpointError(f"There is no checkpoint in {trainer.args.output_dir!r} to be resumed.")
        if not Path(folder, FILE).exists():
            raise CheckpointError(
                f"{folder!r} holds no {FILE}, so it is not known whether its model is factorized, and how: it was written "
                f"without this callback, or the process was killed while it was written. Resume the checkpoint before it."
            )
        self._inside.load_state_dict(read_sealed(Path(folder, FILE)))
        self._inside.factorize_as_saved(trainer.model, as_optimizers(trainer.optimizer))
        self._resumed = True
        return str(folder)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the model follow what is loaded into it, such as the best checkpoint at the end."""
        self._inside.prepare(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from a checkpoint, or begin."""
        if state.global_step and not self._resumed:
            raise CheckpointError(
                f"The Trainer goes on from step {state.global_step}, of which the callback knows nothing. {_ADVICE}"
            )
        self._resumed = False
        loader, each = kwargs["train_dataloader"], args.gradient_accumulation_steps
        optimizers = as_optimizers(kwargs["optimizer"])
        self._inside.begin(
            InPlaceModule(kwargs["model"]),
            optimizers,
            steps_per_epoch=lambda: _steps_per_epoch(loader, each),
            steps_left=state.max_steps - state.global_step if state.max_steps > 0 else None,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count an optimizer step, and switch if it is time."""
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        autocast = torch.autocast(args.device.type, dtype) if args.bf16 or args.fp16 else None
        self._inside.step(self._part(kwargs["model"]), as_optimizers(kwargs["optimizer"]), autocast=autocast)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put what a resumed run needs beside what the Trainer has written."""
        if state.is_world_process_zero:
            write_sealed(self._inside.state_dict(), Path(args.output_dir, f"checkpoint-{state.global_step}", FILE))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Merge."""
        self._inside.end(self._part(kwargs["model"]), as_optimizers(kwargs["optimizer"]))

    def _part(self, model: nn.Module) -> InPlaceModule:
        return InPlaceModule(self._inside.replica or model)


def _steps_per_epoch(loader: Any, accumulated: int) -> int:
    try:
        return math.ceil(len(loader) / accumulated)
    except TypeError as error:
        raise ModelError(
            "The training data have no length, so it is not known how many steps an epoch has. Pass when=tdfx.AtStep(...) "
            "in place of epoch=."
        ) from error
