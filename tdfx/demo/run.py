"""The whole method on real data: train, rewrite the model during training, train on, merge it back, verify it.

The data are the 1,797 handwritten digits that scikit-learn ships (Alpaydin and Kaynak, *Optical Recognition of Handwritten
Digits*, UCI 1998): scans of 8×8 pixels, of which a third is held out. The same network is trained twice with the same seed,
data order, augmentation, optimizer and schedule, once without and once with tdfx.
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

from tdfx.api import merge
from tdfx.demo import DEFAULT_EPOCHS
from tdfx.errors import PolicyError, TdfxError
from tdfx.onnx_proof.report import VerifyReport
from tdfx.onnx_proof.verify import verify
from tdfx.plans.plan import Plan
from tdfx.policies.policy import Policy
from tdfx.training.switch.state import SwitchEvent
from tdfx.training.switch.switch import Switch

BATCH = 64
WARM_UP = 0.1
"""Share of the training in which the learning rate rises."""
LEARNING_RATE = 0.05
TRAINING_SHARE = 2 / 3
"""Share of the images to train on; the others are held out."""
TURN, ZOOM, SHIFT = 0.25, 0.15, 0.2
"""Largest random rotation (radians), scaling (share of its size) and shift (share of half its size) of an image."""

EpochCallback = Callable[[str, int, int], None]
"""Called before the first epoch and after each, with the name of the run, the finished epochs and all epochs."""


@dataclass(frozen=True, slots=True)
class Digits:
    """The images (n, 1, 8, 8), in [0, 1], and their labels (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """The result of one training run."""

    seconds: float
    """Time of training, plan, rewrite and merge, without evaluation."""
    accuracy: float
    """Correct answers among the held-out images, in percent."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The content of the demo's table."""

    seed: int
    epochs: int
    switch_step: int
    """Training steps before the rewrite."""
    steps: int
    """Training steps in all."""
    full: Run
    tdfx: Run
    parameters_before: int
    """The number of parameters without tdfx."""
    merged_accuracy: float
    """Accuracy of the merged model, in percent."""
    switch_seconds: float
    """Time of plan and rewrite; included in ``tdfx.seconds``."""
    merge_error: float
    """Largest difference between merged and factorized outputs on the held-out images, relative to the largest output."""
    plan: Plan | None
    """The plan of what was factorized; None if the switch kept the network as it is, as where nothing pays."""
    kept: tuple[SwitchEvent, ...]
    """Why sites were kept by the switch."""
    report: VerifyReport
    """The merged model against a new instance of the original class with its weights."""
    numbers: VerifyReport
    """The merged model against the factorized one: the graphs differ, and the numbers must agree."""

    @property
    def verified(self) -> bool:
        """True if the merged model has the original's graph and the factorized model's numbers."""
        return self.report.ok and self.numbers.numbers_match

    @property
    def speedup(self) -> float:
        """How many times faster the whole run with tdfx was."""
        return self.full.seconds / self.tdfx.seconds

    @property
    def factorized(self) -> int:
        """The number of sites that were factorized."""
        return 0 if self.plan is None else len(self.plan.factorized)

    @property
    def sites(self) -> int:
        """The number of all sites."""
        return sum(len(event.sites) for event in self.kept) if self.plan is None else len(self.plan)

    @property
    def parameters_after(self) -> int:
        """The number of parameters with tdfx."""
        return self.parameters_before if self.plan is None else self.plan.parameters_after

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON; times are in seconds and accuracies in percent."""
        return {
            **{name: getattr(self, name) for name in ("seed", "epochs", "steps", "switch_step")},
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "full": asdict(self.full),
            "tdfx": {**asdict(self.tdfx), "switch_seconds": self.switch_seconds},
            "merged": {"accuracy": self.merged_accuracy, "error": self.merge_error},
            "speedup": self.speedup,
            "sites": {"factorized": self.factorized, "all": self.sites},
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "verified": self.verified,
            "onnx": {"original": self.report.to_dict(), "factorized": self.numbers.to_dict()},
        }


def load_digits() -> Digits:
    """Return the digits, shuffled with a fixed seed; raise TdfxError if scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise TdfxError(
            "The demo's images come with scikit-learn, which is not installed. Install it: pip install 'tdfx[demo]'"
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


def run_demo(*, seed: int = 0, epochs: int = DEFAULT_EPOCHS, on_epoch: EpochCallback | None = None) -> DemoResult:
    """Train the network twice and return the results of both runs, the plan and the proof.

    Args:
        seed: Seed of the weights and of the order of the images, for both runs.
        epochs: Passes over the training images, at least 2.
        on_epoch: Called after each epoch; see ``EpochCallback``.

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
    few = replace(digits, train_x=digits.train_x[: 2 * BATCH], train_y=digits.train_y[: 2 * BATCH])
    _Trainer(few, seed=0, epochs=1).full()  # so that neither run includes what torch sets up once
    trainer = _Trainer(digits, seed, epochs, on_epoch)
    full_model, full_seconds = trainer.full()
    factorized, merged, switch, tdfx_seconds = trainer.with_tdfx()
    reference = build_model()
    reference.load_state_dict(merged.state_dict(), strict=True)
    return DemoResult(
        seed=seed,
        epochs=epochs,
        switch_step=switch.events[0].step,
        kept=tuple(event for event in switch.events if event.what != "switched"),
        parameters_before=sum(parameter.numel() for parameter in reference.parameters()),
        steps=switch.steps,
        full=Run(full_seconds, accuracy(full_model, digits)),
        tdfx=Run(tdfx_seconds, accuracy(factorized, digits)),
        merged_accuracy=accuracy(merged, digits),
        switch_seconds=sum(switch.spent.values()),
        merge_error=_relative_difference(merged, factorized, digits.test_x),
        plan=switch.plan,
        report=verify(merged, reference, example_inputs=(digits.test_x[:BATCH],)),
        numbers=verify(merged, factorized, example_inputs=(digits.test_x[:BATCH],)),
    )


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale and shift each image (n, 1, h, w) by its own small random amounts."""

    def uniform(largest: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * largest

    angle, scale = uniform(TURN), 1 + uniform(ZOOM)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = (cosine, -sine, uniform(SHIFT)), (sine, cosine, uniform(SHIFT))
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of correct answers among the held-out images, in percent; the model is left in eval mode."""
    correct = model.eval()(digits.test_x).argmax(1) == digits.test_y
    return 100 * float(correct.float().mean())


class _Trainer:
    """The recipe of both runs: SGD with momentum and a one-cycle schedule, on images that are jittered anew each time."""

    def __init__(self, digits: Digits, seed: int, epochs: int, on_epoch: EpochCallback | None = None) -> None:
        self.digits, self.seed, self.epochs = digits, seed, epochs
        self.on_epoch = on_epoch or (lambda name, done, total: None)
        self.batches = len(digits.train_x) // BATCH

    def start(self) -> nn.Module:
        """Build a new model, its optimizer and the random order from the seed."""
        torch.manual_seed(self.seed)
        model = build_model()
        self.order = torch.Generator().manual_seed(self.seed)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
        steps = self.epochs * self.batches
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARM_UP
        )
        return model

    def train(self, model: nn.Module, name: str, switch: Switch | None = None) -> nn.Module:
        """Train for all epochs, with a switch if there is one, and return the model."""
        model.train()
        self.on_epoch(name, 0, self.epochs)
        for epoch in range(self.epochs):
            order = torch.randperm(len(self.digits.train_x), generator=self.order)
            for indices in torch.split(order, BATCH)[: self.batches]:
                images = jitter(self.digits.train_x[indices], self.order)
                loss = F.cross_entropy(model(images), self.digits.train_y[indices])
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                self.schedule.step()
                if switch is not None:
                    model = switch.step(model, optimizer=self.optimizer, example_inputs=(images,))
            self.on_epoch(name, epoch + 1, self.epochs)
        return model

    def full(self) -> tuple[nn.Module, float]:
        """Train without tdfx."""
        start = time.perf_counter()
        model = self.start()
        self.train(model, "full")
        return model, time.perf_counter() - start

    def with_tdfx(self) -> tuple[nn.Module, nn.Module, Switch, float]:
        """Train, rewrite at the moment that the switch chooses, train on with the same optimizer, merge."""
        start = time.perf_counter()
        switch = Switch(demo_policy(), total_steps=self.epochs * self.batches, weigh=False)
        model = self.train(self.start(), "tdfx", switch)
        merged = merge(model)
        return model, merged, switch, time.perf_counter() - start


def demo_policy() -> Policy:
    """Return the policy of the demo: the default."""
    return Policy()


@torch.no_grad()
def _relative_difference(model: nn.Module, reference: nn.Module, images: Tensor) -> float:
    """Return the largest difference between outputs relative to the reference's largest output."""
    expected = cast("Tensor", reference.eval()(images))
    return float((model.eval()(images) - expected).abs().max() / expected.abs().max())
