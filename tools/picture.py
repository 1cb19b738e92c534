"""Draw the picture of tdfx/report/README.md: the plan for the demo's network after three epochs on scikit-learn's digits.

Takes some ten seconds on one core.
"""

from __future__ import annotations

from pathlib import Path

import click
import options
import torch
from study_data import batches, train_step

import tdfx
import tdfx.report
from tdfx.demo.run import BATCH, LEARNING_RATE, build_model, load_digits


@options.command(__doc__)
@click.argument("path", type=click.Path(path_type=Path), default="tools/results/spectra.png")
@click.option("--epochs", type=click.IntRange(min=0), default=3, help="Epochs before the plan.")
def main(path: Path, epochs: int) -> None:
    """Train, plan by VBMF with modelled times, draw."""
    torch.manual_seed(0)
    digits = load_digits()
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    data = batches(digits, 0, drop_last=False)
    for _ in range(epochs * -(-len(digits.train_x) // BATCH)):
        train_step(model, optimizer, *next(data))
    inputs = (digits.train_x[:BATCH],)
    plan = tdfx.plan(model, tdfx.Policy(rank=tdfx.VBMF(), cost=tdfx.Modelled()), example_inputs=inputs)
    tdfx.report.plot(model, plan, path, example_inputs=inputs)
    click.echo(plan)


if __name__ == "__main__":
    main()
