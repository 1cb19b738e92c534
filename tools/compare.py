"""Compare tdfx with other packages: the same training, and the same benchmark of the training step.

A network trains densely for a fifth of the run. From that moment the same run continues on the same batches, dense and with
each method, at the same share of the ranks. Steps are timed in turns with the dense step. A method whose package is not
installed here runs in an environment of its own under --environments, which is created if it is missing, together with a
dense step again. The paper's own code comes from a checkout of github.com/mostafaelhoushi/tensor-decompositions.

Tasks: a VGG and a ResNet-14 on scikit-learn's digits, and a small transformer on Python's sources. tdfx and TensorLy alone
take about ten minutes on two cores, and one with --quick; installing the other packages takes longer. With --table FILE
nothing runs: the table of the file's results is printed.
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
import options
import torch
import torchvision
from bench_common import clock_name, make_table, set_clock, write_results
from compare_methods import Method, all_methods
from compare_runs import MethodResult, MethodStudy
from rich.console import Console
from study_runs import FULL
from study_tasks import TASKS, StudyTask, tasks_named

from tdfx.cost.rates import stream_rate

_WIDTH = 124
_MINUTES = 15
"""Most minutes that pip may take to install a package."""


@options.command(__doc__)
@options.seeds()
@options.share(0.25)
@click.option("--method", "parts", multiple=True, metavar="TEXT", help="Only methods whose name contains this.")
@options.tasks
@click.option("--paper-code", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout of it.")
@click.option("--environments", type=click.Path(path_type=Path), help="Folder for the environments of packages.")
@click.option("--here", is_flag=True, help="Only methods, no dense run and no table: used inside an environment.")
@options.quick
@options.cpu_time
@options.threads(2)
@options.json_file("Write every result to a file as it comes; results in the file are kept.")
@click.option(
    "--table", "table_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Print its table."
)
def main(
    seeds: int,
    share: float,
    parts: tuple[str, ...],
    task_parts: tuple[str, ...],
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
    methods = [method for method in all_methods(paper_code) if options.is_chosen(method.name, parts)]
    tasks = tasks_named(TASKS, task_parts)
    installed = [method for method in methods if method.is_installed()]
    stream_rate(cache=False)  # measured once for the machine, whatever is trained on it
    results = read(json_file) if json_file is not None and json_file.exists() else []
    done = {(result.task, result.method, result.seed) for result in results}

    def add(new: Iterable[MethodResult]) -> None:
        for result in new:
            results.append(result)
            write_results(json_file, [asdict(each) for each in results], share=share, clock=clock_name(cpu_time))

    scale, seeds = (0.1, 1) if quick else (1.0, seeds)
    for seed, task in product(range(seeds), tasks):
        missing = [method for method in installed if (task.name, method.name, seed) not in done]
        dense = not here and (task.name, FULL, seed) not in done
        if missing or dense:
            study = MethodStudy(task, seed, max(5, round(scale * task.steps)), clock)
            add(study.results(missing, share, dense=dense))
            click.echo(f"seed {seed}, {task.name}: done", err=True)
    for method in methods:
        earlier = [result for result in results if result.method == method.name]
        runs = {(result.task, result.seed) for result in earlier}
        if method in installed or all(run in runs for run in product([task.name for task in tasks], range(seeds))):
            continue
        results = [result for result in results if result.method != method.name]
        if environments is not None:
            add(run_in_environment(method, environments, tasks, earlier))
        else:
            add(earlier or [_failure(task, method, f"{method.module} is not installed here") for task in tasks])
    if not here:
        click.echo(report(results))


def run_in_environment(
    method: Method, folder: Path, tasks: list[StudyTask], earlier: list[MethodResult]
) -> list[MethodResult]:
    """Run a method in an environment of its own, which is created if it is missing; failures are results too.

    Results that it had ``earlier`` are not run again.
    """
    environment = folder.resolve() / method.name.lower().replace(" ", "-").replace("'", "")
    error = "" if environment.exists() else install(method, environment)
    if error:
        return [_failure(task, method, f"cannot be installed: {error}") for task in tasks]
    file = environment / "outcomes.json"
    write_results(file, [asdict(result) for result in earlier])
    replaced = ("--json", "--method", "--environments")
    arguments = [word for word in sys.argv[1:] if not word.startswith(tuple(f"{name}=" for name in replaced))]
    for name in replaced:
        while name in arguments:
            del arguments[arguments.index(name) : arguments.index(name) + 2]
    command = [str(environment / "bin" / "python"), __file__, *arguments, "--here", "--method", method.name]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [*command, "--json", str(file)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        last = [line for line in process.stderr.splitlines() if line.strip()][-1:]
        return [_failure(task, method, "".join(last)) for task in tasks]
    return read(file)


def install(method: Method, environment: Path) -> str:
    """Create an environment on top of this one's packages and install a method there; return pip's error, or ""."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python3*/site-packages")
    (site / "base.pth").write_text(f"{Path(torchvision.__file__).parents[1]}\n", encoding="utf-8")
    for arguments in method.install:
        call = [str(python), "-m", "pip", "install", "--quiet", *arguments.split()]
        process = subprocess.run(call, stderr=subprocess.PIPE, text=True, check=False, timeout=60 * _MINUTES)
        if process.returncode != 0:
            errors = [line for line in process.stderr.splitlines() if line.lower().startswith("error")]
            return errors[0] if errors else f"pip ended with {process.returncode}"
    return ""


def _failure(task: StudyTask, method: Method, line: str) -> MethodResult:
    return MethodResult(task=task.name, method=method.name, seed=0, torch=torch.__version__, failed=line)


def read(file: Path) -> list[MethodResult]:
    """Return the results that a file contains."""
    names = {field.name for field in fields(MethodResult)}
    results: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["results"]
    return [MethodResult(**{name: value for name, value in result.items() if name in names}) for result in results]


def report(results: list[MethodResult]) -> str:
    """Return a table for each task, the fastest methods first, and the failures below it."""
    console = Console(width=_WIDTH, file=io.StringIO(), record=True, color_system=None)
    for task in dict.fromkeys(result.task for result in results):
        of_task = [result for result in results if result.task == task]
        done: dict[str, list[MethodResult]] = {result.method: [] for result in of_task}
        for result in of_task:
            if not result.failed:
                done[result.method].append(result)
        names = sorted(done, key=lambda name: _speed(name, done[name]), reverse=True)
        console.print(make_table(_cells(task, name, done[name], results[0].torch) for name in names if done[name]))
        for result in {result.method: result for result in of_task if result.failed}.values():
            line = f" {result.method} failed: {result.failed}"
            console.print(line[: _WIDTH - 1], markup=False, highlight=False)
        console.print()
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()).rstrip()


def _speed(name: str, done: list[MethodResult]) -> float:
    """Return the key of the order: the dense run first, then the fastest methods."""
    return float("inf") if name == FULL else median(1 / result.step for result in done) if done else 0.0


def _cells(task: str, name: str, done: list[MethodResult], home: str) -> dict[str, str]:
    """Return medians of times and errors, and means of accuracies and losses, over the seeds."""
    other = "" if done[0].torch == home else f" (torch {done[0].torch.split('+')[0]})"
    return {
        task: f"{name}{other}",
        "seeds": str(len(done)),
        "step faster": f"{median(1 / result.step for result in done):.2f}",
        "switch": f"{median(result.switch_steps for result in done):.1f}",
        "parameters": f"{median(result.parameters for result in done):.2f}",
        "error": f"{median(result.error for result in done):.2f}",
        "accuracy %": f"{mean(result.accuracy for result in done):.2f}",
        "loss": f"{mean(result.loss for result in done):.3f}",
        "optimizer": done[0].optimizer,
    }


if __name__ == "__main__":
    main()
