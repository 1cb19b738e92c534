"""Run ``tdfx demo`` with several seeds and print the medians.

The demo trains a VGG-like network on scikit-learn's digits, in full and with tdfx. Takes about a minute a seed on two cores.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import click
import options
from bench_common import write_json
from rich.console import Console
from rich.table import Table

from tdfx.demo.run import DEFAULT_EPOCHS, DemoResult, run_demo


@click.command(help=__doc__)
@options.seeds()
@click.option("--epochs", type=click.IntRange(min=2), default=DEFAULT_EPOCHS, show_default=True, help="Epochs a run.")
@options.json_file("Write every run's figures to a file.")
def main(seeds: int, epochs: int, json_file: Path | None) -> None:
    """Train, collect, print."""
    results = []
    for seed in range(seeds):
        results.append(run_demo(seed=seed, epochs=epochs))
        click.echo(f"seed {seed}: {results[-1].speedup:.2f}x", err=True)
    Console(width=100).print(table_of(results))
    if json_file is not None:
        write_json(json_file, [result.to_dict() for result in results])


def table_of(results: list[DemoResult]) -> Table:
    """Return a row for each seed, and the medians."""
    table = Table(box=None)
    for head in ("seed", "full s", "tdfx s", "times faster", "full %", "tdfx %", "merged %", "verified"):
        table.add_column(head, justify="right")
    rows = [
        (
            result.full.seconds,
            result.tdfx.seconds,
            result.speedup,
            result.full.accuracy,
            result.tdfx.accuracy,
            result.merged_accuracy,
        )
        for result in results
    ]
    for result, row in zip(results, rows, strict=True):
        table.add_row(str(result.seed), *(f"{value:.2f}" for value in row), str(result.verified))
    medians = (statistics.median(column) for column in zip(*rows, strict=True))
    table.add_row("median", *(f"{value:.2f}" for value in medians), str(all(result.verified for result in results)))
    return table


if __name__ == "__main__":
    main()
