"""The data sets: batches that seed, epoch and step alone fix, so that a resumed run sees what an undisturbed one does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import platformdirs
import torch
from sources import pieces, python_sources
from torch import Tensor

from recipe.config import Config
from recipe.errors import RecipeError
from recipe.models import Shape

Batch = tuple[Tensor, Tensor]
"""What goes in, and what is to come out."""
EVALUATED = 256
"""Samples of one batch of what is held out."""
_HELD_OUT_PIECES = 1024


@dataclass(frozen=True, slots=True)
class Place:
    """Which of the processes this is."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """True for the one that writes files and speaks."""
        return self.rank == 0


def cache_folder(config: Config) -> str:
    """Return where data are kept that are fetched or made."""
    return config.data.root or platformdirs.user_cache_dir("tdfx-recipe")


def generator_of(*numbers: int) -> torch.Generator:
    """Return random numbers that some whole numbers fix, each of them.

    >>> torch.rand(1, generator=generator_of(0, 1)) == torch.rand(1, generator=generator_of(1, 0))
    tensor([False])
    """
    mixed = 0
    for one in numbers:
        # Steps of a multiplicative generator modulo a prime, so that neighbours are far from one another.
        mixed = (mixed * 6364136223846793005 + one + 1442695040888963407) % (2**61 - 1)
    return torch.Generator().manual_seed(mixed)


class DataSet(ABC):
    """What a run trains on, on one of its processes."""

    shape: Shape
    steps: int
    """Steps of an epoch."""

    def __init__(self, config: Config, place: Place) -> None:
        self.seed, self.place = config.seed, place
        if config.data.batch % place.world:
            raise RecipeError(
                f"data.batch={config.data.batch} is over all processes, and {place.world} of them cannot share it evenly. "
                f"Take a multiple of {place.world}."
            )
        self.whole = config.data.batch
        self.batch = config.data.batch // place.world

    @abstractmethod
    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this process's part of an epoch's batches from one step on."""

    @abstractmethod
    def held_out(self) -> Iterator[Batch]:
        """Yield this process's part of what is held out."""

    def order(self, epoch: int, count: int) -> list[Tensor]:
        """Return the indices of each step of an epoch, of this process's part; what fills no batch is left out.

        Raises:
            RecipeError: There is less than one batch.
        """
        order = torch.randperm(count, generator=generator_of(self.seed, epoch))
        chosen = order[: count // self.whole * self.whole].view(-1, self.whole)
        return list(chosen[:, self.place.rank * self.batch :][:, : self.batch])

    def steps_of(self, count: int) -> int:
        """Return the whole batches in so many samples.

        Raises:
            RecipeError: There is less than one.
        """
        if count < self.whole:
            raise RecipeError(f"data.batch={self.whole} is more than the {count} samples to train on. Lower it.")
        return count // self.whole

    def random(self, epoch: int, step: int) -> torch.Generator:
        """Return the random numbers of this process for one step."""
        return generator_of(self.seed, epoch, step + 1, self.place.rank)


Augment = Callable[[Tensor, torch.Generator], Tensor]


class InMemory(DataSet):
    """Images (n, colors, side, side) and labels (n,) that fit into memory, whole batches changed at random."""

    def __init__(
        self, config: Config, place: Place, train: Batch, test: Batch, classes: int, augment: Augment | None
    ) -> None:
        super().__init__(config, place)
        self.train, self.test = train, test
        self.augment = augment if config.data.augment else None
        self.shape = Shape(classes, colors=train[0].shape[1], side=train[0].shape[-1])
        self.steps = self.steps_of(len(train[0]))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this process's part of an epoch's batches from one step on."""
        for step, chosen in enumerate(self.order(epoch, len(self.train[0]))):
            if step >= start:
                images = _floats(self.train[0][chosen])
                changed = images if self.augment is None else self.augment(images, self.random(epoch, step))
                yield changed, self.train[1][chosen]

    def held_out(self) -> Iterator[Batch]:
        """Yield this process's part of what is held out."""
        mine = [one[self.place.rank :: self.place.world] for one in self.test]
        for images, labels in zip(*(torch.split(one, EVALUATED) for one in mine), strict=True):
            yield _floats(images), labels


class Text(DataSet):
    """Pieces of Python's own sources, and the byte after each of theirs; whole files are held out."""

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.train, self.test = python_sources()
        self.shape = Shape(256, length=config.data.length)
        self.steps = config.data.steps

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield pieces that begin anywhere."""
        for step in range(start, self.steps):
            yield pieces(self.train, self.batch, self.shape.length, self.random(epoch, step))

    def held_out(self) -> Iterator[Batch]:
        """Yield this process's part of the same pieces each time."""
        found = pieces(self.test, _HELD_OUT_PIECES, self.shape.length, torch.Generator().manual_seed(0))
        mine = [one[self.place.rank :: self.place.world] for one in found]
        yield from zip(*(torch.split(one, EVALUATED) for one in mine), strict=True)


def _floats(images: Tensor) -> Tensor:
    """Return images of bytes as floats in [0, 1], and others as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def load_data(config: Config, place: Place) -> DataSet:
    """Return the data set that a config names.

    Raises:
        RecipeError: It is not there and cannot be had, and why.
    """
    from recipe import images

    makers: dict[str, Callable[[Config, Place], Any]] = {
        "digits": images.digits,
        "cifar10": images.cifar10,
        "glyphs": images.glyphs,
        "imagefolder": images.Folder,
        "text": Text,
    }
    found: DataSet = makers[config.data.name](config, place)
    return found
