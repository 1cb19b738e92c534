"""Show what freezing factors by turns saves and costs; four minutes on one core.

A small VGG trains on scikit-learn's handwritten digits, as in the demo. After the rewrite the same run goes on in five ways,
on the same batches: all factors train; the kernels alone, or the others alone, for good (regular freezing); both by turns
of an epoch, or each factor by turns of an epoch (sequential freezing). Steps of all ways are timed in alternation.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple, cast, get_args

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import tdfx
from tdfx.demo.run import BATCH, LEARNING_RATE, SWITCH_AT, Digits, accuracy, build_model, jitter, load_digits
from tdfx.training.methods.factor_groups import Train

WAYS = ("all", "kernel", "others", "alternate", "each")
NAMES = {
    "all": "all train",
    "kernel": "regular: kernels",
    "others": "regular: others",
    "alternate": "sequential: both by turns",
    "each": "sequential: each by turns",
}
BLOCK = 3
"""Steps that are timed together."""
ROUNDS = 36
"""Blocks of each way: a multiple of what two and three turns take to come round."""


class Figures(NamedTuple):
    """What one run came to, on the images that are held out."""

    epochs: int
    accuracy: float
    loss: float


def batches(digits: Digits, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield whole batches for ever, in an order and with a jitter that the seed fixes."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(digits.train_x), generator=generator)
        for chosen in torch.split(order, BATCH)[: len(order) // BATCH]:
            yield jitter(digits.train_x[chosen], generator), digits.train_y[chosen]


def rate(done: float) -> float:
    """Return the learning rate after a part of the training, in [0, 1]: up for three tenths, then down to nothing."""
    turned = done / 0.3 if done < 0.3 else (1 - done) / 0.7
    return LEARNING_RATE * (1 - math.cos(math.pi * turned)) / 2


def take_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    """Take one training step."""
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def train(
    model: nn.Module, optimizer: Optimizer, data: Iterator[tuple[Tensor, Tensor]], steps: range, total: int
) -> None:
    """Train from one step of the schedule to another."""
    model.train()
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate((step + 1) / total)
        take_step(model, optimizer, *next(data))


def frozen(model: nn.Module, optimizer: Optimizer, way: str, every: int) -> None:
    """Let factors train in one of the ways."""
    if way != "all":
        turns = way in ("alternate", "each")
        tdfx.Freeze(model, optimizer, train=cast("Train", way), every=every if turns else None)


def times(model: nn.Module, optimizer: Optimizer, digits: Digits) -> dict[str, float]:
    """Return CPU seconds of a step for each way: the median of each turn's, averaged over turns."""
    copies = {way: copy.deepcopy((model, optimizer)) for way in WAYS}
    data = batches(digits, 0)
    for way, (net, its) in copies.items():
        frozen(net.train(), its, way, BLOCK)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    given = [next(data) for _ in range(BLOCK)]
    for turn in range(-1, ROUNDS):
        for way, (net, its) in copies.items():
            begin = time.process_time()
            for x, y in given:
                take_step(net, its, x, y)
            if turn >= 0:
                found[way].append((time.process_time() - begin) / BLOCK)
    # The first round was not counted, and two and three turns go on after it as they come.
    return {way: mean(median(all_of[start::6]) for start in range(6)) for way, all_of in found.items()}


@torch.no_grad()
def held_out_loss(model: nn.Module, digits: Digits) -> float:
    """Return the mean loss on the images that are held out."""
    return float(F.cross_entropy(model.eval()(digits.test_x), digits.test_y))


def start(digits: Digits, seed: int, epochs: int, width: int, share: float) -> tuple[nn.Module, Optimizer, range, int]:
    """Train up to the switch and rewrite; return what goes on, the steps that are left, and those of an epoch."""
    torch.manual_seed(seed)
    model = build_model(width)
    optimizer: Optimizer = SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    per_epoch = len(digits.train_x) // BATCH
    switch, total = max(1, round(SWITCH_AT * epochs)) * per_epoch, epochs * per_epoch
    train(model, optimizer, batches(digits, seed), range(switch), total)
    policy = tdfx.Policy(rank=tdfx.Ratio(of=share))
    model = tdfx.rewrite(model, policy, example_inputs=(digits.train_x[:BATCH],), optimizer=optimizer)
    return model, optimizer, range(switch, total), per_epoch


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="How many seeds, from 0.")
@click.option(
    "--epochs", type=click.IntRange(min=2), multiple=True, default=(5, 15), show_default=True, help="Epochs of a run."
)
@click.option("--share", default=0.5, show_default=True, help="Ranks, as a share of the full ones.")
@click.option("--width", default=128, show_default=True, help="Channels of the network's first layers.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every figure to a file.")
def main(seeds: int, epochs: tuple[int, ...], share: float, width: int, json_file: Path | None) -> None:
    """Run every seed and way, and print times, accuracies and losses."""
    assert {"all", *get_args(Train)} == set(WAYS)
    torch.set_num_threads(1)
    digits = load_digits()
    runs: dict[str, list[Figures]] = {way: [] for way in WAYS}
    seconds: dict[str, float] = {}
    for length, seed in product(epochs, range(seeds)):
        model, optimizer, left, per_epoch = start(digits, seed, length, width, share)
        seconds = seconds or times(model, optimizer, digits)
        for way in WAYS:
            net, its = copy.deepcopy((model, optimizer))
            frozen(net, its, way, per_epoch)
            train(net, its, batches(digits, 1000 + seed), left, left.stop)
            runs[way].append(Figures(length, accuracy(net, digits), held_out_loss(net, digits)))
    Console(width=125).print(table_of(seconds, runs))
    if json_file is not None:
        json_file.write_text(json.dumps({"seconds": seconds, "runs": runs}) + "\n", encoding="utf-8")


def table_of(seconds: dict[str, float], runs: dict[str, list[Figures]]) -> Table:
    """Return the times, and for each length of the runs the means over the seeds with their deviations."""
    lengths = list(dict.fromkeys(one.epochs for one in runs["all"]))
    heads = (f"{length} epochs: {what}" for length in lengths for what in ("accuracy %", "loss"))
    table = Table("after the switch", "step, ms", "of all", *heads, box=None)
    for way, of in runs.items():
        cells = [f"{1000 * seconds[way]:.1f}", f"{seconds[way] / seconds['all']:.2f}"]
        for length in lengths:
            cells.append(spread([one.accuracy for one in of if one.epochs == length], 2))
            cells.append(spread([one.loss for one in of if one.epochs == length], 3))
        table.add_row(NAMES[way], *cells)
    return table


def spread(values: list[float], digits: int) -> str:
    """Return the mean, and the standard deviation of more than one value."""
    apart = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{apart}"


if __name__ == "__main__":
    main()
