"""Section accuracy: the same training dense, with tdfx, and dense shortened to the time that tdfx took."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from recipe.glyphs import glyph_images
from torch import Tensor, nn

import tdfx
from gpu.rows import Bench, Cases, Outcome
from tdfx.demo.run import build_model, load_digits
from tdfx.devices import synchronize

_BATCH, _EPOCHS = 256, 30
Data = tuple[Tensor, Tensor]


def _data(task: str, bench: Bench) -> tuple[Data, Data]:
    if task == "digits":
        digits = load_digits()
        pairs = (digits.train_x, digits.train_y), (digits.test_x, digits.test_y)
    else:
        with tempfile.TemporaryDirectory() as cache:
            pairs = glyph_images([], Path(cache))
    return tuple((images.to(bench.device), labels.to(bench.device)) for images, labels in pairs)  # type: ignore[return-value]


def _train(data: Data, bench: Bench, steps: int, width: int, *, switch: tdfx.Switch | None) -> tuple[nn.Module, float]:
    """Train with SGD on a cosine over these steps, and return the model and the seconds, switching and merging included."""
    torch.manual_seed(0)
    images, labels = data
    model: nn.Module = (
        build_model(width, colors=images.shape[1], classes=int(labels.max()) + 1).to(bench.device).train()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draws = torch.Generator(bench.device).manual_seed(0)
    synchronize(bench.device)
    began = time.perf_counter()
    for _ in range(steps):
        chosen = torch.randint(len(images), (_BATCH,), generator=draws, device=bench.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bench.is_cuda):
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if switch is not None:
            model = switch.step(model, optimizer=optimizer, example_inputs=(images[:_BATCH],))
    model = tdfx.merge(model, optimizer=optimizer) if switch is not None else model
    synchronize(bench.device)
    return model, time.perf_counter() - began


@torch.no_grad()
def _accuracy(model: nn.Module, data: Data) -> float:
    images, labels = data
    outputs = torch.cat([model.eval()(x) for x in torch.split(images, 1024)])
    right = int((outputs.argmax(1) == labels).sum())
    return right / len(labels)


def _compare(task: str, bench: Bench) -> Outcome:
    train, test = _data(task, bench)
    width = 16 if bench.small else 128
    steps = 4 if bench.small else _EPOCHS * len(train[1]) // _BATCH
    _train(train, bench, 2, width, switch=None)  # libraries are loaded, kernels chosen
    dense, dense_seconds = _train(train, bench, steps, width, switch=None)
    switch = tdfx.Switch(total_steps=steps, when=tdfx.AtStep(2) if bench.small else None)
    small, seconds = _train(train, bench, steps, width, switch=switch)
    shortened, _ = _train(train, bench, max(1, round(steps * min(1.0, seconds / dense_seconds))), width, switch=None)
    values = {
        "dense": _accuracy(dense, test),
        "tdfx": _accuracy(small, test),
        "dense in the same time": _accuracy(shortened, test),
        "times faster": dense_seconds / seconds,
    }
    holds = bench.small or values["tdfx"] >= values["dense in the same time"]
    return Outcome(values, holds, "below the shortened dense run")


def glyphs(bench: Bench) -> Outcome:
    """Train on rendered letters."""
    return _compare("glyphs", bench)


def digits(bench: Bench) -> Outcome:
    """Train on handwritten digits."""
    return _compare("digits", bench)


CASES: Cases = {"glyphs": glyphs, "digits": digits}
SMALL: Cases = {"digits": digits}
