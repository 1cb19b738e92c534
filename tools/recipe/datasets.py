"""The data sets by name: scikit-learn's digits, CIFAR-10, rendered glyphs, folders of images, and text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from study_data import Batch, pieces, python_sources
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from recipe.config import RunConfig
from recipe.data import DataSet, InMemoryImages, cache_folder, generator_of
from recipe.errors import RecipeError
from recipe.glyphs import CLASSES, distort, glyph_images
from recipe.models import DataShape
from recipe.processes import Process
from tdfx.demo.run import jitter, load_digits
from tdfx.errors import TdfxError

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The usual mean and standard deviation of the colors of photographs."""


def digits(config: RunConfig, process: Process) -> InMemoryImages:
    """Return scikit-learn's 1,797 digits of 8×8 pixels, a third of them held out."""
    try:
        images = load_digits()
    except TdfxError as error:
        raise RecipeError(str(error)) from error
    train, test = (images.train_x, images.train_y), (images.test_x, images.test_y)
    return InMemoryImages(config, process, train, test, 10, jitter)


def glyphs(config: RunConfig, process: Process) -> InMemoryImages:
    """Return letters and digits in the fonts of this machine; the held-out fonts are never trained on."""
    train, test = glyph_images(config.data.fonts, Path(cache_folder(config)))
    # Held-out images are distorted too, always in the same way.
    distorted = distort(test[0].float() / 255, generator_of(0))
    return InMemoryImages(config, process, train, (distorted, test[1]), len(CLASSES), distort)


def cifar10(config: RunConfig, process: Process) -> InMemoryImages:
    """Return CIFAR-10 (Krizhevsky 2009), and download it first if it is missing and that is allowed."""
    root = cache_folder(config)
    if process.world > 1 and not process.is_first:
        dist.barrier()  # until the first process has downloaded it, or failed
    try:
        train, test = (
            torchvision.datasets.CIFAR10(root, train=is_train, download=config.data.download and process.is_first)
            for is_train in (True, False)
        )
    except (OSError, RuntimeError) as error:
        raise RecipeError(
            f"CIFAR-10 is not in data.root={root!r}, and could not be downloaded: {error}. Put the folder "
            f"cifar-10-batches-py there by hand, or train on 'glyphs', which the recipe generates itself."
        ) from error
    finally:
        if process.world > 1 and process.is_first:
            dist.barrier()
    train_batch, test_batch = ((_normalized(part.data), torch.tensor(part.targets)) for part in (train, test))
    return InMemoryImages(config, process, train_batch, test_batch, 10, crop_and_flip)


def _normalized(images: Any) -> Tensor:
    floats = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).float() / 255
    return (floats - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def crop_and_flip(images: Tensor, generator: torch.Generator, most: int = 4) -> Tensor:
    """Shift each image (n, colors, side, side) by up to ``most`` pixels, padded by zeros, and flip about half of them."""
    count, _, side, _ = images.shape
    down, right = (torch.randint(2 * most + 1, (count, 1), generator=generator) for _ in range(2))
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.arange(side).expand(count, -1)
    columns = torch.where(flipped, columns.flip(1), columns) + right
    padded = F.pad(images, (most, most, most, most))
    rows = (torch.arange(side) + down)[:, :, None]
    return padded[torch.arange(count)[:, None, None], :, rows, columns[:, None, :]].permute(0, 3, 1, 2)


class ImageFolders(DataSet):
    """Images in a folder for each class below ``train`` and ``val``, in the format of ImageNet."""

    def __init__(self, config: RunConfig, process: Process) -> None:
        super().__init__(config, process)
        self.side, self.workers = config.data.side or 224, config.data.workers
        if not config.data.root:
            raise RecipeError("data.name='imagefolder' needs data.root, a folder that contains 'train' and 'val'.")
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION)]
        center = [v2.Resize(self.side * 8 // 7), v2.CenterCrop(self.side)]
        augmented = [v2.RandomResizedCrop(self.side), v2.RandomHorizontalFlip()] if config.data.augment else center
        try:
            self.train, self.test = (
                torchvision.datasets.ImageFolder(Path(config.data.root, part), v2.Compose([*transforms, *to_tensor]))
                for part, transforms in (("train", augmented), ("val", center))
            )
        except OSError as error:
            raise RecipeError(
                f"data.root={config.data.root!r} is not a folder of images: {error}. It must contain 'train' and 'val', "
                f"each with a folder for every class."
            ) from error
        if self.train.classes != self.test.classes:
            different = sorted(set(self.train.classes) ^ set(self.test.classes))
            raise RecipeError(
                f"'train' and 'val' in data.root={config.data.root!r} have different classes: {different[0]!r} is in one."
            )
        self.shape = DataShape(len(self.train.classes), side=self.side)
        self.steps = self.steps_of(len(self.train))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this process's part of the batches of an epoch, from a step on."""
        images = _SeededImages(self.train, self.seed, epoch)
        order = [indices.tolist() for indices in self.order(epoch, len(self.train))[start:]]
        pin = torch.cuda.is_available()
        yield from DataLoader(images, batch_sampler=order, num_workers=self.workers, pin_memory=pin)

    def held_out(self) -> Iterator[Batch]:
        """Yield this process's part of the held-out images."""
        indices = list(range(self.process.rank, len(self.test), self.process.world))
        parts = [indices[start : start + self.batch] for start in range(0, len(indices), self.batch)]
        yield from DataLoader(self.test, batch_sampler=parts, num_workers=self.workers)


class _SeededImages(torch.utils.data.Dataset[Batch]):
    """Images whose random changes depend on seed, epoch and index alone, whichever process reads them."""

    def __init__(self, images: Any, seed: int, epoch: int) -> None:
        self.images, self.seed, self.epoch = images, seed, epoch

    def __getitem__(self, index: int) -> Batch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_of(self.seed, self.epoch, index).initial_seed())
            return self.images[index]  # type: ignore[no-any-return]


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
        generator = torch.Generator().manual_seed(0)
        yield from self.split_held_out(*pieces(self.test, _HELD_OUT_PIECES, self.shape.length, generator))


BUILDERS: dict[str, Callable[[RunConfig, Process], DataSet]] = {
    "digits": digits,
    "cifar10": cifar10,
    "glyphs": glyphs,
    "imagefolder": ImageFolders,
    "text": SourceText,
}
"""Value of ``data.name`` -> builder."""


def load_data(config: RunConfig, process: Process) -> DataSet:
    """Return the data set that a config names; RecipeError if it cannot be read, downloaded or generated."""
    return BUILDERS[config.data.name](config, process)
