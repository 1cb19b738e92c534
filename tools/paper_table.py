"""Repeat the paper's experiment as a table: networks and data sets, each in full, with tdfx, and dense in the same time.

Every row is a complete training by a config of tools/configs, with the recipe of tools/train.py. By default the rows are
the full training, the one with tdfx's default policy and moment of the switch, and the control: dense again, shortened with
its schedule to as many steps as fit into the time that tdfx took. --policy runs others. All policies of one seed run one
after the other, then those of the next seed, so that a machine that gets slower affects all of them. Rows that the folder
of --json contains are not run again, except refused ones and those of other settings. --readme writes the table of
tools/results/paper_table into tools/README.md, and runs nothing.

All of it takes about 80 minutes on two cores. Held-out data are scored every fifth epoch and at the end, which is not
counted; --set output.evaluate=1 scores every epoch, for --plot.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import options
import torch
from bench_common import clock_name, set_clock, write_results
from recipe.config import RunConfig, read_config
from recipe.errors import RecipeError
from recipe.plot import plot_runs
from recipe.record import RunRecord
from recipe.rows import POLICIES, USUAL, PaperRow, current_rows, rows
from recipe.table import tables, with_block
from rich.console import Console

from tdfx.checks import read_record

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "paper_table"
README = HERE / "README.md"
GROUPS = ("digits", "text", "glyphs", "cifar10")
"""Beginnings of the configs' names, in the order of the table."""
BY_DEFAULT = ("digits", "text", "glyphs-resnet18", "glyphs-vgg")
"""Beginnings of the names of the configs that are run without --run: every machine has their data, and they are short."""


@options.command(__doc__)
@click.option("--run", "names", multiple=True, metavar="TEXT", help="Only configs whose file name begins with this.")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(list(POLICIES)),
    help=f"Which rows; by default {', '.join(USUAL)}.",
)
@options.seeds()
@options.overrides
@options.cpu_time
@options.threads(2)
@click.option("--json", "folder", type=click.Path(path_type=Path), help="Folder for the rows, written as they end.")
@click.option("--plot", "plot_folder", type=click.Path(path_type=Path), help="Folder for accuracy against time.")
@click.option("--readme", is_flag=True, help="Write the table of tools/results/paper_table into tools/README.md.")
def main(
    names: tuple[str, ...],
    policies: tuple[str, ...],
    seeds: int,
    overrides: tuple[str, ...],
    cpu_time: bool,
    threads: int,
    folder: Path | None,
    plot_folder: Path | None,
    readme: bool,
) -> None:
    """Run what is missing, and print the table."""
    if readme:
        README.write_text(with_block(README.read_text("utf-8"), render(read_rows(RESULTS))), encoding="utf-8")
        return
    configs = configs_of(names, overrides)
    clock = set_clock(cpu_time, threads)
    finished = current_rows(read_rows(folder), configs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = policies or USUAL
    for row in rows(configs, chosen, range(seeds), clock=clock, device=device, echo=_echo, done=finished):
        finished[row.key] = row
        _echo(f"refused: {row.refused}" if row.record is None else f"{row.record.total:.1f} s")
        config_rows = [other for other in in_order(finished.values()) if other.run == row.run]
        write_rows(folder, config_rows, clock=clock_name(cpu_time), seeds=seeds)
    click.echo(render(in_order(finished.values())))
    if plot_folder is not None:
        plot_rows(in_order(finished.values()), plot_folder)


def _echo(line: str) -> None:
    click.echo(line, err=True)


def configs_of(names: Sequence[str], overrides: Sequence[str]) -> dict[str, RunConfig]:
    """Return the configs whose names begin with one of ``names``; without names, those of ``BY_DEFAULT``."""
    files = sorted((HERE / "configs").glob("*.toml"), key=lambda file: order(file.stem))
    chosen = [file for file in files if file.stem.startswith(tuple(names) or BY_DEFAULT)]
    if not chosen:
        raise RecipeError(
            f"--run {' '.join(names)} names no config. There are: {', '.join(file.stem for file in files)}."
        )
    return {file.stem: read_config(file, ("output.evaluate=5", *overrides)) for file in chosen}


def order(name: str) -> tuple[int, str]:
    """Return what configs are sorted by."""
    return next((index for index, start in enumerate(GROUPS) if name.startswith(start)), len(GROUPS)), name


def in_order(finished: Iterable[PaperRow]) -> list[PaperRow]:
    """Return rows in the order of the table: by config, policy and seed."""
    policies = {policy: index for index, policy in enumerate(POLICIES)}
    return sorted(finished, key=lambda row: (order(row.run), policies.get(row.policy, len(policies)), row.seed))


def read_rows(folder: Path | None) -> list[PaperRow]:
    """Return the rows in a folder, which has a file for each config."""
    if folder is None or not folder.is_dir():
        return []
    values = (
        values for file in folder.glob("*.json") for values in json.loads(file.read_text(encoding="utf-8"))["results"]
    )
    return in_order(read_record(PaperRow, row) for row in values)


def write_rows(folder: Path | None, config_rows: Sequence[PaperRow], **settings: Any) -> None:
    """Write all rows of a config, with the command and the versions."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder / f"{config_rows[0].run}.json", [asdict(row) for row in config_rows], **settings)


def render(finished: Sequence[PaperRow]) -> str:
    """Return all tables as plain text."""
    console = Console(file=io.StringIO(), record=True, width=160, color_system=None)
    for table in tables(finished):
        console.print(table, "")
    return "\n".join(line.rstrip() for line in console.export_text().strip("\n").splitlines())


def plot_rows(finished: Sequence[PaperRow], folder: Path) -> None:
    """Plot accuracy against time, in a file for each network and data set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(row.run for row in finished):
        records: dict[str, list[RunRecord]] = {}
        for row in finished:
            if row.run == name and row.record is not None:
                records.setdefault(row.policy, []).append(row.record)
        plot_runs(records, folder / f"{name}.png", name)


if __name__ == "__main__":
    main()
