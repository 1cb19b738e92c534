"""The whole method on real data: train, rewrite mid-training, train on, merge back, prove.

The data are the 1,797 handwritten digits that scikit-learn ships (Alpaydin and Kaynak, *Optical Recognition of Handwritten
Digits*, UCI 1998): scans of 8×8 pixels, a third of them held out. The same network is trained twice with the same seed,
data order, augmentation, optimizer and schedule, once as it is and once with tdfx.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdfx.api import merge, plan, rewrite
from tdfx.errors import PolicyError, TdfxError
from tdfx.onnx_proof.report import VerifyReport
from tdfx.onnx_proof.verify import verify
from tdfx.plans.plan import Plan
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import DEFAULT_RULE

BATCH = 64
LEARNING_RATE = 0.05
DEFAULT_EPOCHS = 24
SPEEDUP = 3.0
"""How many times faster a step shall be, or as near to that as can be had."""
SWITCH_AT = 0.125
"""Part of the epochs after which the model is rewritten."""
TRAINING_SHARE = 2 / 3
"""Part of the images to train on; the rest is held out."""
TURN, ZOOM, SHIFT = 0.25, 0.15, 0.2
"""Most that an image is turned (radians), scaled (part of its size) and moved (part of half its size) in training."""

Ticker = Callable[[str, int, int], None]
"""Called before the first and after each epoch with the name of the run, the epochs done and the epochs in all."""


@dataclass(frozen=True, slots=True)
class Digits:
    """The images (n, 1, 8, 8), in [0, 1], and their labels (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """What one training run gave."""

    seconds: float
    """Training time, with plan, switch and merge where there are any, without evaluation."""
    accuracy: float
    """Right answers among the held-out images, in percent."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Everything that the demo's table shows."""

    seed: int
    epochs: int
    switch_epoch: int
    """Epochs trained before the rewrite."""
    full: Run
    tdfx: Run
    merged_accuracy: float
    """Accuracy of the merged model, in percent."""
    switch_seconds: float
    """Time of plan and rewrite; counted in ``tdfx.seconds``."""
    merge_error: float
    """Largest difference between merged and factorized outputs on the held-out images, relative to the largest output."""
    plan: Plan
    report: VerifyReport
    """The merged model against a new instance of the original class with its weights."""
    numbers: VerifyReport
    """The merged model against the factorized one: other graphs, and numbers that must agree."""

    @property
    def verified(self) -> bool:
        """True if the merged graph is the original's and its numbers are the factorized model's."""
        return self.report.ok and self.numbers.numbers_match

    @property
    def speedup(self) -> float:
        """How many times faster the run with tdfx was, in total."""
        return self.full.seconds / self.tdfx.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON: seconds, and accuracies in percent."""
        return {
            "seed": self.seed,
            "epochs": self.epochs,
            "switch_epoch": self.switch_epoch,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "full": asdict(self.full),
            "tdfx": {**asdict(self.tdfx), "switch_seconds": self.switch_seconds},
            "merged": {"accuracy": self.merged_accuracy, "error": self.merge_error},
            "speedup": self.speedup,
            "sites": {"factorized": len(self.plan.factorized), "all": len(self.plan)},
            "parameters": {"before": self.plan.parameters_before, "after": self.plan.parameters_after},
            "verified": self.verified,
            "onnx": {"original": self.report.to_dict(), "factorized": self.numbers.to_dict()},
        }


def load_digits() -> Digits:
    """Return the digits, shuffled with a fixed seed and cut in two.

    Raises:
        TdfxError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise TdfxError(
            "The demo's images come with scikit-learn, which is not installed. Install it with: pip install 'tdfx[demo]'"
        ) from error
    bunch = load()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    count = round(TRAINING_SHARE * len(images))
    train, test = order[:count], order[count:]
    return Digits(images[train], labels[train], images[test], labels[test])


def build_model(width: int = 128, *, colors: int = 1, classes: int = 10) -> nn.Module:
    """Return a VGG-like network of six 3×3 convolutions, with ``width`` to four times as many channels."""
    channels = (colors, width, width, 2 * width, 2 * width, 4 * width, 4 * width)
    layers: list[nn.Module] = []
    for index, (inner, outer) in enumerate(pairwise(channels)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        if index in {1, 3}:
            layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def run_demo(*, seed: int = 0, epochs: int = DEFAULT_EPOCHS, tick: Ticker | None = None) -> DemoResult:
    """Train the network twice and return both runs, the plan and the proof.

    Args:
        seed: Seed of the weights and of the order of the images, for both runs.
        epochs: Passes over the training images, at least 2.
        tick: Called as the epochs pass; see ``Ticker``.

    Raises:
        PolicyError: Fewer than 2 epochs.
        TdfxError: scikit-learn is not installed.
    """
    if epochs < 2:
        raise PolicyError(
            f"epochs={epochs} leaves nothing to train after the switch: the demo trains, rewrites and trains on. "
            f"Pass at least 2; the default is {DEFAULT_EPOCHS}."
        )
    digits = load_digits()
    _warm_up(digits)
    trainer = _Trainer(digits, seed, epochs, tick or (lambda name, done, total: None))
    full_model, full_seconds = trainer.full()
    switch_epoch = max(1, round(SWITCH_AT * epochs))
    factorized, merged, made, switch_seconds, tdfx_seconds = trainer.with_tdfx(switch_epoch)
    reference = build_model()
    reference.load_state_dict(merged.state_dict(), strict=True)
    return DemoResult(
        seed=seed,
        epochs=epochs,
        switch_epoch=switch_epoch,
        full=Run(full_seconds, accuracy(full_model, digits)),
        tdfx=Run(tdfx_seconds, accuracy(factorized, digits)),
        merged_accuracy=accuracy(merged, digits),
        switch_seconds=switch_seconds,
        merge_error=_difference(merged, factorized, digits.test_x),
        plan=made,
        report=verify(merged, reference, example_inputs=(digits.test_x[:BATCH],)),
        numbers=verify(merged, factorized, example_inputs=(digits.test_x[:BATCH],)),
    )


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and move each image (n, 1, h, w) a little, each by its own random amounts."""

    def uniform(most: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * most

    angle, scale = uniform(TURN), 1 + uniform(ZOOM)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = (cosine, -sine, uniform(SHIFT)), (sine, cosine, uniform(SHIFT))
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the right answers among the held-out images, in percent; the model is left in eval mode."""
    right = model.eval()(digits.test_x).argmax(1) == digits.test_y
    return 100 * float(right.float().mean())


class _Trainer:
    """One recipe for both runs: SGD with momentum under a one-cycle schedule, each image jittered anew."""

    def __init__(self, digits: Digits, seed: int, epochs: int, tick: Ticker) -> None:
        self.digits = digits
        self.seed = seed
        self.epochs = epochs
        self.tick = tick
        self.batches = len(digits.train_x) // BATCH

    def start(self) -> nn.Module:
        """Make the model, its optimizer and the random order anew from the seed."""
        torch.manual_seed(self.seed)
        model = build_model()
        self.order = torch.Generator().manual_seed(self.seed)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=self.epochs * self.batches
        )
        return model

    def train(self, model: nn.Module, name: str, epochs: range) -> None:
        """Train for some of the epochs."""
        model.train()
        self.tick(name, epochs.start, self.epochs)
        for epoch in epochs:
            order = torch.randperm(len(self.digits.train_x), generator=self.order)
            for chosen in torch.split(order, BATCH)[: self.batches]:
                images = jitter(self.digits.train_x[chosen], self.order)
                loss = F.cross_entropy(model(images), self.digits.train_y[chosen])
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                self.schedule.step()
            self.tick(name, epoch + 1, self.epochs)

    def full(self) -> tuple[nn.Module, float]:
        """Train as it is."""
        begin = time.perf_counter()
        model = self.start()
        self.train(model, "full", range(self.epochs))
        return model, time.perf_counter() - begin

    def with_tdfx(self, switch_epoch: int) -> tuple[nn.Module, nn.Module, Plan, float, float]:
        """Train, rewrite, train on with the same optimizer, merge."""
        begin = time.perf_counter()
        model = self.start()
        self.train(model, "tdfx", range(switch_epoch))
        before = time.perf_counter()
        made = plan(model, demo_policy(), example_inputs=(self.digits.train_x[:BATCH],))
        model = rewrite(model, made, optimizer=self.optimizer)
        switch = time.perf_counter() - before
        self.train(model, "tdfx", range(switch_epoch, self.epochs))
        merged = merge(model)
        return model, merged, made, switch, time.perf_counter() - begin


def demo_policy() -> Policy:
    """Return the default policy, but for more speed."""
    return Policy(rank=replace(DEFAULT_RULE, speedup=SPEEDUP))


def _warm_up(digits: Digits) -> None:
    """Let the first run not pay for what torch sets up once in a process."""
    warm = _Trainer(
        Digits(digits.train_x[: 2 * BATCH], digits.train_y[: 2 * BATCH], digits.test_x, digits.test_y),
        seed=0,
        epochs=1,
        tick=lambda name, done, total: None,
    )
    warm.full()


@torch.no_grad()
def _difference(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    expected = cast("Tensor", other.eval()(images))
    return float((one.eval()(images) - expected).abs().max() / expected.abs().max())
