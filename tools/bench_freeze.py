"""Measure what freezing factors in turns saves and costs.

A small VGG trains on scikit-learn's handwritten digits, as in the demo. After the rewrite the same run continues in five
ways, on the same batches: all factors train; the kernels alone, or the others alone, until the end (regular freezing);
both in turns of an epoch, or each factor in turns of an epoch (sequential freezing). Steps of all ways are timed in
alternation. Takes about four minutes on one core.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple, cast, get_args

import click
import options
import torch
from bench_common import make_table, mean_and_deviation, write_json
from rich.console import Console
from study_data import Batch, batches, learning_rate, loss_of, train_step
from torch import nn
from torch.optim import SGD, Optimizer

import tdfx
from tdfx.demo.run import BATCH, LEARNING_RATE, Digits, accuracy, build_model, load_digits
from tdfx.training.methods.factor_groups import Train

WAYS = {
    "all": "all train",
    "kernel": "regular: kernels",
    "others": "regular: others",
    "alternate": "sequential: both by turns",
    "each": "sequential: each by turns",
}
"""Way -> its name in the table."""
BLOCK = 3
"""Steps that are timed together."""
ROUNDS = 36
"""Blocks of each way: a multiple of six, so that two and three turns come round equally often."""


class HeldOutFigures(NamedTuple):
    """The result of one run on the held-out images."""

    epochs: int
    accuracy: float
    loss: float


def train(model: nn.Module, optimizer: Optimizer, digits: Digits, seed: int, steps: range, total: int) -> None:
    """Train for some steps of a schedule of ``total`` steps."""
    model.train()
    data = batches(digits, seed)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((step + 1) / total)
        train_step(model, optimizer, *next(data))


def freeze(model: nn.Module, optimizer: Optimizer, way: str, every: int) -> None:
    """Freeze factors in one of the ways; ``every`` is the steps of a turn."""
    if way != "all":
        in_turns = way in ("alternate", "each")
        tdfx.Freeze(model, optimizer, train=cast("Train", way), every=every if in_turns else None)


def step_seconds(model: nn.Module, optimizer: Optimizer, digits: Digits) -> dict[str, float]:
    """Return the CPU seconds of a step for each way: the median over each turn, averaged over the turns."""
    copies = {way: copy.deepcopy((model, optimizer)) for way in WAYS}
    data = batches(digits, 0)
    for way, (model_copy, optimizer_copy) in copies.items():
        freeze(model_copy.train(), optimizer_copy, way, BLOCK)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    block: list[Batch] = [next(data) for _ in range(BLOCK)]
    for round_index in range(-1, ROUNDS):
        for way, (model_copy, optimizer_copy) in copies.items():
            begin = time.process_time()
            for x, y in block:
                train_step(model_copy, optimizer_copy, x, y)
            if round_index >= 0:  # the first round is a warm-up
                seconds[way].append((time.process_time() - begin) / BLOCK)
    return {way: mean(median(times[start::6]) for start in range(6)) for way, times in seconds.items()}


@torch.no_grad()
def held_out_loss(model: nn.Module, digits: Digits) -> float:
    """Return the mean loss on the held-out images."""
    return float(loss_of(model.eval()(digits.test_x), digits.test_y))


def train_and_rewrite(
    digits: Digits, seed: int, epochs: int, width: int, share: float
) -> tuple[nn.Module, Optimizer, range, int]:
    """Train up to the switch and rewrite; return model, optimizer, the remaining steps, and the steps of an epoch."""
    torch.manual_seed(seed)
    model = build_model(width)
    optimizer: Optimizer = SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    per_epoch = len(digits.train_x) // BATCH
    switch, total = max(1, epochs // 8) * per_epoch, epochs * per_epoch
    train(model, optimizer, digits, seed, range(switch), total)
    policy = tdfx.Policy(rank=tdfx.Ratio(of=share))
    model = tdfx.rewrite(model, policy, example_inputs=(digits.train_x[:BATCH],), optimizer=optimizer)
    return model, optimizer, range(switch, total), per_epoch


@options.command(__doc__)
@options.seeds()
@click.option("--epochs", type=click.IntRange(min=2), multiple=True, default=(5, 15), help="Epochs of a run.")
@options.share(0.5)
@click.option("--width", default=128, help="Channels of the network's first layers.")
@options.json_file("Write every figure to a file.")
def main(seeds: int, epochs: tuple[int, ...], share: float, width: int, json_file: Path | None) -> None:
    """Run every seed and way, and print times, accuracies and losses."""
    assert {"all", *get_args(Train)} == set(WAYS)
    torch.set_num_threads(1)
    digits = load_digits()
    runs: dict[str, list[HeldOutFigures]] = {way: [] for way in WAYS}
    seconds: dict[str, float] = {}
    for length, seed in product(epochs, range(seeds)):
        model, optimizer, remaining, per_epoch = train_and_rewrite(digits, seed, length, width, share)
        seconds = seconds or step_seconds(model, optimizer, digits)
        for way in WAYS:
            model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
            freeze(model_copy, optimizer_copy, way, per_epoch)
            train(model_copy, optimizer_copy, digits, 1000 + seed, remaining, remaining.stop)
            figures = HeldOutFigures(length, accuracy(model_copy, digits), held_out_loss(model_copy, digits))
            runs[way].append(figures)
    Console(width=125).print(make_table(rows_of(seconds, runs)))
    write_json(json_file, {"seconds": seconds, "runs": runs})


def rows_of(seconds: dict[str, float], runs: dict[str, list[HeldOutFigures]]) -> Iterator[dict[str, str]]:
    """Yield for each way the times, and for each length of the runs the means and deviations over the seeds."""
    for way, figures in runs.items():
        row = {"after the switch": WAYS[way], "step, ms": f"{1000 * seconds[way]:.1f}"}
        row["of all"] = f"{seconds[way] / seconds['all']:.2f}"
        for length in dict.fromkeys(run.epochs for run in figures):
            accuracies, losses = zip(
                *[(run.accuracy, run.loss) for run in figures if run.epochs == length], strict=True
            )
            row[f"{length} epochs: accuracy %"] = mean_and_deviation(accuracies, 2)
            row[f"{length} epochs: loss"] = mean_and_deviation(losses, 3)
        yield row


if __name__ == "__main__":
    main()
