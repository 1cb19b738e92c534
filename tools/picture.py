"""Train the demo's network for three epochs and draw its plan then: the picture of tdfx/report/README.md."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch.nn.functional import cross_entropy

import tdfx
import tdfx.report
from tdfx.demo.run import BATCH, LEARNING_RATE, build_model, jitter, load_digits


@click.command(help=__doc__)
@click.argument("path", type=click.Path(path_type=Path), default="tools/results/spectra.png")
@click.option("--epochs", type=click.IntRange(min=0), default=3, show_default=True, help="Epochs before the plan.")
def main(path: Path, epochs: int) -> None:
    """Train, plan by VBMF with modelled times, draw."""
    torch.manual_seed(0)
    digits, generator = load_digits(), torch.Generator().manual_seed(0)
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(digits.train_x), generator=generator), BATCH):
            optimizer.zero_grad()
            cross_entropy(model(jitter(digits.train_x[batch], generator)), digits.train_y[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    inputs = (digits.train_x[:BATCH],)
    plan = tdfx.plan(model, tdfx.Policy(rank=tdfx.VBMF(), cost=tdfx.Modelled()), example_inputs=inputs)
    tdfx.report.plot(model, plan, path, example_inputs=inputs)
    click.echo(plan)


if __name__ == "__main__":
    main()
