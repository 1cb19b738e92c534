"""``tdfx demo``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from tdfx.cli.output import FAILED, check_writable, show, write
from tdfx.demo import DEFAULT_EPOCHS

_RUNS = {"full": "full training", "tdfx": "with tdfx    "}


@click.command(short_help="Train on real digits with and without tdfx, and verify the result.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights and data order, for both runs.")
@click.option("--epochs", type=int, default=DEFAULT_EPOCHS, show_default=True, help="Epochs of each run.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to a file."
)
def demo(seed: int, epochs: int, json_file: Path | None) -> None:
    """Train a network on handwritten digits without and with tdfx, merge it back, and verify it by ONNX."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from tdfx.demo.run import run_demo
    from tdfx.demo.table import demo_view
    from tdfx.progress import on_a_terminal

    check_writable(json_file)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("epoch {task.completed}/{task.total}")
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), disable=not on_a_terminal()) as bars:
        tasks = {name: bars.add_task(label, total=epochs, start=False) for name, label in _RUNS.items()}

        def on_epoch(name: str, done: int, total: int) -> None:
            if done == 0:
                bars.start_task(tasks[name])
            bars.update(tasks[name], completed=done, total=total)

        result = run_demo(seed=seed, epochs=epochs, on_epoch=on_epoch)
    show(lambda width: demo_view(result, width))
    write(json_file, json.dumps(result.to_dict(), indent=2))
    if not result.verified:
        sys.exit(FAILED)
