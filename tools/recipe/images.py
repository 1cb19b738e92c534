"""The sets of images: scikit-learn's digits, CIFAR-10, rendered glyphs, and folders of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from recipe.config import Config
from recipe.data import Batch, DataSet, InMemory, Place, cache_folder, generator_of
from recipe.errors import RecipeError
from recipe.glyphs import CLASSES, distorted, glyph_images
from recipe.models import Shape
from tdfx.demo.run import jitter, load_digits
from tdfx.errors import TdfxError

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the colors of photographs, as is usual."""


def digits(config: Config, place: Place) -> InMemory:
    """Return scikit-learn's 1,797 digits of 8×8 pixels, a third of them held out."""
    try:
        found = load_digits()
    except TdfxError as error:
        raise RecipeError(str(error)) from error
    train, test = (found.train_x, found.train_y), (found.test_x, found.test_y)
    return InMemory(config, place, train, test, 10, jitter)


def glyphs(config: Config, place: Place) -> InMemory:
    """Return letters and digits in the fonts of this machine; those of the held-out fonts are never trained on."""
    train, test = glyph_images(config.data.fonts, Path(cache_folder(config)))
    # What is held out is turned and bent too, always in the same way.
    bent = distorted(test[0].float() / 255, generator_of(0))
    return InMemory(config, place, train, (bent, test[1]), len(CLASSES), distorted)


def cifar10(config: Config, place: Place) -> InMemory:
    """Return CIFAR-10 (Krizhevsky 2009), which is fetched where that is allowed and it is not there yet."""
    root = cache_folder(config)
    if place.world > 1 and not place.first:
        dist.barrier()  # until the first has fetched it, or failed
    try:
        train, test = (
            torchvision.datasets.CIFAR10(root, train=one, download=config.data.download and place.first)
            for one in (True, False)
        )
    except (OSError, RuntimeError) as error:
        raise RecipeError(
            f"CIFAR-10 is not in data.root={root!r}, and could not be fetched: {error}. Put the folder "
            f"cifar-10-batches-py there by hand, or train on 'glyphs', which the recipe makes itself."
        ) from error
    finally:
        if place.world > 1 and place.first:
            dist.barrier()
    images, labels = zip(*((_normal(one.data), torch.tensor(one.targets)) for one in (train, test)), strict=True)
    return InMemory(config, place, (images[0], labels[0]), (images[1], labels[1]), 10, cropped)


def _normal(images: Any) -> Tensor:
    """Return images (n, h, w, colors) of bytes as floats (n, colors, h, w) about 0."""
    found = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).float() / 255
    return (found - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def cropped(images: Tensor, generator: torch.Generator, most: int = 4) -> Tensor:
    """Move each image (n, colors, side, side) by up to some pixels, zeros coming in, and turn about half of them round."""
    count, _, side, _ = images.shape
    down, right = (torch.randint(2 * most + 1, (count, 1), generator=generator) for _ in range(2))
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    across = torch.arange(side).expand(count, -1)
    across = torch.where(flipped, across.flip(1), across) + right
    padded = F.pad(images, (most, most, most, most))
    rows = (torch.arange(side) + down)[:, :, None]
    return padded[torch.arange(count)[:, None, None], :, rows, across[:, None, :]].permute(0, 3, 1, 2)


class Folder(DataSet):
    """Pictures in folders of classes below ``train`` and ``val``, in the format of ImageNet."""

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.side, self.workers = config.data.side or 224, config.data.workers
        if not config.data.root:
            raise RecipeError("data.name='imagefolder' needs data.root, a folder that holds 'train' and 'val'.")
        toward = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION)]
        middle = [v2.Resize(self.side * 8 // 7), v2.CenterCrop(self.side)]
        changed = [v2.RandomResizedCrop(self.side), v2.RandomHorizontalFlip()] if config.data.augment else middle
        parts = (("train", changed), ("val", middle))
        try:
            self.train, self.test = (
                torchvision.datasets.ImageFolder(Path(config.data.root, part), v2.Compose([*steps, *toward]))
                for part, steps in parts
            )
        except (OSError, FileNotFoundError) as error:
            raise RecipeError(
                f"data.root={config.data.root!r} is no folder of pictures: {error}. It must hold 'train' and 'val', each "
                f"with a folder for every class."
            ) from error
        if self.train.classes != self.test.classes:
            odd = sorted(set(self.train.classes) ^ set(self.test.classes))
            raise RecipeError(
                f"'train' and 'val' in data.root={config.data.root!r} hold different classes: {odd[0]!r} is in one only."
            )
        self.shape = Shape(len(self.train.classes), side=self.side)
        self.steps = self.steps_of(len(self.train))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this process's part of an epoch's batches from one step on."""
        drawn = _Drawn(self.train, self.seed, epoch)
        order = [chosen.tolist() for chosen in self.order(epoch, len(self.train))[start:]]
        yield from DataLoader(
            drawn, batch_sampler=order, num_workers=self.workers, pin_memory=torch.cuda.is_available()
        )

    def held_out(self) -> Iterator[Batch]:
        """Yield this process's part of what is held out."""
        mine = list(range(self.place.rank, len(self.test), self.place.world))
        parts = [mine[at : at + self.batch] for at in range(0, len(mine), self.batch)]
        yield from DataLoader(self.test, batch_sampler=parts, num_workers=self.workers)


class _Drawn(torch.utils.data.Dataset[Batch]):
    """A set whose pictures change at random as seed, epoch and place fix it, whichever process reads them."""

    def __init__(self, inside: Any, seed: int, epoch: int) -> None:
        self.inside, self.seed, self.epoch = inside, seed, epoch

    def __getitem__(self, index: int) -> Batch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_of(self.seed, self.epoch, index).initial_seed())
            found: Batch = self.inside[index]
            return found
