"""Run ``tdfx demo`` for several seeds and print the medians; about a minute a seed on two cores."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tdfx.demo.run import DEFAULT_EPOCHS, DemoResult, run_demo


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="How many seeds, from 0.")
@click.option("--epochs", type=click.IntRange(min=2), default=DEFAULT_EPOCHS, show_default=True, help="Epochs a run.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every run's figures to a file.")
def main(seeds: int, epochs: int, json_file: Path | None) -> None:
    """Train, collect, print."""
    results = []
    for seed in range(seeds):
        results.append(run_demo(seed=seed, epochs=epochs))
        click.echo(f"seed {seed}: {results[-1].speedup:.2f}x", err=True)
    Console(width=100).print(_table(results))
    if json_file is not None:
        json_file.write_text(json.dumps([one.to_dict() for one in results], indent=2) + "\n", encoding="utf-8")


def _table(results: list[DemoResult]) -> Table:
    table = Table(box=None)
    for name in ("seed", "full s", "tdfx s", "times faster", "full %", "tdfx %", "merged %", "verified"):
        table.add_column(name, justify="right")
    rows = [
        (
            one.full.seconds,
            one.tdfx.seconds,
            one.speedup,
            one.full.accuracy,
            one.tdfx.accuracy,
            one.merged_accuracy,
        )
        for one in results
    ]
    for one, row in zip(results, rows, strict=True):
        table.add_row(str(one.seed), *(f"{value:.2f}" for value in row), str(one.verified))
    medians = (statistics.median(column) for column in zip(*rows, strict=True))
    table.add_row("median", *(f"{value:.2f}" for value in medians), str(all(one.verified for one in results)))
    return table


if __name__ == "__main__":
    main()
