"""Data sets whose batches depend on seed, epoch and step alone, so that a resumed run sees the same batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import platformdirs
import torch
from study_data import Batch
from torch import Tensor

from recipe.config import RunConfig
from recipe.errors import RecipeError
from recipe.models import DataShape
from recipe.processes import Process

EVALUATED = 256
"""Samples in one batch of held-out data."""
Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Changes a batch of images at random."""


def cache_folder(config: RunConfig) -> str:
    """Return the folder of data that are downloaded or generated."""
    return config.data.root or platformdirs.user_cache_dir("tdfx-recipe")


def generator_of(*numbers: int) -> torch.Generator:
    """Return a random generator whose seed depends on each of some integers and on their order.

    >>> torch.rand(1, generator=generator_of(0, 1)) == torch.rand(1, generator=generator_of(1, 0))
    tensor([False])
    """
    seed = 0
    for number in numbers:
        # Steps of a multiplicative generator modulo a prime, so that the seeds of neighbours are far apart.
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % (2**61 - 1)
    return torch.Generator().manual_seed(seed)


class DataSet(ABC):
    """The part of a data set that one process trains on and scores."""

    shape: DataShape
    steps: int
    """Steps of an epoch."""

    def __init__(self, config: RunConfig, process: Process) -> None:
        self.seed, self.process = config.seed, process
        if config.data.batch % process.world:
            raise RecipeError(
                f"data.batch={config.data.batch} is over all processes, and {process.world} of them cannot share it evenly. "
                f"Use a multiple of {process.world}."
            )
        self.total_batch = config.data.batch
        self.batch = config.data.batch // process.world

    @abstractmethod
    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this process's part of the batches of an epoch, from a step on."""

    @abstractmethod
    def held_out(self) -> Iterator[Batch]:
        """Yield this process's part of the held-out data."""

    def order(self, epoch: int, count: int) -> list[Tensor]:
        """Return this process's sample indices for each step of an epoch; an incomplete last batch is left out."""
        order = torch.randperm(count, generator=generator_of(self.seed, epoch))
        steps = order[: count // self.total_batch * self.total_batch].view(-1, self.total_batch)
        return list(steps[:, self.process.rank * self.batch :][:, : self.batch])

    def steps_of(self, count: int) -> int:
        """Return the number of complete batches in so many samples; RecipeError if there is none."""
        if count < self.total_batch:
            raise RecipeError(f"data.batch={self.total_batch} is more than the {count} samples to train on. Lower it.")
        return count // self.total_batch

    def random(self, epoch: int, step: int) -> torch.Generator:
        """Return the random numbers of this process for one step."""
        return generator_of(self.seed, epoch, step + 1, self.process.rank)

    def split_held_out(self, x: Tensor, y: Tensor) -> Iterator[Batch]:
        """Yield this process's part of held-out tensors in batches."""
        parts = [tensor[self.process.rank :: self.process.world] for tensor in (x, y)]
        yield from zip(*(torch.split(part, EVALUATED) for part in parts), strict=True)


class InMemoryImages(DataSet):
    """Images (n, colors, side, side) and labels (n,) in memory; augmentation changes whole batches."""

    def __init__(
        self, config: RunConfig, process: Process, train: Batch, test: Batch, classes: int, augment: Augment | None
    ) -> None:
        super().__init__(config, process)
        self.train, self.test = train, test
        self.augment = augment if config.data.augment else None
        self.shape = DataShape(classes, colors=train[0].shape[1], side=train[0].shape[-1])
        self.steps = self.steps_of(len(train[0]))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this process's part of the batches of an epoch, from a step on."""
        for step, indices in enumerate(self.order(epoch, len(self.train[0]))):
            if step >= start:
                images = _as_floats(self.train[0][indices])
                augmented = images if self.augment is None else self.augment(images, self.random(epoch, step))
                yield augmented, self.train[1][indices]

    def held_out(self) -> Iterator[Batch]:
        """Yield this process's part of the held-out data."""
        for images, labels in self.split_held_out(*self.test):
            yield _as_floats(images), labels


def _as_floats(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images
