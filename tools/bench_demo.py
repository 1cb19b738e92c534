"""Run ``tdfx demo`` with several seeds and print the medians.

The demo trains a VGG-like network on scikit-learn's digits, in full and with tdfx. Takes about a minute a seed on two cores.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import click
import options
from bench_common import make_table, write_json
from rich.console import Console

from tdfx.demo import DEFAULT_EPOCHS
from tdfx.demo.run import DemoResult, run_demo

COLUMNS = ("full s", "tdfx s", "times faster", "full %", "tdfx %", "merged %")


@options.command(__doc__)
@options.seeds()
@click.option("--epochs", type=click.IntRange(min=2), default=DEFAULT_EPOCHS, help="Epochs a run.")
@options.json_file("Write every run's figures to a file.")
def main(seeds: int, epochs: int, json_file: Path | None) -> None:
    """Train, collect, print."""
    results = []
    for seed in range(seeds):
        results.append(run_demo(seed=seed, epochs=epochs))
        click.echo(f"seed {seed}: {results[-1].speedup:.2f}x", err=True)
    figures = [_figures_of(result) for result in results]
    rows = [_row(str(result.seed), row, result.verified) for result, row in zip(results, figures, strict=True)]
    medians = [median(column) for column in zip(*figures, strict=True)]
    rows.append(_row("median", medians, all(result.verified for result in results)))
    Console(width=100).print(make_table(rows, justify="right"))
    write_json(json_file, [result.to_dict() for result in results])


def _figures_of(result: DemoResult) -> list[float]:
    full, ours = result.full, result.tdfx
    return [full.seconds, ours.seconds, result.speedup, full.accuracy, ours.accuracy, result.merged_accuracy]


def _row(name: str, figures: list[float], verified: bool) -> dict[str, str]:
    cells = (f"{figure:.2f}" for figure in figures)
    return {"seed": name, **dict(zip(COLUMNS, cells, strict=True)), "verified": str(verified)}


if __name__ == "__main__":
    main()
