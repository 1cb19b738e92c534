"""What ``study_default.py`` trains: networks on real data that come with Python or scikit-learn, in seconds each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from bench_freeze import batches
from nets import CharacterModel, ResNetForSmallImages
from sources import pieces, python_sources
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tdfx.demo.run import Digits, build_model, load_digits

Batch = tuple[Tensor, Tensor]
"""What goes in, and what is to come out."""
_HELD_OUT = 256
"""Pieces of text that are held out."""


class Task(ABC):
    """One network on one data set."""

    name: ClassVar[str]
    steps: ClassVar[int]
    """Training steps of a whole run."""
    peak: ClassVar[float]
    """Largest learning rate."""

    @abstractmethod
    def model(self) -> nn.Module:
        """Return the network, drawn from torch's random numbers."""

    @abstractmethod
    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return what trains it."""

    @abstractmethod
    def data(self, seed: int) -> Iterator[Batch]:
        """Yield training batches for ever, in an order that the seed fixes."""

    @abstractmethod
    def held_out(self) -> Batch:
        """Return what is never trained on."""

    @torch.no_grad()
    def score(self, model: nn.Module) -> tuple[float, float]:
        """Return the right answers in percent and the mean loss in nats, on what is held out, in eval mode."""
        x, y = self.held_out()
        outputs = torch.cat([model.eval()(part) for part in torch.split(x, 256)])
        right = (outputs.argmax(-1) == y).float().mean()
        return 100 * float(right), float(loss_of(outputs, y))


def loss_of(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (..., classes) for classes (...)."""
    return F.cross_entropy(outputs.flatten(0, -2), y.flatten())


class _OnDigits(Task):
    @cached_property
    def digits(self) -> Digits:
        return load_digits()

    def data(self, seed: int) -> Iterator[Batch]:
        return batches(self.digits, seed)

    def held_out(self) -> Batch:
        return self.digits.test_x, self.digits.test_y


class Vgg(_OnDigits):
    """The demo's network, a little narrower, by SGD with momentum."""

    name, steps, peak = "VGG, digits", 180, 0.05

    def model(self) -> nn.Module:
        """Return six convolutions of 96 to 384 channels."""
        return build_model(96)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return SGD as in the demo."""
        return SGD(parameters, lr=self.peak, momentum=0.9, weight_decay=5e-4)


class ResNet(_OnDigits):
    """A residual network of 14 layers, by AdamW."""

    name, steps, peak = "ResNet-14, digits", 200, 3e-3

    def model(self) -> nn.Module:
        """Return three times two blocks of 48 to 192 channels."""
        return ResNetForSmallImages(14, width=48, colors=1).to(memory_format=torch.channels_last)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return AdamW."""
        return AdamW(parameters, lr=self.peak, weight_decay=0.05)


class Characters(Task):
    """A small transformer on the sources of Python's standard library, byte by byte, by AdamW."""

    name, steps, peak = "transformer, sources", 240, 3e-3
    length, batch = 64, 8

    @cached_property
    def text(self) -> tuple[Tensor, Tensor]:
        """Bytes to train on, and those that are held out."""
        return python_sources()

    def model(self) -> nn.Module:
        """Return two blocks of 256 channels."""
        return CharacterModel(256, layers=2, length=self.length)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return AdamW."""
        return AdamW(parameters, lr=self.peak, weight_decay=0.05)

    def data(self, seed: int) -> Iterator[Batch]:
        """Yield pieces that begin anywhere."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield pieces(self.text[0], self.batch, self.length, generator)

    def held_out(self) -> Batch:
        """Return the same pieces each time."""
        return pieces(self.text[1], _HELD_OUT, self.length, torch.Generator().manual_seed(0))


TASKS: tuple[type[Task], ...] = (Vgg, ResNet, Characters)
"""What there is to train."""
