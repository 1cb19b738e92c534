"""Compare rank rules and budgets on several networks, data sets and seeds, to choose the policy of those who give none.

A network trains densely for a fifth of the run. From that moment the same run continues on the same batches: dense, and
with each policy, which is planned, rewritten, trained to the end, merged, and scored on held-out data. A policy's step is
timed in turns with the dense step. The time of a run is the time of all its steps, plus plan, rewrite and merge: "in all"
with the measuring of layers on a machine that has never seen the network, "later" with times in the cache. These runs
take seconds; "if long" is what a run would gain that is so long that only its steps count.

Tasks: a VGG and a ResNet-14 on scikit-learn's digits, and a small transformer on Python's sources. Takes about 20 minutes on
two cores, and one with --quick.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import geometric_mean, mean

import click
import options
from bench_common import Clock, clock_name, make_table, mean_and_deviation, set_clock, write_results
from rich.console import Console
from rich.table import Table
from study_runs import FULL, Study, StudyRun
from study_tasks import TASKS, StudyTask, tasks_named

import tdfx
from tdfx.cost.rates import stream_rate


def candidates() -> dict[str, tdfx.Policy]:
    """Return the policies that are compared, by name."""
    rules = [
        *(tdfx.VBMF(floor=floor) for floor in (0.5, 0.25, 0.125)),
        *(tdfx.Energy(share=share) for share in (0.9, 0.8, 0.7)),
        tdfx.StableRank(),
        *(tdfx.Ratio(of=share) for share in (0.25, 0.5)),
        tdfx.VBMF() | tdfx.Ratio(of=0.5),
    ]
    budgets = [tdfx.Budget(speedup=speedup) for speedup in (1.5, 2.0, 2.5)]
    with_floors = [
        tdfx.Budget(speedup=2.0, strict=False, floor=floor, noise_floor=noise)
        for floor, noise in ((0.125, 0.25), (0.125, 0.5), (0.25, 0.25), (0.25, 1.0))
    ]
    policies = [tdfx.Policy(rank=rank) for rank in (*rules, *budgets, *with_floors)]
    return {_name(policy): policy for policy in policies}


def _name(policy: tdfx.Policy) -> str:
    """Return a short name of the policy's rank rule.

    >>> _name(tdfx.Policy(rank=tdfx.Energy(share=0.9))), _name(tdfx.Policy(speedup=2.0))
    ('Energy(share=0.9)', 'speedup=2.0')
    """
    text = repr(policy.rank)
    return text.removeprefix("Budget(").removesuffix(")") if text.startswith("Budget(") else text


@options.command(__doc__)
@options.seeds()
@click.option("--policy", "parts", multiple=True, metavar="TEXT", help="Only policies whose name contains this.")
@options.tasks
@options.quick
@options.cpu_time
@options.threads(2)
@options.json_file("Write every run to a file as it ends; runs in the file are not repeated.")
def main(
    seeds: int,
    parts: tuple[str, ...],
    task_parts: tuple[str, ...],
    quick: bool,
    cpu_time: bool,
    threads: int,
    json_file: Path | None,
) -> None:
    """Run all, and print a table for each task and a summary of all tasks."""
    clock = set_clock(cpu_time, threads)
    stream_rate(cache=False)  # measured once for the machine, whatever is trained on it
    policies = {name: policy for name, policy in candidates().items() if options.is_chosen(name, parts)}
    tasks = tasks_named(TASKS, task_parts)
    runs = read_runs(json_file)
    for run in runs_of(tasks, policies, 1 if quick else seeds, 0.1 if quick else 1.0, clock, tuple(runs)):
        runs.append(run)
        click.echo(f"seed {run.seed}, {run.task}, {run.policy}: {_in_short(run)}", err=True)
        write_results(json_file, [asdict(run) for run in runs], clock=clock_name(cpu_time))
    console = Console(width=170)
    for task in tasks:
        console.print(table_of(task.name, [run for run in runs if run.task == task.name]), "")
    console.print(summary(runs))


def runs_of(
    tasks: list[StudyTask],
    policies: Mapping[str, tdfx.Policy],
    seeds: int,
    scale: float,
    clock: Clock,
    done: tuple[StudyRun, ...] = (),
) -> Iterator[StudyRun]:
    """Yield every run that is not done yet: all tasks and policies with the first seed, then with the next.

    Runs take a share ``scale`` of their task's steps.
    """
    times: dict[tuple[str, str], dict[str, float]] = {}
    for seed, task in product(range(seeds), tasks):
        done_here = {run.policy: run for run in done if (run.task, run.seed) == (task.name, seed)}
        missing = [name for name in policies if name not in done_here]
        if not missing and FULL in done_here:
            continue
        steps = max(5, round(scale * task.steps))
        study = Study(task, seed, steps, clock, done_here[FULL].dense_seconds if FULL in done_here else 0.0)
        if FULL not in done_here:
            yield study.dense()
        for name in missing:
            yield study.with_policy(name, policies[name], times.setdefault((task.name, name), {}))


def read_runs(file: Path | None) -> list[StudyRun]:
    """Return the runs that a result file contains; none without a file."""
    if file is None or not file.exists():
        return []
    return [StudyRun(**run) for run in json.loads(file.read_text(encoding="utf-8"))["results"]]


def _in_short(run: StudyRun) -> str:
    if run.refused:
        return f"refused: {run.refused[:100]}"
    return f"{run.accuracy:.2f} %, loss {run.loss:.4f}, step {run.step:.3f}, {run.factorized} sites"


def table_of(task: str, runs: list[StudyRun]) -> Table:
    """Return the results of each policy on a task, over the seeds."""
    rows = []
    for name, policy_runs in _by_policy(runs).items():
        done = [run for run in policy_runs if not run.refused]
        row = {task: name, "accuracy %": "refused"}
        if done:
            predicted = [run.predicted for run in done if run.predicted is not None]
            row |= {
                "accuracy %": mean_and_deviation([run.accuracy for run in done], 2),
                "loss": mean_and_deviation([run.loss for run in done], 4),
                "step faster": f"{geometric_mean(1 / run.step for run in done):.2f}",
                "predicted": f"{geometric_mean(predicted):.2f}" if predicted else "",
                **_run_faster(done, done[:1]),
                "plan s": f"{done[0].first_plan:.1f}, {mean(run.plan for run in done):.1f}",
                "sites": "/".join(str(run.factorized) for run in done),
                "error": f"{mean(run.error for run in done):.2f}",
            }
        rows.append(row)
    return make_table(rows)


def _run_faster(runs: list[StudyRun], first_runs: list[StudyRun]) -> dict[str, str]:
    """Return the cells of how many times faster whole runs were; the first ones with the measuring of layers."""
    speeds = {
        "run faster, in all": [run.faster(measuring=True) for run in first_runs],
        "later": [run.faster(measuring=False) for run in runs],
        "if long": [run.faster_if_long for run in runs],
    }
    return {head: f"{geometric_mean(values):.2f}" for head, values in speeds.items()}


def summary(runs: list[StudyRun]) -> Table:
    """Return for each policy the results on its worst task, and the geometric means of the speed-ups."""
    rows = []
    dense = {(run.task, run.seed): run for run in runs if run.policy == FULL}
    for name, done in _by_policy([run for run in runs if run.policy != FULL and not run.refused]).items():
        tasks = {task: [run for run in done if run.task == task] for task in dict.fromkeys(run.task for run in done)}
        lost = [mean(dense[run.task, run.seed].accuracy - run.accuracy for run in group) for group in tasks.values()]
        gained = [mean(run.loss - dense[run.task, run.seed].loss for run in group) for group in tasks.values()]
        row = {
            "policy": name,
            "worst accuracy lost, points": f"{max(lost):+.2f}",
            "worst loss gained, nats": f"{max(gained):+.3f}",
            "step faster": f"{geometric_mean(1 / run.step for run in done):.2f}",
            **_run_faster(done, [group[0] for group in tasks.values()]),
        }
        rows.append({**row, "tasks": str(len(tasks))})
    return make_table(rows)


def _by_policy(runs: list[StudyRun]) -> dict[str, list[StudyRun]]:
    return {name: [run for run in runs if run.policy == name] for name in dict.fromkeys(run.policy for run in runs)}


if __name__ == "__main__":
    main()
