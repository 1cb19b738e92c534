"""Compare settings of the default policy and of its switch on several networks, data sets and seeds, to choose the default.

Every run is a whole training: dense, with a switch, and as the control dense in the time that the run with the switch took,
its schedule shortened with it (rounded up to the next twentieth of the dense run, so that several settings share a control).
The time of a run is that of all its steps, with planning, rewriting and merging: "the first time" with the measuring of
layers, "run faster" with known layer times, as from the second seed on.

Settings are named by what differs from the default, as in "speedup=3 moment=0.05"; StudySettings in tools/study_runs.py
lists all. Tasks: a VGG and a ResNet-14 on scikit-learn's digits, and a small transformer on Python's sources. Takes about an
hour on two cores, and a few minutes with --quick.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import geometric_mean, mean

import click
import options
from bench_common import Clock, clock_name, make_table, mean_and_deviation, set_clock, write_results
from rich.console import Console
from rich.table import Table
from study_runs import FULL, StudyRun, StudySettings, control_of, train, train_with
from study_tasks import TASKS, StudyTask, tasks_named

from tdfx.checks import FieldError, read_record
from tdfx.cost.rates import stream_rate

LENGTH = 1.5
"""How many times the steps of ``tools/compare.py`` a dense run takes."""
CANDIDATES = (
    "default",
    *(f"speedup={speedup}" for speedup in (2, 4)),
    *(f"metric={metric}" for metric in ("weights", "inputs")),
    *(f"floor={floor}" for floor in (0, 0.125, 0.4)),
    *(f"moment={moment}" for moment in (0.03, 0.2)),
    *(f"collect={steps}" for steps in (2, 16)),
    "damping=0.1",
    "tail=0.9",
    "carry_state=true",
)
"""The names of the settings that are compared."""


@options.command(__doc__)
@options.seeds()
@click.option(
    "--policy", "parts", multiple=True, metavar="TEXT", help="Only settings of this name, or else that contain this."
)
@click.option("--add", "added", multiple=True, metavar="SETTINGS", help="More settings, as 'speedup=3 moment=0.05'.")
@options.tasks
@options.quick
@options.cpu_time
@options.threads(2)
@options.json_file("Write every run to a file as it ends; runs in the file are not repeated.")
def main(
    seeds: int,
    parts: tuple[str, ...],
    added: tuple[str, ...],
    task_parts: tuple[str, ...],
    quick: bool,
    cpu_time: bool,
    threads: int,
    json_file: Path | None,
) -> None:
    """Run all, and print a table for each task and a summary of all tasks."""
    settings = settings_named(parts, added)
    clock = set_clock(cpu_time, threads)
    stream_rate(cache=False)  # measured once for the machine, whatever is trained on it
    tasks = tasks_named(TASKS, task_parts)
    runs = read_runs(json_file)
    for run in runs_of(tasks, settings, 1 if quick else seeds, 0.1 if quick else LENGTH, clock, runs):
        runs.append(run)
        click.echo(f"seed {run.seed}, {run.task}, {run.policy}: {_in_short(run)}", err=True)
        write_results(json_file, [asdict(run) for run in runs], clock=clock_name(cpu_time))
    console = Console(width=170)
    for task in tasks:
        console.print(table_of(task.name, [run for run in runs if run.task == task.name]), "")
    console.print(summary([run for run in runs if run.task in {task.name for task in tasks}]))


def settings_named(parts: Sequence[str], added: Sequence[str]) -> list[StudySettings]:
    """Return the candidates that are named or contain a part, then the added ones; all candidates for neither."""
    wanted = parts or (() if added else ("",))
    chosen = [
        name for name in CANDIDATES if any(name == part or (part not in CANDIDATES and part in name) for part in wanted)
    ]
    try:
        return list(dict.fromkeys(StudySettings.parse(name) for name in (*chosen, *added)))
    except (FieldError, json.JSONDecodeError) as error:
        raise click.BadParameter(f"{' '.join(added)!r} {error}. Write for example 'speedup=3 moment=0.05'.") from error


def runs_of(
    tasks: Sequence[StudyTask],
    settings: Sequence[StudySettings],
    seeds: int,
    scale: float,
    clock: Clock,
    done: Sequence[StudyRun] = (),
) -> Iterator[StudyRun]:
    """Yield every run that is not done yet: all tasks and settings with the first seed, then with the next.

    Dense runs take their task's steps times ``scale``.
    """
    times: dict[tuple[str, str], dict[str, float]] = {}
    known = {(run.task, run.policy, run.seed): run for run in done}
    for seed, task in product(range(seeds), tasks):
        steps = max(5, round(scale * task.steps))
        if (key := (task.name, FULL, seed)) not in known:
            known[key] = train(task, FULL, seed, steps, clock)
            yield known[key]
        full = known[key]
        for each in settings:
            if (key := (task.name, each.name, seed)) not in known:
                known[key] = train_with(each, task, seed, steps, clock, times.setdefault(key[:2], {}))
                yield known[key]
            if known[key].refused:
                continue
            name, control_steps = control_of(known[key], full)
            if (key := (task.name, name, seed)) not in known:
                known[key] = train(task, name, seed, control_steps, clock)
                yield known[key]


def read_runs(file: Path | None) -> list[StudyRun]:
    """Return the runs that a result file contains; none without a file."""
    if file is None or not file.exists():
        return []
    return [read_record(StudyRun, run) for run in json.loads(file.read_text(encoding="utf-8"))["results"]]


def _in_short(run: StudyRun) -> str:
    if run.refused:
        return f"refused: {run.refused[:100]}"
    return f"{run.accuracy:.2f} %, loss {run.loss:.4f}, {run.seconds:.1f} s, {run.factorized} sites"


def table_of(task: str, runs: Sequence[StudyRun]) -> Table:
    """Return the results of each policy on a task, over the seeds."""
    return make_table({task: name, **_cells(runs, name)} for name in dict.fromkeys(run.policy for run in runs))


def _cells(runs: Sequence[StudyRun], name: str) -> dict[str, str]:
    done = [run for run in runs if run.policy == name and not run.refused]
    if not done:
        return {"accuracy %": "refused"}
    cells = {
        "accuracy %": mean_and_deviation([run.accuracy for run in done], 2),
        "loss": mean_and_deviation([run.loss for run in done], 4),
        **_speed_cells(runs, name),
    }
    if _is_dense(name):
        return cells
    controls = [control.policy for _, control in _beside_control(runs, name)]
    return {
        **cells,
        **_difference_cells("control", _beside_control(runs, name)),
        "control": ", ".join(dict.fromkeys(control.removeprefix("dense, ") for control in controls)),
        "at step": "/".join(dict.fromkeys(str(run.at) for run in done)),
        "sites": "/".join(str(run.factorized) for run in done),
        "error": f"{mean(run.error for run in done):.2f}",
    }


def summary(runs: Sequence[StudyRun]) -> Table:
    """Return for each policy its differences to the full runs and to the controls over all tasks, and its speed."""
    rows = []
    for name in dict.fromkeys(run.policy for run in runs if not _is_dense(run.policy) and not run.refused):
        pairs = _beside_full(runs, name)
        by_task: dict[str, list[float]] = {}
        for run, full in pairs:
            by_task.setdefault(run.task, []).append(run.accuracy - full.accuracy)
        row = {
            "policy": name,
            **_speed_cells(runs, name),
            **_difference_cells("full", pairs),
            "worst task": f"{min(map(mean, by_task.values())):+.2f}",
            **_difference_cells("control", _beside_control(runs, name)),
        }
        rows.append({**row, "tasks": str(len(by_task))})
    return make_table(rows)


def _is_dense(name: str) -> bool:
    return name.startswith(FULL)


def _speed_cells(runs: Sequence[StudyRun], name: str) -> dict[str, str]:
    """Return the cells for runs with known layer times, and for those that had to measure them first."""
    later, first = (
        [full.seconds / run.seconds for run, full in _beside_full(runs, name) if run.cold == cold]
        for cold in (False, True)
    )
    cells = {"run faster": later, "the first time": first}
    return {head: f"{geometric_mean(speeds):.2f}" if speeds else "" for head, speeds in cells.items()}


def _difference_cells(other: str, pairs: Sequence[tuple[StudyRun, StudyRun]]) -> dict[str, str]:
    """Return the cells for the mean differences of accuracy and loss."""
    if not pairs:
        return {}
    return {
        f"to {other}: points": f"{mean(run.accuracy - beside.accuracy for run, beside in pairs):+.2f}",
        f"{other}: nats": f"{mean(run.loss - beside.loss for run, beside in pairs):+.4f}",
    }


def _beside_full(runs: Sequence[StudyRun], name: str) -> list[tuple[StudyRun, StudyRun]]:
    """Return the runs of a name that were not refused, each with the full run of its task and seed."""
    full = {(run.task, run.seed): run for run in runs if run.policy == FULL}
    chosen = (run for run in runs if run.policy == name and not run.refused)
    return [(run, full[run.task, run.seed]) for run in chosen if (run.task, run.seed) in full]


def _beside_control(runs: Sequence[StudyRun], name: str) -> list[tuple[StudyRun, StudyRun]]:
    """Return the runs of a name, each with the dense run of its time."""
    by_key = {(run.task, run.policy, run.seed): run for run in runs}
    keys = ((run, (run.task, control_of(run, full)[0], run.seed)) for run, full in _beside_full(runs, name))
    return [(run, by_key[key]) for run, key in keys if key in by_key]


if __name__ == "__main__":
    main()
