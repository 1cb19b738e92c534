"""One training run: train, switch, train on, merge, score."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import tdfx
from recipe import checkpoint
from recipe.board import Board
from recipe.config import Config
from recipe.data import Batch, DataSet, Place, load_data
from recipe.models import build
from recipe.phases import Phases
from recipe.schedule import make_average, make_optimizer, rate_at, set_rate
from recipe.score import Score, loss_of, moved, score
from recipe.switching import DTYPES, make_switch

Clock = Callable[[], float]
Say = Callable[[str], None]


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    epoch: int = 0
    """Epochs that are done."""
    step: int = 0
    """Steps of the epoch after them that are done."""
    loss: float = 0.0
    """Sum of the losses of these steps, in nats."""


class Run:
    """A run in one of its processes."""

    def __init__(self, config: Config, place: Place, device: torch.device, clock: Clock = time.perf_counter) -> None:
        """Make everything anew from the seed.

        Raises:
            RecipeError: The data or the model cannot be had, or do not go together.
        """
        self.config, self.place, self.device = config, place, device
        self.layout = torch.channels_last if config.training.channels_last else torch.contiguous_format
        self.data: DataSet = load_data(config, place)
        self.phases = Phases(clock, device)
        torch.manual_seed(config.seed)
        inner = self.fresh_model()
        self.parameters = sum(one.numel() for one in inner.parameters())
        self.average: AveragedModel | None = make_average(inner, config.training.ema)
        self.optimizer = make_optimizer(inner.parameters(), config.training)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.training.amp == "fp16")
        self.switch = make_switch(config, self.data.steps, clock)
        if config.training.compile:
            inner.compile()
        self.model: nn.Module = inner
        if place.world > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.model = DistributedDataParallel(inner, device_ids=ids)
        self.progress = Progress()
        self.history: list[dict[str, float]] = []
        self.merged: nn.Module | None = None
        self.merge_error: float | None = None
        # What is drawn while a model trains, as by dropout, differs between processes.
        torch.manual_seed(config.seed + 1_000_003 * (place.rank + 1))

    def fresh_model(self) -> nn.Module:
        """Return the network as it is built, on the device of the run."""
        model = build(self.config.model, self.data.shape).to(self.device)
        four = any(one.dim() == 4 for one in model.parameters())
        return model.to(memory_format=self.layout) if four else model

    @cached_property
    def example(self) -> tuple[Tensor]:
        """The first batch, as what a plan is made for."""
        return (moved(next(self.data.batches(0))[0], self.device, self.layout),)

    def train(self, say: Say = lambda line: None, most_steps: int | None = None) -> bool:
        """Train from where it is to the end of all epochs, and merge; save as the config says.

        Args:
            say: Told each epoch's figures.
            most_steps: Steps after which to stop where it is, as if the process had ended; None for all.

        Returns:
            True if the training came to its end.
        """
        board = Board(self.config.output.tensorboard if self.place.first else "")
        left = [-1 if most_steps is None else most_steps]
        while self.progress.epoch < self.config.training.epochs:
            if not self._train_epoch(left):
                return False
            self._end_epoch(board, say)
        if self.merged is None:
            self._merge()
        board.close()
        return True

    def _train_epoch(self, left: list[int]) -> bool:
        self.model.train()
        batches = self.data.batches(self.progress.epoch, self.progress.step)
        every, path = self.config.output.every, self.config.output.checkpoint
        total = torch.tensor(self.progress.loss, dtype=torch.float64, device=self.device)
        while self.progress.step < self.data.steps:
            if left[0] == 0:
                return False
            left[0] -= 1
            with self.phases.of("data"):
                batch = next(batches)
            with self.phases.of("step"):
                total += self._step(batch)
            self.progress.step += 1
            self._switch()
            if path and every and self.progress.step % every == 0 and self.progress.step < self.data.steps:
                self.progress.loss = float(total)
                self._save()
        with self.phases.of("step"):
            self.progress.loss = float(total)
        return True

    def _step(self, batch: Batch) -> Tensor:
        """Take one training step and return its loss, not yet waited for."""
        wish = self.config.training
        done = self.progress.epoch * self.data.steps + self.progress.step
        set_rate(self.optimizer, rate_at(done, self.data.steps, wish))
        x, y = moved(batch[0], self.device, self.layout), batch[1].to(self.device, non_blocking=True)
        kind = self.device.type
        with torch.autocast(kind, DTYPES[wish.amp]) if wish.amp in DTYPES else nullcontext():
            loss = loss_of(self.model(x), y, wish.label_smoothing)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if wish.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), wish.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss.detach().double()

    def _switch(self) -> None:
        if self.switch is None or self.switch.done:
            return
        self.phases.settle()
        before = self.switch.spent
        self.model = self.switch.step(
            self.model, optimizer=self.optimizer, example_inputs=self.example, averaged=self.average
        )
        for name, seconds in self.switch.spent.items():
            self.phases.add(name, seconds - before[name])

    def _end_epoch(self, board: Board, say: Say) -> None:
        found = self._score(self.average.module if self.average is not None else self.model)
        self.progress.epoch += 1
        loss, self.progress.step, self.progress.loss = self.progress.loss / self.data.steps, 0, 0.0
        epoch = self.progress.epoch
        row = {"epoch": epoch, "training_loss": loss, **asdict(found), "seconds": self.phases.training}
        self.history.append(row)
        rate = rate_at(epoch * self.data.steps - 1, self.data.steps, self.config.training)
        board.write(epoch, {**row, "learning_rate": rate})
        say(
            f"{self.config.name}, epoch {epoch} of {self.config.training.epochs}: training loss {loss:.4f}, held out: loss "
            f"{found.loss:.4f}, accuracy {found.accuracy:.2f} %, {self.phases.training:.1f} s"
        )
        self._save()

    def _save(self) -> None:
        if self.config.output.checkpoint:
            with self.phases.of("saving"):
                checkpoint.save(self, Path(self.config.output.checkpoint))

    def _merge(self) -> None:
        """Multiply the factors out, in the model and in its average; what is scored in the end is merged."""
        before = self._result()
        if self.switch is not None and self.switch.plan is not None:
            with self.phases.of("merging"):
                self.model = tdfx.merge(self.model, averaged=self.average)
            self.merge_error = difference(self._result(), before, self.example[0])
        self.merged = self._result()

    def _result(self) -> nn.Module:
        """Return the model that is scored, out of its wrapper."""
        model = self.average.module if self.average is not None else self.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    def prove(self) -> bool:
        """Return True if the merged model's graph and numbers are those of a new network with its values, by ONNX."""
        assert self.merged is not None, "the run has not come to its end"
        reference = self.fresh_model()
        reference.load_state_dict(self.merged.state_dict(), strict=True)
        return tdfx.verify(self.merged, reference, example_inputs=self.example).ok

    def _score(self, model: nn.Module) -> Score:
        with self.phases.of("evaluation"):
            return score(model, self.data, self.device, self.layout)

    def final_score(self) -> Score:
        """Return what the model that is the run's result is worth; all processes must ask."""
        assert self.merged is not None, "the run has not come to its end"
        return self._score(self.merged)


@torch.no_grad()
def difference(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Return the largest difference of two models' outputs in eval mode, relative to the largest output."""
    found, expected = (one.eval()(x).double() for one in (model, other))
    return float((found - expected).abs().max() / expected.abs().max())
