"""Show the loss after a switch with the optimizer's state carried and with a new optimizer; three minutes on one core.

A small VGG trains on scikit-learn's handwritten digits. At the switch the same run goes on in three ways, on the same
batches: dense as it was, factorized with the optimizer carried, and factorized with a new optimizer, as other tools do it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import tdfx
from tdfx.demo.run import Digits, build_model, jitter, load_digits

BATCH = 64
MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda parameters: AdamW(parameters, lr=1e-3, weight_decay=0.01),
}
WAYS = ("dense", "carried", "reset")


def batches(digits: Digits, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches for ever, in an order and with a jitter that the seed fixes."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.split(torch.randperm(len(digits.train_x), generator=generator), BATCH):
            yield jitter(digits.train_x[chosen], generator), digits.train_y[chosen]


def train(model: nn.Module, optimizer: Optimizer, data: Iterator[tuple[Tensor, Tensor]], steps: int) -> list[float]:
    """Return the loss of each step."""
    losses = []
    for _ in range(steps):
        x, y = next(data)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def run(
    digits: Digits, name: str, seed: int, before: int, after: int, share: float, width: int
) -> dict[str, list[float]]:
    """Return the losses after the switch, by the way in which the run goes on."""
    torch.manual_seed(seed)
    start = build_model(width).train()
    first = MAKERS[name](start.parameters())
    train(start, first, batches(digits, seed), before)
    policy = tdfx.Policy(rank=tdfx.Ratio(of=share), min_gain=0)
    losses = {}
    for way in WAYS:
        model, optimizer = copy.deepcopy((start, first))
        if way != "dense":
            model = tdfx.rewrite(model, policy, optimizer=optimizer)
        if way == "reset":
            optimizer = MAKERS[name](model.parameters())
        losses[way] = train(model, optimizer, batches(digits, 1000 + seed), after)
    return losses


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="How many seeds, from 0.")
@click.option("--before", type=click.IntRange(min=1), default=80, show_default=True, help="Steps before the switch.")
@click.option("--after", type=click.IntRange(min=21), default=120, show_default=True, help="Steps after it.")
@click.option("--share", default=0.5, show_default=True, help="Ranks, as a share of the full ones.")
@click.option("--width", default=32, show_default=True, help="Channels of the network's first layers.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every loss to a file.")
def main(seeds: int, before: int, after: int, share: float, width: int, json_file: Path | None) -> None:
    """Run every optimizer and seed, and print the mean losses, and how carried and reset differ."""
    digits = load_digits()
    windows = [(0, 5), (5, 20), (20, after)]
    table = Table("optimizer", "steps after", *WAYS, "reset - carried", box=None)
    kept: dict[str, list[dict[str, list[float]]]] = {}
    for name in MAKERS:
        runs = [run(digits, name, seed, before, after, share, width) for seed in range(seeds)]
        kept[name] = runs
        for begin, end in windows:
            means = {way: [mean(one[way][begin:end]) for one in runs] for way in WAYS}
            apart = [reset - carried for reset, carried in zip(means["reset"], means["carried"], strict=True)]
            spread = f" ± {stdev(apart):.3f}" if len(apart) > 1 else ""
            cells = (f"{mean(means[way]):.3f}" for way in WAYS)
            table.add_row(name, f"{begin + 1} to {end}", *cells, f"{mean(apart):+.3f}{spread}")
    Console(width=100).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
