"""The training tasks of ``study_default.py`` and ``compare.py``: small networks on real data that every machine has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from nets import CharacterModel, ResNetForSmallImages
from options import is_chosen
from study_data import Batch, batches, learning_rate, loss_of, pieces, python_sources, train_step
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tdfx.demo.run import LEARNING_RATE, Digits, build_model, load_digits

_HELD_OUT = 256
"""Pieces of text that are held out."""


class StudyTask(ABC):
    """One network on one data set."""

    name: ClassVar[str]
    steps: ClassVar[int]
    """Training steps of a complete run."""
    peak: ClassVar[float]
    """Largest learning rate."""

    @abstractmethod
    def model(self) -> nn.Module:
        """Return the network, initialized from torch's global random numbers."""

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return the optimizer that trains it, AdamW unless a task has another."""
        return AdamW(parameters, lr=self.peak, weight_decay=0.05)

    @abstractmethod
    def data(self, seed: int) -> Iterator[Batch]:
        """Yield training batches endlessly, in an order that the seed determines."""

    @abstractmethod
    def held_out(self) -> Batch:
        """Return the data that are never trained on."""

    def take_step(self, model: nn.Module, optimizer: Optimizer, batch: Batch, progress: float) -> None:
        """Take one training step at the learning rate after a share of the training."""
        for group in optimizer.param_groups:
            group["lr"] = self.peak * learning_rate(progress) / LEARNING_RATE
        train_step(model, optimizer, *batch)

    @torch.no_grad()
    def held_out_outputs(self, model: nn.Module) -> Tensor:
        """Return the model's outputs for the held-out data, in eval mode."""
        return torch.cat([model.eval()(part) for part in torch.split(self.held_out()[0], 256)])

    @torch.no_grad()
    def score(self, model: nn.Module) -> tuple[float, float]:
        """Return the accuracy in percent and the mean loss in nats on the held-out data."""
        outputs, labels = self.held_out_outputs(model), self.held_out()[1]
        accuracy = (outputs.argmax(-1) == labels).float().mean()
        return 100 * float(accuracy), float(loss_of(outputs, labels))


class _DigitsTask(StudyTask):
    @cached_property
    def digits(self) -> Digits:
        return load_digits()

    def data(self, seed: int) -> Iterator[Batch]:
        return batches(self.digits, seed)

    def held_out(self) -> Batch:
        return self.digits.test_x, self.digits.test_y


class Vgg(_DigitsTask):
    """The demo's network, a little narrower, with SGD with momentum."""

    name, steps, peak = "VGG, digits", 180, 0.05

    def model(self) -> nn.Module:
        """Return six convolutions of 96 to 384 channels."""
        return build_model(96)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return SGD as in the demo."""
        return SGD(parameters, lr=self.peak, momentum=0.9, weight_decay=5e-4)


class ResNet(_DigitsTask):
    """A residual network of 14 layers, with AdamW."""

    name, steps, peak = "ResNet-14, digits", 200, 3e-3

    def model(self) -> nn.Module:
        """Return three stages of two blocks, with 48 to 192 channels."""
        return ResNetForSmallImages(14, width=48, colors=1).to(memory_format=torch.channels_last)


class Characters(StudyTask):
    """A small transformer on the sources of Python's standard library, byte by byte, with AdamW."""

    name, steps, peak = "transformer, sources", 240, 3e-3
    length, batch = 64, 8

    @cached_property
    def text(self) -> tuple[Tensor, Tensor]:
        """Bytes to train on, and held-out bytes."""
        return python_sources()

    def model(self) -> nn.Module:
        """Return two blocks of 256 channels."""
        return CharacterModel(256, layers=2, length=self.length)

    def data(self, seed: int) -> Iterator[Batch]:
        """Yield pieces from random positions."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield pieces(self.text[0], self.batch, self.length, generator)

    def held_out(self) -> Batch:
        """Return the same pieces each time."""
        return pieces(self.text[1], _HELD_OUT, self.length, torch.Generator().manual_seed(0))


TASKS: tuple[type[StudyTask], ...] = (Vgg, ResNet, Characters)
"""All tasks."""


def tasks_named(tasks: Sequence[type[StudyTask]], parts: Sequence[str]) -> list[StudyTask]:
    """Return an instance of each task whose name contains one of the parts; of all tasks if there are no parts."""
    return [task() for task in tasks if is_chosen(task.name, parts)]
