"""The same training and the same step benchmark with tdfx and with what others offer.

A network trains densely for a fifth of the run. From that moment the same run goes on, on the same batches, dense and with
each method, at the same share of the ranks. Steps are timed in turns with the dense one. A method whose package is not
here runs in an environment of its own under --environments, which is made there if it is missing, beside a dense step again.
The paper's own code comes from a checkout of github.com/mostafaelhoushi/tensor-decompositions.

With --table FILE nothing runs: the table of what a file holds is printed.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterable
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import torch
import torchvision
from bench_common import keep, set_clock
from compare_methods import Method, methods
from compare_runs import Comparison, Outcome
from rich.console import Console
from rich.table import Column, Table
from study_runs import FULL
from study_tasks import TASKS, Task

from tdfx.cost.rates import stream_rate

_WIDTH = 124
_HEADS = ("seeds", "step faster", "switch", "parameters", "error", "accuracy %", "loss", "optimizer")
_MINUTES = 15
"""What pip may take to install one package."""


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="How many seeds, from 0.")
@click.option("--share", default=0.25, show_default=True, help="Ranks, as a share of the full ones.")
@click.option("--method", "only", multiple=True, metavar="TEXT", help="Only methods whose name holds this.")
@click.option("--task", "which", multiple=True, metavar="TEXT", help="Only tasks whose name holds this.")
@click.option("--paper-code", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout.")
@click.option("--environments", type=click.Path(path_type=Path), help="Folder of the environments of packages.")
@click.option("--here", is_flag=True, help="Only methods, without the dense run: what an environment is asked for.")
@click.option("--quick", is_flag=True, help="One seed, a tenth of the steps: to see that it runs, not what comes out.")
@click.option("--cpu-time", is_flag=True, help="Count the time of one thread's computation: for a loaded machine.")
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    help="Write every outcome, as they come; none that the file holds is made again.",
)
@click.option("--table", "table_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Print one.")
def main(
    seeds: int,
    share: float,
    only: tuple[str, ...],
    which: tuple[str, ...],
    paper_code: Path | None,
    environments: Path | None,
    here: bool,
    quick: bool,
    cpu_time: bool,
    threads: int,
    json_file: Path | None,
    table_file: Path | None,
) -> None:
    """Run everything and print the table."""
    if table_file is not None:
        click.echo(report(read(table_file)))
        return
    clock = set_clock(cpu_time, threads)
    wanted = [one for one in methods(paper_code) if not only or any(text in one.name for text in only)]
    tasks = [one() for one in TASKS if not which or any(text in one.name for text in which)]
    own = [one for one in wanted if one.is_here()]
    stream_rate(cache=False)  # once for a machine, whatever is trained on it
    seconds = "CPU time" if cpu_time else "wall clock"
    found = read(json_file) if json_file is not None and json_file.exists() else []
    before = {(one.task, one.method, one.seed) for one in found}

    def add(more: Iterable[Outcome]) -> None:
        for one in more:
            found.append(one)
            keep(json_file, [asdict(one) for one in found], share=share, clock=seconds)

    part, seeds = (0.1, 1) if quick else (1.0, seeds)
    for seed, task in product(range(seeds), tasks):
        missing = [one for one in own if (task.name, one.name, seed) not in before]
        dense = not here and (task.name, FULL, seed) not in before
        if missing or dense:
            add(Comparison(task, seed, max(5, round(part * task.steps)), clock).outcomes(missing, share, dense=dense))
            click.echo(f"seed {seed}, {task.name}: done", err=True)
    for method in wanted:
        mine = [one for one in found if one.method == method.name]
        done = {(one.task, one.seed) for one in mine}
        if method in own or all(one in done for one in product([task.name for task in tasks], range(seeds))):
            continue
        found = [one for one in found if one.method != method.name]
        if environments is not None:
            add(elsewhere(method, environments, tasks, mine))
        else:
            add(mine or [_failure(one, method, f"{method.module} is not installed here") for one in tasks])
    if not here:
        click.echo(report(found))


def elsewhere(method: Method, folder: Path, tasks: list[Task], before: list[Outcome]) -> list[Outcome]:
    """Run a method in an environment of its own, which is made if it is missing; what goes wrong is an outcome too.

    Args:
        method: What is not here.
        folder: Of the environments.
        tasks: What to run it on.
        before: What it came to before, none of which is made again.
    """
    environment = folder.resolve() / method.name.lower().replace(" ", "-").replace("'", "")
    error = "" if environment.exists() else install(method, environment)
    if error:
        return [_failure(one, method, f"cannot be installed: {error}") for one in tasks]
    file = environment / "outcomes.json"
    keep(file, [asdict(one) for one in before])
    options = [one for one in sys.argv[1:] if not one.startswith(("--json=", "--method=", "--environments="))]
    for name in ("--json", "--method", "--environments"):
        while name in options:
            del options[options.index(name) : options.index(name) + 2]
    command = [str(environment / "bin" / "python"), __file__, *options, "--here", "--method", method.name]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--json", str(file)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return [_failure(one, method, "".join(last)) for one in tasks]
    return read(file)


def install(method: Method, environment: Path) -> str:
    """Make an environment on top of this one's packages, and return what pip says if it cannot install a method there."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python3*/site-packages")
    (site / "base.pth").write_text(f"{Path(torchvision.__file__).parents[1]}\n", encoding="utf-8")
    for one in method.install:
        call = [str(python), "-m", "pip", "install", "--quiet", *one.split()]
        done = subprocess.run(call, stderr=subprocess.PIPE, text=True, check=False, timeout=60 * _MINUTES)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.lower().startswith("error")]
            return lines[0] if lines else f"pip ended with {done.returncode}"
    return ""


def _failure(task: Task, method: Method, line: str) -> Outcome:
    return Outcome(task=task.name, method=method.name, seed=0, torch=torch.__version__, failed=line)


def read(file: Path) -> list[Outcome]:
    """Return the outcomes that a file holds."""
    known = {one.name for one in fields(Outcome)}
    results: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["results"]
    return [Outcome(**{key: value for key, value in one.items() if key in known}) for one in results]


def report(found: list[Outcome]) -> str:
    """Return a table for each task, the fastest methods first, and under it what failed."""
    console = Console(width=_WIDTH, file=io.StringIO(), record=True, color_system=None)
    for task in dict.fromkeys(one.task for one in found):
        own = [one for one in found if one.task == task]
        names = sorted(dict.fromkeys(one.method for one in own), key=lambda name: _speed(own, name), reverse=True)
        table = Table(Column(task, no_wrap=True), *_HEADS, box=None)
        for name in names:
            _add_row(table, name, [one for one in own if one.method == name and not one.failed], found[0].torch)
        console.print(table)
        for one in {one.method: one for one in own if one.failed}.values():
            # As far as one line goes.
            console.print(f" {one.method} failed: {one.failed}"[: _WIDTH - 1], markup=False, highlight=False)
        console.print()
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()).rstrip()


def _speed(found: list[Outcome], name: str) -> float:
    """Return by what to order: the dense run first, then the fastest, then what failed."""
    done = [one for one in found if one.method == name and not one.failed]
    return float("inf") if name == FULL else median(1 / one.step for one in done) if done else 0.0


def _add_row(table: Table, name: str, done: list[Outcome], home: str) -> None:
    """Add medians of times and errors and means of accuracies over the seeds, if there is any."""
    if not done:
        return
    other = "" if done[0].torch == home else f" (torch {done[0].torch.split('+')[0]})"
    table.add_row(
        f"{name}{other}",
        str(len(done)),
        f"{median(1 / one.step for one in done):.2f}",
        f"{median(one.switch_steps for one in done):.1f}",
        f"{median(one.parameters for one in done):.2f}",
        f"{median(one.error for one in done):.2f}",
        f"{mean(one.accuracy for one in done):.2f}",
        f"{mean(one.loss for one in done):.3f}",
        done[0].optimizer,
    )


if __name__ == "__main__":
    main()
