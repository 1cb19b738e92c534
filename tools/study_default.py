"""Which policy to give to somebody who gives none: rules and budgets compared on several networks, data sets and seeds.

A network trains densely for a fifth of the run. From that moment the same run goes on, on the same batches, dense, and with
each policy: planned, rewritten, trained to the end, merged, and scored on what is held out. A policy's step is timed in
turns with the dense one. The time of a run is its steps times the time of each, with plan, rewrite and merge: "in all" with
the measuring on a machine that has never seen the network, "later" without, once the times are known. These runs take
seconds; "if long" is what a run would come to that is so long that only its steps count.

Takes about 25 minutes on two cores, and one with --quick.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import geometric_mean, mean

import click
from bench_common import Seconds, keep, set_clock
from bench_freeze import spread
from rich.console import Console
from rich.table import Column, Table
from study_runs import FULL, Run, Study
from study_tasks import TASKS, Task

import tdfx
from tdfx.cost.rates import stream_rate


def candidates() -> dict[str, tdfx.Policy]:
    """Return the policies that are compared, by name."""
    rules: list[tdfx.Policy] = [
        tdfx.Policy(rank=rule)
        for rule in (
            tdfx.VBMF(floor=0.5),
            tdfx.VBMF(floor=0.25),
            tdfx.VBMF(floor=0.125),
            tdfx.Energy(share=0.9),
            tdfx.Energy(share=0.8),
            tdfx.Energy(share=0.7),
            tdfx.StableRank(),
            tdfx.Ratio(of=0.25),
            tdfx.Ratio(of=0.5),
            tdfx.VBMF() | tdfx.Ratio(of=0.5),
        )
    ]
    budgets = [tdfx.Policy(speedup=speedup) for speedup in (1.5, 2.0, 2.5)]
    safe = [
        tdfx.Policy(rank=tdfx.Budget(speedup=2.0, strict=False, floor=floor, noise_floor=noise))
        for floor, noise in ((0.125, 0.25), (0.125, 0.5), (0.25, 0.25), (0.25, 1.0))
    ]
    return {_name(one): one for one in [*rules, *budgets, *safe]}


def _name(policy: tdfx.Policy) -> str:
    """Return a rule as short as it goes.

    >>> _name(tdfx.Policy(rank=tdfx.Energy(share=0.9))), _name(tdfx.Policy(speedup=2.0))
    ('Energy(share=0.9)', 'speedup=2.0')
    """
    text = repr(policy.rank)
    return text.removeprefix("Budget(").removesuffix(")") if text.startswith("Budget(") else text


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="How many seeds, from 0.")
@click.option("--policy", "only", multiple=True, metavar="TEXT", help="Only policies whose name holds this.")
@click.option("--task", "which", multiple=True, metavar="TEXT", help="Only tasks whose name holds this.")
@click.option("--quick", is_flag=True, help="One seed, a tenth of the steps: to see that it runs, not what comes out.")
@click.option("--cpu-time", is_flag=True, help="Count the time of one thread's computation: for a loaded machine.")
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    help="Write every run, as they come; none that it holds is made again.",
)
def main(
    seeds: int,
    only: tuple[str, ...],
    which: tuple[str, ...],
    quick: bool,
    cpu_time: bool,
    threads: int,
    json_file: Path | None,
) -> None:
    """Run all, and print a table for each task and one of them all."""
    clock = set_clock(cpu_time, threads)
    stream_rate(cache=False)  # once for a machine, whatever is trained on it
    policies = {name: one for name, one in candidates().items() if not only or any(text in name for text in only)}
    tasks = [one() for one in TASKS if not which or any(text in one.name for text in which)]
    runs = _read(json_file)
    for run in runs_of(tasks, policies, 1 if quick else seeds, 0.1 if quick else 1.0, clock, tuple(runs)):
        runs.append(run)
        click.echo(f"seed {run.seed}, {run.task}, {run.policy}: {_in_short(run)}", err=True)
        keep(json_file, [asdict(one) for one in runs], clock="CPU time" if cpu_time else "wall clock")
    console = Console(width=170)
    for task in tasks:
        console.print(table_of(task.name, [one for one in runs if one.task == task.name]), "")
    console.print(summary(runs))


def runs_of(
    tasks: list[Task],
    policies: Mapping[str, tdfx.Policy],
    seeds: int,
    share: float,
    clock: Seconds,
    before: tuple[Run, ...] = (),
) -> Iterator[Run]:
    """Yield every run that was not made before: all tasks and policies from the first seed, then from the next."""
    known: dict[tuple[str, str], dict[str, float]] = {}
    for seed, task in product(range(seeds), tasks):
        done = {one.policy: one for one in before if (one.task, one.seed) == (task.name, seed)}
        missing = [name for name in policies if name not in done]
        if not missing and FULL in done:
            continue
        steps = max(5, round(share * task.steps))
        study = Study(task, seed, steps, clock, done[FULL].dense_seconds if FULL in done else 0.0)
        if FULL not in done:
            yield study.dense()
        for name in missing:
            yield study.with_policy(name, policies[name], known.setdefault((task.name, name), {}))


def _read(file: Path | None) -> list[Run]:
    """Return the runs that a file holds, in the form that ``keep`` writes."""
    if file is None or not file.exists():
        return []
    return [Run(**one) for one in json.loads(file.read_text(encoding="utf-8"))["results"]]


def _in_short(run: Run) -> str:
    if run.refused:
        return f"refused: {run.refused[:100]}"
    return f"{run.accuracy:.2f} %, loss {run.loss:.4f}, step {run.step:.3f}, {run.factorized} sites"


def table_of(task: str, runs: list[Run]) -> Table:
    """Return what each policy came to on a task, over the seeds."""
    heads = (
        "accuracy %",
        "loss",
        "step faster",
        "predicted",
        "run faster, in all",
        "later",
        "if long",
        "plan s",
        "sites",
        "error",
    )
    table = Table(Column(task, no_wrap=True), *heads, box=None)
    for name, own in _by_policy(runs).items():
        done = [one for one in own if not one.refused]
        if not done:
            table.add_row(name, "refused")
            continue
        said = [one.predicted for one in done if one.predicted is not None]
        table.add_row(
            name,
            spread([one.accuracy for one in done], 2),
            spread([one.loss for one in done], 4),
            f"{geometric_mean(1 / one.step for one in done):.2f}",
            f"{geometric_mean(said):.2f}" if said else "",
            f"{done[0].faster(measuring=True):.2f}",
            f"{geometric_mean(one.faster(measuring=False) for one in done):.2f}",
            f"{geometric_mean(one.faster_if_long for one in done):.2f}",
            f"{done[0].first_plan:.1f}, {mean(one.plan for one in done):.1f}",
            "/".join(str(one.factorized) for one in done),
            f"{mean(one.error for one in done):.2f}",
        )
    return table


def summary(runs: list[Run]) -> Table:
    """Return for each policy the worst of all tasks, and the geometric mean of the speed-ups."""
    heads = (
        "worst accuracy lost, points",
        "worst loss gained, nats",
        "step faster",
        "run faster, in all",
        "later",
        "if long",
        "tasks",
    )
    table = Table(Column("policy", no_wrap=True), *heads, box=None)
    dense = {(one.task, one.seed): one for one in runs if one.policy == FULL}
    for name, own in _by_policy([one for one in runs if one.policy != FULL and not one.refused]).items():
        tasks = {one.task: [other for other in own if other.task == one.task] for one in own}
        lost = [mean(dense[one.task, one.seed].accuracy - one.accuracy for one in of) for of in tasks.values()]
        gained = [mean(one.loss - dense[one.task, one.seed].loss for one in of) for of in tasks.values()]
        table.add_row(
            name,
            f"{max(lost):+.2f}",
            f"{max(gained):+.3f}",
            f"{geometric_mean(1 / one.step for one in own):.2f}",
            f"{geometric_mean(of[0].faster(measuring=True) for of in tasks.values()):.2f}",
            f"{geometric_mean(one.faster(measuring=False) for one in own):.2f}",
            f"{geometric_mean(one.faster_if_long for one in own):.2f}",
            str(len(tasks)),
        )
    return table


def _by_policy(runs: list[Run]) -> dict[str, list[Run]]:
    return {name: [one for one in runs if one.policy == name] for name in dict.fromkeys(one.policy for one in runs)}


if __name__ == "__main__":
    main()
