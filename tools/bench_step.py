"""How many times faster a training step gets, and whether a plan's prediction of it is right.

Forward, backward and the optimizer's step (SGD with momentum) of the dense and of the rewritten network, in turns on copies,
both in the memory layout in which the dense one is faster. A plan is made with nothing measured yet, so "plan s" is what a
new user waits. "off" is how much longer the step was predicted to take than it does.

With --speedup the ranks are those of Policy(speedup=...), and the next line has uniform shares of the full ranks that take
as long by the same times: the better choice has the lower total error.

With --never-slower the default Policy() is held to its promise on torchvision's classification models: a batch of 2, and
exit code 1 if any step is below 0.98 of the dense one's speed, seen twice.

Takes about 10 minutes on two quiet cores, 10 more with --speedup, and one to two hours with --never-slower.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from bench_common import Seconds, keep, own_times, set_clock
from bench_nets import BATCHES, Net, ready
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torchvision import models

import tdfx
from tdfx.cost.measured import Measured
from tdfx.cost.rates import stream_rate
from tdfx.ranks.registry import parse_rule
from tdfx.training.step_check import StepCheck

LEAST = 0.98
"""Part of the dense step's speed below which a rewrite counts as slower."""
_HALVINGS = 7
"""Shares that are tried for one that takes as long as a budget's plan."""
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One policy on one network."""

    net: str
    policy: str
    layout: str
    batch: int
    dense_ms: float
    tdfx_ms: float
    faster: float
    """How many times faster the step is."""
    predicted: float
    """How many times faster the plan said."""
    off: float
    """Part by which the step was predicted to take longer than it does."""
    plan_seconds: float
    factorized: int
    sites: int
    total_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """How things are timed."""

    rounds: int
    clock: Seconds
    cost: Measured

    def rows(self, net: Net, rules: Sequence[str], speedup: float | None, promise: bool) -> Iterator[Row]:
        """Yield what is asked for of one network."""
        if promise:
            yield self.default(net)
        elif speedup is not None:
            yield from self.with_speedup(net, speedup)
        else:
            yield from (self.with_rule(net, rule) for rule in rules)

    def row(self, net: Net, name: str, plan: tdfx.Plan, seconds: float) -> Row:
        """Rewrite by a plan that took so many seconds, and time the steps."""
        small = tdfx.rewrite(net.model, plan)
        return _row(net, name, plan, seconds, self.check(net, plan, small, self.rounds))

    def check(self, net: Net, plan: tdfx.Plan, small: torch.nn.Module, rounds: int) -> StepCheck:
        """Time the steps."""
        return tdfx.check_step(
            plan, small, example_inputs=(net.x,), dense=net.model, autocast=net.autocast, rounds=rounds
        )

    def plan(self, net: Net, **wish: Any) -> tuple[tdfx.Plan, float]:
        """Return a plan, and how long it took to make."""
        begin = self.clock()
        plan = tdfx.plan(net.model, tdfx.Policy(**wish, cost=self.cost), example_inputs=(net.x,))
        return plan, self.clock() - begin

    def default(self, net: Net) -> Row:
        """Return what the default policy comes to; a step that seems slower is timed again, and the second time counts."""
        with own_times():
            plan, seconds = self.plan(net)
        small = tdfx.rewrite(net.model, plan)
        check = self.check(net, plan, small, self.rounds)
        if check.speedup < LEAST:
            check = self.check(net, plan, small, 3 * self.rounds)
        return _row(net, "default", plan, seconds, check)

    def with_rule(self, net: Net, rule: str) -> Row:
        """Return what a rule comes to, with nothing measured before."""
        with own_times():
            plan, seconds = self.plan(net, rank=parse_rule(rule))
        return self.row(net, rule, plan, seconds)

    def with_speedup(self, net: Net, speedup: float) -> Iterator[Row]:
        """Yield what a budget comes to, and uniform shares that take as long."""
        with own_times():
            plan, seconds = self.plan(net, speedup=speedup)
            yield self.row(net, f"speedup={speedup:g}", plan, seconds)
            share, uniform, seconds = self._as_fast(net, plan)
        yield self.row(net, f"Ratio(of={share:.3f})", uniform, seconds)

    def _as_fast(self, net: Net, plan: tdfx.Plan) -> tuple[float, tdfx.Plan, float]:
        """Return the share of the full ranks at which a step is predicted to take nearest to as long as with a plan."""
        assert plan.step_seconds is not None
        step, wanted = plan.step_seconds, plan.predicted_seconds(plan.step_seconds)
        low, high = 0.0, 1.0
        tried: dict[float, tuple[float, tdfx.Plan, float]] = {}
        for _ in range(_HALVINGS):
            share = (low + high) / 2
            made, seconds = self.plan(net, rank=tdfx.Ratio(of=share))
            took = made.predicted_seconds(step)
            tried[abs(took - wanted)] = share, made, seconds
            low, high = (share, high) if took < wanted else (low, share)
        return tried[min(tried)]


def _row(net: Net, name: str, plan: tdfx.Plan, seconds: float, check: StepCheck) -> Row:
    return Row(
        net=net.name,
        policy=name,
        layout=net.layout,
        batch=len(net.x),
        dense_ms=1e3 * check.seconds_before,
        tdfx_ms=1e3 * check.seconds_after,
        faster=check.speedup,
        predicted=check.predicted_speedup,
        off=check.off,
        plan_seconds=seconds,
        factorized=len(plan.factorized),
        sites=len(plan),
        total_error=plan.total_error,
    )


def classifiers(most_parameters: float) -> tuple[list[str], list[str]]:
    """Return the names of torchvision's classification models, and of those that are left out for their size."""
    names = models.list_models(module=models)
    large = [name for name in names if _parameters(name) > most_parameters]
    return [name for name in names if name not in large], large


def _parameters(name: str) -> int:
    return int(models.get_model_weights(name).DEFAULT.meta["num_params"])


def table_of(rows: Sequence[Row]) -> Table:
    """Return the rows as a table."""
    heads = (
        "policy",
        "batch, layout",
        "dense ms",
        "tdfx ms",
        "times faster",
        "predicted",
        "off",
        "plan s",
        "sites",
        "error",
    )
    table = Table("network", *heads, box=None)
    for one in rows:
        table.add_row(
            one.net,
            one.policy,
            f"{one.batch}, {one.layout}",
            f"{one.dense_ms:.1f}",
            f"{one.tdfx_ms:.1f}",
            f"{one.faster:.2f}",
            f"{one.predicted:.2f}",
            f"{one.off:+.0%}",
            f"{one.plan_seconds:.1f}",
            f"{one.factorized}/{one.sites}",
            f"{one.total_error:.2f}",
        )
    return table


@click.command(help=__doc__)
@click.option("--nets", help=f"Names, of tools/nets.py or torchvision; {','.join(BATCHES)} if left out.")
@click.option("--policy", "rules", multiple=True, default=("ratio:0.25",), show_default=True, help="As tdfx inspect's.")
@click.option("--speedup", type=float, help="How many times faster, in place of --policy.")
@click.option(
    "--never-slower", "promise", is_flag=True, help="The default policy on torchvision's classification models."
)
@click.option("--most-parameters", default=1e8, show_default=True, help="With it: leave out models that have more.")
@click.option("--batch", type=click.IntRange(min=1), help="Images in a batch; else what suits each network.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--dtype", type=click.Choice(list(_AUTOCAST)), default="fp32", show_default=True, help="bf16 is by autocast."
)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=7, show_default=True, help="Undisturbed steps of each.")
@click.option("--measure-seconds", default=20.0, show_default=True, help="What measuring for a plan may take.")
@click.option("--cpu-time", is_flag=True, help="Count the time of one thread's computation: for a loaded machine.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures, as they come.")
def main(
    nets: str | None,
    rules: tuple[str, ...],
    speedup: float | None,
    promise: bool,
    most_parameters: float,
    batch: int | None,
    device: str,
    dtype: str,
    threads: int,
    rounds: int,
    measure_seconds: float,
    cpu_time: bool,
    json_file: Path | None,
) -> None:
    """Time, collect, print."""
    autocast = _AUTOCAST[dtype]
    clock = set_clock(cpu_time, threads)
    stream_rate(device, cache=False)  # once for a machine, whatever is trained on it
    bench = Bench(rounds=rounds, clock=clock, cost=Measured(budget=measure_seconds, autocast=autocast))
    names, large = (
        classifiers(most_parameters) if promise and nets is None else ((nets or ",".join(BATCHES)).split(","), [])
    )
    rows: list[Row] = []
    failed: dict[str, str] = {}
    with _progress(len(names)) as advance:
        for name in names:
            try:
                net = ready(name, batch=batch or (2 if promise else None), device=device, autocast=autocast)
                for row in bench.rows(net, rules, speedup, promise):
                    rows.append(row)
                    keep(json_file, [asdict(one) for one in rows], clock=clock.__name__, device=device, dtype=dtype)
            except (tdfx.TdfxError, RuntimeError) as error:
                failed[name] = f"{type(error).__name__}: {error}"
            advance(name)
    Console(width=150).print(table_of(rows))
    slow = [one.net for one in rows if promise and one.faster < LEAST]
    for what, which in (("left out for their size", large), ("slower", slow)):
        if which:
            click.echo(f"{what}: {', '.join(which)}")
    for name, why in failed.items():
        click.echo(f"failed: {name}: {why}")
    if slow or failed:
        sys.exit(1)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Give a function that says what was done last."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=total)
        yield lambda name: bars.update(task, advance=1, description=name)


if __name__ == "__main__":
    main()
