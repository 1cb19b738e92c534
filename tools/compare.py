"""The same training and the same step benchmark with tdfx and with what others offer.

A network trains densely for a fifth of the run. From that moment the same run goes on, on the same batches, dense and with
each method, at the same share of the ranks. Steps are timed in turns with the dense one. A method whose package is not
here runs in an environment of its own under --environments, which is made there if it is missing, beside a dense step again.
The paper's own code comes from a checkout of github.com/mostafaelhoushi/tensor-decompositions.

With --table FILE nothing runs: the table of what a file holds is printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import torch
import torchvision
from bench_common import Seconds, keep, set_clock
from compare_methods import Method, methods
from compare_runs import Comparison, Outcome
from rich.console import Console
from rich.table import Column, Table
from study_runs import FULL
from study_tasks import TASKS, Task

from tdfx.cost.machine import rates

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
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every outcome to a file.")
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
        Console(width=150).print(*tables(read(table_file)), sep="\n\n")
        return
    clock = set_clock(cpu_time, threads)
    wanted = [one for one in methods(paper_code) if not only or any(text in one.name for text in only)]
    tasks = [one() for one in TASKS if not which or any(text in one.name for text in which)]
    own = [one for one in wanted if one.is_here()]
    seconds = "CPU time" if cpu_time else "wall clock"
    found: list[Outcome] = []

    def add(more: Iterable[Outcome]) -> None:
        for one in more:
            found.append(one)
            keep(json_file, [asdict(one) for one in found], share=share, clock=seconds)

    add(outcomes(tasks, own, range(1 if quick else seeds), 0.1 if quick else 1.0, share, clock, dense=not here))
    for method in wanted:
        if method not in own and environments is not None:
            add(elsewhere(method, environments, tasks))
        elif method not in own:
            add(_failure(one, method, f"{method.module} is not installed here") for one in tasks)
    if not here:
        Console(width=150).print(*tables(found), sep="\n\n")


def outcomes(
    tasks: list[Task],
    own: list[Method],
    seeds: Iterable[int],
    part: float,
    share: float,
    clock: Seconds,
    *,
    dense: bool,
) -> Iterator[Outcome]:
    """Yield what the methods that are here came to."""
    if not own and not dense:
        return
    rates(cache=False)  # once for a machine, whatever is trained on it
    for seed in seeds:
        for task in tasks:
            study = Comparison(task, seed, max(5, round(part * task.steps)), clock)
            yield from study.outcomes(own, share, dense=dense)
            click.echo(f"seed {seed}, {task.name}: done", err=True)


def elsewhere(method: Method, folder: Path, tasks: list[Task]) -> list[Outcome]:
    """Run a method in an environment of its own, which is made if it is missing; what goes wrong is an outcome too."""
    environment = folder.resolve() / method.name.lower().replace(" ", "-").replace("'", "")
    error = "" if environment.exists() else install(method, environment)
    if error:
        return [_failure(one, method, f"cannot be installed: {error}") for one in tasks]
    file = environment / "outcomes.json"
    file.unlink(missing_ok=True)
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
    if not file.exists():
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


def tables(found: list[Outcome]) -> list[Table]:
    """Return a table for each task: medians of times and errors, means of accuracies, over the seeds."""
    made = []
    for task in dict.fromkeys(one.task for one in found):
        heads = ("step faster", "switch, steps", "parameters", "output error", "accuracy %", "loss", "optimizer")
        table = Table(Column(task, no_wrap=True), *heads, box=None)
        own = [one for one in found if one.task == task]
        names = list(dict.fromkeys(one.method for one in own))
        for name in sorted(names, key=lambda name: _speed(own, name), reverse=True):
            _add_row(table, name, [one for one in own if one.method == name])
        made.append(table)
    return made


def _speed(found: list[Outcome], name: str) -> float:
    """Return by what to order: the dense run first, then the fastest, then what failed."""
    done = [one for one in found if one.method == name and not one.failed]
    return float("inf") if name == FULL else median(1 / one.step for one in done) if done else 0.0


def _add_row(table: Table, name: str, runs: list[Outcome]) -> None:
    done = [one for one in runs if not one.failed]
    if not done:
        table.add_row(name, f"failed: {runs[0].failed}")
        return
    other = "" if done[0].torch == torch.__version__ else f" (torch {done[0].torch.split('+')[0]})"
    table.add_row(
        f"{name}{other}",
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
