"""The paper's claim as a table: networks and data sets, each in full and under several policies, from several seeds.

Every row is a whole training by a config of tools/configs, by the recipe of tools/train.py; all policies of one seed run one
after the other, then those of the next, so that a machine that gets slower does so for all. What the folder of --json holds
is not run again. --readme puts the table of tools/results/paper_table into tools/README.md, and runs nothing.

All of it takes six hours on two cores, or eight of --cpu-time: --run digits and --run text about an hour each, --run glyphs
the rest.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from bench_common import keep, set_clock
from recipe.config import Config, read_config
from recipe.errors import RecipeError
from recipe.plot import plot_runs
from recipe.rows import POLICIES, Row, as_json, row_of, rows
from recipe.table import tables, with_block
from rich.console import Console

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "paper_table"
README = HERE / "README.md"
GROUPS = ("digits", "text", "glyphs", "cifar10")


@click.command(help=__doc__)
@click.option("--run", "names", multiple=True, metavar="TEXT", help="Only configs whose file's name begins so.")
@click.option("--policy", "only", multiple=True, type=click.Choice(list(POLICIES)), help="Only these rows.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="How many seeds, from 0.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a setting in all configs.")
@click.option("--cpu-time", is_flag=True, help="Count the time of one thread's computation: for a loaded machine.")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "folder", type=click.Path(path_type=Path), help="Folder to write rows to, as they come.")
@click.option("--plot", "plot_folder", type=click.Path(path_type=Path), help="Folder for accuracy against time.")
@click.option("--readme", is_flag=True, help="Put the table that was kept into tools/README.md.")
def main(
    names: tuple[str, ...],
    only: tuple[str, ...],
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
        text = with_block(README.read_text(encoding="utf-8"), rendered(read_rows(RESULTS)))
        README.write_text(text, encoding="utf-8")
        return
    configs = configs_of(names, overrides)
    clock = set_clock(cpu_time, threads)
    found = [one for one in read_rows(folder) if one.run in configs]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"clock": "CPU time" if cpu_time else "wall clock", "seeds": seeds}
    for row in rows(
        configs, only or list(POLICIES), range(seeds), clock=clock, device=device, say=_say, done=tuple(found)
    ):
        found.append(row)
        _say(f"refused: {row.refused}" if row.record is None else f"{row.record.total:.1f} s")
        write_rows(folder, [one for one in found if one.run == row.run], **settings)
    click.echo(rendered(found))
    if plot_folder is not None:
        draw(found, plot_folder)


def _say(line: str) -> None:
    click.echo(line, err=True)


def configs_of(names: Sequence[str], overrides: Sequence[str]) -> dict[str, Config]:
    """Return the configs whose names begin as asked, those that need data by hand only where they are named.

    Raises:
        RecipeError: There is none.
    """
    files = sorted((HERE / "configs").glob("*.toml"), key=lambda one: (_group(one), one.name))
    chosen = [one for one in files if one.stem.startswith(tuple(names) or GROUPS[:3])]
    if not chosen:
        raise RecipeError(
            f"--run {' '.join(names)} names no config. There are: {', '.join(one.stem for one in files)}."
        )
    return {one.stem: read_config(one, overrides) for one in chosen}


def _group(file: Path) -> int:
    return next((place for place, group in enumerate(GROUPS) if file.stem.startswith(group)), len(GROUPS))


def read_rows(folder: Path | None) -> list[Row]:
    """Return the rows that a folder holds, those of each config in a file of their own."""
    if folder is None or not folder.is_dir():
        return []
    files = sorted(folder.glob("*.json"), key=lambda one: (_group(one), one.name))
    return [row_of(one) for file in files for one in json.loads(file.read_text(encoding="utf-8"))["results"]]


def write_rows(folder: Path | None, own: Sequence[Row], **settings: Any) -> None:
    """Write all rows of a config, beside the command and the versions."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        keep(folder / f"{own[0].run}.json", as_json(own), **settings)


def rendered(found: Sequence[Row]) -> str:
    """Return all tables as plain text."""
    console = Console(file=io.StringIO(), width=160, color_system=None)
    for table in tables(found):
        console.print(table, "")
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").splitlines())


def draw(found: Sequence[Row], folder: Path) -> None:
    """Draw accuracy against time, a picture for each network and data set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(one.run for one in found):
        own = [one for one in found if one.run == name]
        policies = dict.fromkeys(one.policy for one in own)
        lines = {
            policy: [one.record for one in own if one.policy == policy and one.record is not None]
            for policy in policies
        }
        plot_runs({policy: records for policy, records in lines.items() if records}, folder / f"{name}.png", name)


if __name__ == "__main__":
    main()
