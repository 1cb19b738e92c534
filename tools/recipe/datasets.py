"""The data sets by name, and the one that consists of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from digits_training import Batch
from sources import pieces, python_sources

from recipe import images
from recipe.config import RunConfig
from recipe.data import DataSet
from recipe.models import DataShape
from recipe.processes import Process

_HELD_OUT_PIECES = 1024


class SourceText(DataSet):
    """Pieces of Python's own sources, and for each byte the one after it; whole files are held out."""

    def __init__(self, config: RunConfig, process: Process) -> None:
        super().__init__(config, process)
        self.train, self.test = python_sources()
        self.shape = DataShape(256, length=config.data.length)
        self.steps = config.data.steps

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield pieces from random positions."""
        for step in range(start, self.steps):
            yield pieces(self.train, self.batch, self.shape.length, self.random(epoch, step))

    def held_out(self) -> Iterator[Batch]:
        """Yield this process's part of the same pieces each time."""
        yield from self.split_held_out(
            *pieces(self.test, _HELD_OUT_PIECES, self.shape.length, torch.Generator().manual_seed(0))
        )


BUILDERS: dict[str, Callable[[RunConfig, Process], DataSet]] = {
    "digits": images.digits,
    "cifar10": images.cifar10,
    "glyphs": images.glyphs,
    "imagefolder": images.ImageFolders,
    "text": SourceText,
}
"""Value of ``data.name`` -> builder."""


def load_data(config: RunConfig, process: Process) -> DataSet:
    """Return the data set that a config names; RecipeError if it cannot be read, downloaded or generated."""
    return BUILDERS[config.data.name](config, process)
