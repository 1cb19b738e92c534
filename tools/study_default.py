"""Which policy to give to somebody who gives none: rules and budgets compared on several networks, data sets and seeds.

A network trains densely for a fifth of the run. From that moment the same run goes on, on the same batches, dense, and with
each policy: planned, rewritten, trained to the end, merged, and scored on what is held out. A policy's step is timed in
turns with the dense one. The time of a run is its steps times the time of each, with plan, rewrite and merge: "in all" with
the measuring on a machine that has never seen the network, "later" without, once the times are known.

Takes about 25 minutes on two cores, and one with --quick.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import geometric_mean, mean

import click
import torch
from bench_common import Seconds, keep, own_times, set_clock
from bench_freeze import rate, spread
from rich.console import Console
from rich.table import Table
from study_tasks import TASKS, Batch, Task, loss_of
from torch import nn
from torch.optim import Optimizer

import tdfx
from tdfx.cost.machine import rates
from tdfx.cost.timing import take_turns
from tdfx.demo import LEARNING_RATE

SWITCH_AT = 0.2
"""Part of the steps after which a run is rewritten."""
ROUNDS = 5
"""Steps of either model that are timed in turns."""
FULL = "dense"


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
        )
    ]
    budgets = [
        tdfx.Policy(speedup=speedup, error=error)
        for speedup in (1.5, 2.0, 2.5)
        for error in ("weights", "outputs", "curvature")
    ]
    return {_name(one): one for one in [*rules, *budgets]}


def _name(policy: tdfx.Policy) -> str:
    """Return a rule as short as it goes.

    >>> _name(tdfx.Policy(rank=tdfx.Energy(share=0.9))), _name(tdfx.Policy(speedup=2.0, error="outputs"))
    ('Energy(share=0.9)', "speedup=2.0, error='outputs'")
    """
    text = repr(policy.rank)
    return text.removeprefix("Budget(").removesuffix(")") if text.startswith("Budget(") else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one policy came to, from one seed."""

    task: str
    policy: str
    seed: int
    accuracy: float = 0.0
    """Right answers on what is held out, in percent."""
    loss: float = 0.0
    """Mean loss on it, in nats."""
    step: float = 1.0
    """Time of a step after the switch, in that of a dense one."""
    dense_seconds: float = 0.0
    """A dense run."""
    first_plan: float = 0.0
    """Planning with no times known yet, in seconds; 0 where some were."""
    plan: float = 0.0
    """Planning with times known, in seconds."""
    rewrite: float = 0.0
    merge: float = 0.0
    """What these take, in seconds."""
    factorized: int = 0
    """Sites that were rewritten."""
    error: float = 0.0
    """The plan's total error."""
    predicted: float | None = None
    """How many times faster the plan said that the step gets, where it says so."""
    refused: str = ""
    """Why the policy could not be followed."""

    def faster(self, *, measuring: bool) -> float:
        """Return how many times faster the whole run was than a dense one."""
        plan = (self.first_plan or self.plan) if measuring else self.plan
        part = SWITCH_AT + (1 - SWITCH_AT) * self.step
        return self.dense_seconds / (part * self.dense_seconds + plan + self.rewrite + self.merge)


class Study:
    """Runs of one task from one seed."""

    def __init__(self, task: Task, seed: int, steps: int, clock: Seconds, dense_seconds: float = 0.0) -> None:
        """Train up to the switch; a dense run's time may be known from before."""
        self.task, self.seed, self.steps, self.clock = task, seed, steps, clock
        self.switch = max(1, round(SWITCH_AT * steps))
        torch.manual_seed(seed)
        self.start = task.model().train()
        self.optimizer = task.optimizer(self.start.parameters())
        self.example = next(task.data(seed))
        self._train(self.start, self.optimizer, range(self.switch))
        self.dense_seconds = dense_seconds

    def dense(self) -> Run:
        """Go on as it is."""
        model, optimizer = copy.deepcopy((self.start, self.optimizer))
        (timing,) = take_turns([self._step(*copy.deepcopy((model, optimizer)))], rounds=ROUNDS)
        self.dense_seconds = self.steps * timing.seconds
        self._train(model, optimizer, range(self.switch, self.steps))
        return self._run(FULL, model)

    def with_policy(self, name: str, policy: tdfx.Policy, known: dict[str, float]) -> Run:
        """Go on with a policy; what is measured for it is added to what is known."""
        model, optimizer = copy.deepcopy((self.start, self.optimizer))
        cold = not known
        with own_times(known):
            try:
                first, _ = self._planned(model, policy, optimizer)
                again, plan = self._planned(model, policy, optimizer)
            except (tdfx.PolicyError, tdfx.InputError) as error:
                return Run(task=self.task.name, policy=name, seed=self.seed, refused=str(error))
        begin = self.clock()
        small = tdfx.rewrite(model, plan, optimizer=optimizer)
        rewrite = self.clock() - begin
        dense = self._step(*copy.deepcopy((self.start, self.optimizer)))
        before, after = take_turns([dense, self._step(*copy.deepcopy((small, optimizer)))], rounds=ROUNDS)
        self._train(small, optimizer, range(self.switch, self.steps))
        begin = self.clock()
        merged = tdfx.merge(small)
        return self._run(
            name,
            merged,
            merge=self.clock() - begin,
            step=after.seconds / before.seconds,
            first_plan=first if cold else 0.0,
            plan=again,
            rewrite=rewrite,
            factorized=len(plan.factorized),
            error=plan.total_error,
            predicted=self.dense_seconds / self.steps / plan.predicted_seconds(self.dense_seconds / self.steps),
        )

    def _planned(self, model: nn.Module, policy: tdfx.Policy, optimizer: Optimizer) -> tuple[float, tdfx.Plan]:
        begin = self.clock()
        plan = tdfx.plan(model, policy, example_inputs=(self.example[0],), optimizer=optimizer)
        return self.clock() - begin, plan

    def _run(self, name: str, model: nn.Module, **figures: float | None) -> Run:
        accuracy, loss = self.task.score(model)
        own = {"task": self.task.name, "policy": name, "seed": self.seed}
        return Run(**own, accuracy=accuracy, loss=loss, dense_seconds=self.dense_seconds, **figures)  # type: ignore[arg-type]

    def _step(self, model: nn.Module, optimizer: Optimizer) -> _Step:
        return _Step(model, optimizer, self.task.data(self.seed))

    def _train(self, model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        """Train from one step of the schedule to another, on the batches that belong there."""
        step = _Step(model, optimizer, self.task.data(self.seed if steps.start == 0 else 1000 + self.seed))
        for done in steps:
            for group in optimizer.param_groups:
                group["lr"] = self.task.peak * rate((done + 1) / self.steps) / LEARNING_RATE
            step()


@dataclass(frozen=True, slots=True)
class _Step:
    """A training step, with the making of its batch."""

    model: nn.Module
    optimizer: Optimizer
    data: Iterator[Batch]

    def __call__(self) -> None:
        x, y = next(self.data)
        loss = loss_of(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


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
    rates(cache=False)  # once for a machine, whatever is trained on it
    policies = {name: one for name, one in candidates().items() if not only or any(text in name for text in only)}
    tasks = [one() for one in TASKS if not which or any(text in one.name for text in which)]
    runs = _read(json_file)
    for run in runs_of(tasks, policies, 1 if quick else seeds, 0.1 if quick else 1.0, clock, tuple(runs)):
        runs.append(run)
        click.echo(f"seed {run.seed}, {run.task}, {run.policy}: {_in_short(run)}", err=True)
        keep(json_file, [asdict(one) for one in runs], clock="CPU time" if cpu_time else "wall clock")
    console = Console(width=150)
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
        "plan s",
        "sites",
        "error",
    )
    table = Table(task, *heads, box=None)
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
            f"{done[0].first_plan:.1f}, {mean(one.plan for one in done):.1f}",
            "/".join(str(one.factorized) for one in done),
            f"{mean(one.error for one in done):.2f}",
        )
    return table


def summary(runs: list[Run]) -> Table:
    """Return for each policy the worst of all tasks, and the geometric mean of the speed-ups."""
    heads = (
        "worst accuracy lost, points",
        "worst loss gained, %",
        "step faster",
        "run faster, in all",
        "later",
        "tasks",
    )
    table = Table("policy", *heads, box=None)
    dense = {(one.task, one.seed): one for one in runs if one.policy == FULL}
    for name, own in _by_policy([one for one in runs if one.policy != FULL and not one.refused]).items():
        tasks = {one.task: [other for other in own if other.task == one.task] for one in own}
        lost = [mean(dense[one.task, one.seed].accuracy - one.accuracy for one in of) for of in tasks.values()]
        gained = [mean(one.loss / dense[one.task, one.seed].loss - 1 for one in of) for of in tasks.values()]
        table.add_row(
            name,
            f"{max(lost):+.2f}",
            f"{100 * max(gained):+.1f}",
            f"{geometric_mean(1 / one.step for one in own):.2f}",
            f"{geometric_mean(of[0].faster(measuring=True) for of in tasks.values()):.2f}",
            f"{geometric_mean(one.faster(measuring=False) for one in own):.2f}",
            str(len(tasks)),
        )
    return table


def _by_policy(runs: list[Run]) -> dict[str, list[Run]]:
    return {name: [one for one in runs if one.policy == name] for name in dict.fromkeys(one.policy for one in runs)}


if __name__ == "__main__":
    main()
