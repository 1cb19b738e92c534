"""A training run: train, switch, train on, merge, score."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from study_data import Batch
from torch import Tensor, nn

import tdfx
from recipe import checkpoint
from recipe.plot import Board
from recipe.run_state import DTYPES, RunProgress, RunState, unwrapped
from recipe.schedule import rate_at, set_rate
from recipe.score import Score, loss_of, score, to_device


class TrainingRun(RunState):
    """A run that trains from its state to the end."""

    merged: nn.Module | None = None
    """The model that is the result, once the run has ended."""
    merge_error: float | None = None
    """Largest difference of outputs before and after the merge, relative to the largest output; None without a merge."""

    def train(self, echo: Callable[[str], None] = lambda line: None, most_steps: int | None = None) -> bool:
        """Train to the last step, save as the settings say, and merge; ``echo`` gets the figures of each epoch.

        After ``most_steps`` steps it stops, as if the process had been killed. Return True if it came to its end.
        """
        board = Board(self.config.output.tensorboard if self.process.is_first else "")
        steps = 0
        while epoch_steps := self._epoch_steps():
            self.model.train()
            batches = self.data.batches(self.progress.epoch, self.progress.step)
            total = torch.tensor(self.progress.loss, dtype=torch.float64, device=self.device)
            while self.progress.step < epoch_steps:
                if steps == most_steps:
                    return False
                steps += 1
                with self.phases.of("data"):
                    batch = next(batches)
                with self.phases.of("step"):
                    total += self._step(batch)
                self.progress.step += 1
                self._switch()
                self._save_within_epoch(total)
            with self.phases.of("step"):
                self.progress.loss = float(total)
            self._end_epoch(board, echo)
        if self.merged is None:
            self._merge()
        board.close()
        return True

    def _epoch_steps(self) -> int:
        """Return the steps of the current epoch: fewer if the training ends within it, and none after its end."""
        return max(0, min(self.data.steps, self.total_steps - self.progress.epoch * self.data.steps))

    def _step(self, batch: Batch) -> Tensor:
        """Take one training step and return its loss, without waiting for the device."""
        settings = self.config.training
        index = self.progress.epoch * self.data.steps + self.progress.step
        set_rate(self.optimizer, rate_at(index, self.data.steps, settings))
        x, y = to_device(batch[0], self.device, self.layout), batch[1].to(self.device, non_blocking=True)
        autocast = torch.autocast(self.device.type, DTYPES[settings.amp]) if settings.amp in DTYPES else nullcontext()
        with autocast:
            loss = loss_of(self.model(x), y, settings.label_smoothing)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if settings.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss.detach().double()

    def _switch(self) -> None:
        """Let the switch count the step, and count its seconds to their phases."""
        if self.switch is None or self.switch.done:
            return
        self.phases.settle()
        before = self.switch.spent
        self.model = self.switch.step(
            self.model, optimizer=self.optimizer, example_inputs=self.example, averaged=self.average
        )
        for name, seconds in self.switch.spent.items():
            self.phases.add(name, seconds - before.get(name, 0.0))

    def _save_within_epoch(self, total: Tensor) -> None:
        every, step = self.config.output.every, self.progress.step
        if self.config.output.checkpoint and every and step % every == 0 and step < self._epoch_steps():
            self.progress.loss = float(total)
            self._save()

    def _end_epoch(self, board: Board, echo: Callable[[str], None]) -> None:
        loss = self.progress.loss / self.progress.step
        epoch, every = self.progress.epoch + 1, self.config.output.evaluate
        figures = {"epoch": epoch, "training_loss": loss}
        text = ""
        if every and epoch % every == 0:
            held_out = self._score(self.average.module if self.average is not None else self.model)
            figures |= asdict(held_out)
            text = f"held out: loss {held_out.loss:.4f}, accuracy {held_out.accuracy:.2f} %, "
        figures["seconds"] = self.phases.training
        self.history.append(figures)
        last = self.progress.epoch * self.data.steps + self.progress.step - 1
        self.progress = RunProgress(epoch)
        board.write(epoch, {**figures, "learning_rate": rate_at(last, self.data.steps, self.config.training)})
        epochs = math.ceil(self.total_steps / self.data.steps)
        echo(
            f"{self.config.name}, epoch {epoch} of {epochs}: training loss {loss:.4f}, {text}{self.phases.training:.1f} s"
        )
        if self.config.output.checkpoint:
            self._save()

    def _save(self) -> None:
        with self.phases.of("saving"):
            checkpoint.save(self, Path(self.config.output.checkpoint))

    def _merge(self) -> None:
        """Merge the factors in the model and in its average, and keep the one that is scored."""
        before = self._scored_model()
        if self.switch is not None and self.switch.plan is not None:
            with self.phases.of("merging"):
                self.model = tdfx.merge(self.model, averaged=self.average)
            self.merge_error = difference(self._scored_model(), before, self.example[0])
        self.merged = self._scored_model()

    def _scored_model(self) -> nn.Module:
        return unwrapped(self.average.module if self.average is not None else self.model)

    def verify(self) -> bool:
        """Return True if, by ONNX, the merged model has the graph and the outputs of a new network with its weights."""
        assert self.merged is not None, "the run has not ended"
        reference = self.new_model()
        reference.load_state_dict(self.merged.state_dict(), strict=True)
        return tdfx.verify(self.merged, reference, example_inputs=self.example).ok

    def _score(self, model: nn.Module) -> Score:
        with self.phases.of("evaluation"):
            return score(model, self.data, self.device, self.layout)

    def final_score(self) -> Score:
        """Return the score of the merged model; all processes must call this."""
        assert self.merged is not None, "the run has not ended"
        return self._score(self.merged)


@torch.no_grad()
def difference(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    """Return the largest difference of two models' outputs in eval mode, relative to the reference's largest output."""
    outputs, expected = (each.eval()(x).double() for each in (model, reference))
    return float((outputs - expected).abs().max() / expected.abs().max())
