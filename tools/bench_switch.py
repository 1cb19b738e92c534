"""Measure the loss after a switch with the optimizer's state carried over, and with new state for the factors.

A small VGG trains on scikit-learn's handwritten digits. At the switch the same run continues in three ways, on the same
batches: dense, factorized with the state of the optimizer carried to the factors, and factorized with new state for them.
Takes about three minutes on one core.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from operator import sub
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import options
import torch
from bench_common import make_table, write_json
from rich.console import Console
from study_data import Batch, batches, train_step
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import tdfx
from tdfx.demo.run import Digits, build_model, load_digits

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda parameters: AdamW(parameters, lr=1e-3, weight_decay=0.01),
}
WAYS = ("dense", "carried", "reset")


def train(model: nn.Module, optimizer: Optimizer, data: Iterator[Batch], steps: int) -> list[float]:
    """Train, and return the loss of each step."""
    return [float(train_step(model, optimizer, *next(data))) for _ in range(steps)]


def run(
    digits: Digits, name: str, seed: int, before: int, after: int, share: float, width: int
) -> dict[str, list[float]]:
    """Return the losses after the switch for each way to continue the run."""
    torch.manual_seed(seed)
    dense = build_model(width).train()
    dense_optimizer = OPTIMIZERS[name](dense.parameters())
    train(dense, dense_optimizer, batches(digits, seed, drop_last=False), before)
    policy = tdfx.Policy(rank=tdfx.Ratio(of=share), min_gain=0)
    losses = {}
    for way in WAYS:
        model, optimizer = copy.deepcopy((dense, dense_optimizer))
        if way != "dense":
            model = tdfx.rewrite(model, policy, optimizer=optimizer, carry_state=way == "carried")
        losses[way] = train(model, optimizer, batches(digits, 1000 + seed, drop_last=False), after)
    return losses


@options.command(__doc__)
@options.seeds(5)
@click.option("--before", type=click.IntRange(min=1), default=80, help="Steps before the switch.")
@click.option("--after", type=click.IntRange(min=21), default=120, help="Steps after it.")
@options.share(0.5)
@click.option("--width", default=32, help="Channels of the network's first layers.")
@options.json_file("Write every loss to a file.")
def main(seeds: int, before: int, after: int, share: float, width: int, json_file: Path | None) -> None:
    """Run every optimizer and seed, and print the mean losses, and how carried and reset differ."""
    digits = load_digits()
    windows = [(0, 5), (5, 20), (20, after)]
    rows = []
    all_losses: dict[str, list[dict[str, list[float]]]] = {}
    for name in OPTIMIZERS:
        runs = [run(digits, name, seed, before, after, share, width) for seed in range(seeds)]
        all_losses[name] = runs
        for begin, end in windows:
            means = {way: [mean(losses[way][begin:end]) for losses in runs] for way in WAYS}
            differences = list(map(sub, means["reset"], means["carried"]))
            deviation = f" ± {stdev(differences):.3f}" if len(differences) > 1 else ""
            row = {"optimizer": name, "steps after": f"{begin + 1} to {end}"}
            row |= {way: f"{mean(means[way]):.3f}" for way in WAYS}
            rows.append({**row, "reset - carried": f"{mean(differences):+.3f}{deviation}"})
    Console(width=100).print(make_table(rows))
    write_json(json_file, all_losses)


if __name__ == "__main__":
    main()
