"""Measure how many times faster a training step gets, and whether the plan predicted it.

A step is forward, backward and the optimizer's step (SGD with momentum). Steps of the dense and of the rewritten network
run in turns on copies, in the memory layout in which the dense one is faster. Plans are made with no layer times in the
cache, so "plan s" is what a new user waits. "off" is by how much the prediction of the step's time was too long.

With --speedup the ranks are those of Policy(speedup=...), and the next line has uniform shares of the full ranks that take
as long by the same times: the better choice has the lower total error. With --never-slower the default Policy() is tested
on torchvision's classification models, with a batch of 2. The exit code is 1 if any step is below 0.98 of the dense step's
speed in two measurements.

Takes about 10 minutes on two idle cores, 10 more with --speedup, and one to two hours with --never-slower.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import options
import torch
from bench_common import Clock, make_table, separate_times, set_clock, show_progress, write_results
from bench_nets import BATCHES, BenchmarkNet, prepare_net
from rich.console import Console
from torchvision import models

import tdfx
from tdfx.cost.measured import Measured
from tdfx.cost.rates import stream_rate
from tdfx.ranks.registry import parse_rule
from tdfx.training.step_check import StepCheck

LEAST_SPEED = 0.98
"""Share of the dense step's speed below which a rewrite counts as slower."""
_BISECTIONS = 7
"""Uniform shares that are tried to find one that takes as long as a budget's plan."""
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


StepRow = dict[str, Any]
"""The figures of one policy on one network, as in ``_row``."""
_COLUMNS = {
    "network": "{net}",
    "policy": "{policy}",
    "batch, layout": "{batch}, {layout}",
    "dense ms": "{dense_ms:.1f}",
    "tdfx ms": "{tdfx_ms:.1f}",
    "times faster": "{faster:.2f}",
    "predicted": "{predicted:.2f}",
    "off": "{off:+.0%}",
    "plan s": "{plan_seconds:.1f}",
    "sites": "{factorized}/{sites}",
    "error": "{total_error:.2f}",
}
"""Head of a column -> its cell, from the figures of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBenchmark:
    """Plans, rewrites and times."""

    rounds: int
    clock: Clock
    cost: Measured

    def rows(self, net: BenchmarkNet, rules: Sequence[str], speedup: float | None, default: bool) -> Iterator[StepRow]:
        """Yield the rows of one network: the default policy, a budget, or rank rules."""
        if default:
            with separate_times():
                plan, seconds = self.plan(net)
            yield self.row(net, "default", plan, seconds, LEAST_SPEED)
        elif speedup is not None:
            yield from self.with_speedup(net, speedup)
        else:
            for rule in rules:
                with separate_times():
                    plan, seconds = self.plan(net, rank=parse_rule(rule))
                yield self.row(net, rule, plan, seconds)

    def plan(self, net: BenchmarkNet, **policy: Any) -> tuple[tdfx.Plan, float]:
        """Return a plan, and the seconds that it took to make."""
        begin = self.clock()
        plan = tdfx.plan(net.model, tdfx.Policy(**policy, cost=self.cost), example_inputs=(net.x,))
        return plan, self.clock() - begin

    def check(self, net: BenchmarkNet, plan: tdfx.Plan, rewritten: torch.nn.Module, rounds: int) -> StepCheck:
        """Time the steps of the dense and of the rewritten network."""
        settings: dict[str, Any] = {"dense": net.model, "autocast": net.autocast, "rounds": rounds}
        return tdfx.check_step(plan, rewritten, example_inputs=(net.x,), **settings)

    def row(self, net: BenchmarkNet, name: str, plan: tdfx.Plan, plan_seconds: float, least: float = 0.0) -> StepRow:
        """Rewrite by a plan, and time the steps; times that show less than the least speed do not count: time them again."""
        rewritten = tdfx.rewrite(net.model, plan)
        check = self.check(net, plan, rewritten, self.rounds)
        if check.speedup < least:
            check = self.check(net, plan, rewritten, 3 * self.rounds)
        return _row(net, name, plan, plan_seconds, check)

    def with_speedup(self, net: BenchmarkNet, speedup: float) -> Iterator[StepRow]:
        """Yield the row of a budget, and that of uniform shares that take as long."""
        with separate_times():
            plan, seconds = self.plan(net, speedup=speedup)
            yield self.row(net, f"speedup={speedup:g}", plan, seconds)
            share, uniform, seconds = self._as_fast(net, plan)
        yield self.row(net, f"Ratio(of={share:.3f})", uniform, seconds)

    def _as_fast(self, net: BenchmarkNet, plan: tdfx.Plan) -> tuple[float, tdfx.Plan, float]:
        """Return the share of the full ranks whose predicted step time is closest to that of a plan."""
        assert plan.step_seconds is not None
        dense_seconds, target = plan.step_seconds, plan.predicted_seconds(plan.step_seconds)
        low, high = 0.0, 1.0
        tried: dict[float, tuple[float, tdfx.Plan, float]] = {}
        for _ in range(_BISECTIONS):
            share = (low + high) / 2
            uniform, seconds = self.plan(net, rank=tdfx.Ratio(of=share))
            predicted = uniform.predicted_seconds(dense_seconds)
            tried[abs(predicted - target)] = share, uniform, seconds
            low, high = (share, high) if predicted < target else (low, share)
        return tried[min(tried)]


def _row(net: BenchmarkNet, name: str, plan: tdfx.Plan, plan_seconds: float, check: StepCheck) -> StepRow:
    return {
        "net": net.name,
        "policy": name,
        "layout": net.layout,
        "batch": len(net.x),
        "dense_ms": 1e3 * check.seconds_before,
        "tdfx_ms": 1e3 * check.seconds_after,
        "faster": check.speedup,  # times
        "predicted": check.predicted_speedup,  # times, by the plan
        "off": check.off,  # share by which the predicted time of the step is too long
        "plan_seconds": plan_seconds,
        "factorized": len(plan.factorized),
        "sites": len(plan),
        "total_error": plan.total_error,
    }


def classifiers(most_parameters: float) -> tuple[list[str], list[str]]:
    """Return the names of torchvision's classification models, and of those left out because of their size."""
    names = models.list_models(module=models)
    counts = {name: models.get_model_weights(name).DEFAULT.meta["num_params"] for name in names}
    large = [name for name in names if counts[name] > most_parameters]
    return [name for name in names if name not in large], large


@options.command(__doc__)
@options.networks("--nets", None, note=f"; by default {','.join(BATCHES)}")
@click.option("--policy", "rules", multiple=True, default=("ratio:0.25",), help="As for tdfx inspect.")
@click.option("--speedup", type=float, help="How many times faster the step is to be, in place of --policy.")
@click.option("--never-slower", is_flag=True, help="The default policy on torchvision's classification models.")
@click.option("--most-parameters", default=1e8, help="With it: leave out models that have more.")
@options.batch
@options.device
@click.option("--dtype", type=click.Choice(list(_AUTOCAST)), default="fp32", help="bf16 is by autocast.")
@options.threads(2)
@options.rounds(7, "samples of each step")
@options.measure_seconds(20.0, "each plan")
@options.cpu_time
@options.json_file("Write all figures to a file, after each row.")
def main(
    nets: str | None,
    rules: tuple[str, ...],
    speedup: float | None,
    never_slower: bool,
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
    stream_rate(device, cache=False)  # measured once for the machine, whatever is trained on it
    benchmark = StepBenchmark(rounds=rounds, clock=clock, cost=Measured(budget=measure_seconds, autocast=autocast))
    names, large = (nets or ",".join(BATCHES)).split(","), list[str]()
    if never_slower and nets is None:
        names, large = classifiers(most_parameters)
    rows: list[StepRow] = []
    failures: dict[str, str] = {}
    for name in show_progress(names):
        try:
            net = prepare_net(name, batch=batch or (2 if never_slower else None), device=device, autocast=autocast)
            for row in benchmark.rows(net, rules, speedup, never_slower):
                rows.append(row)
                write_results(json_file, rows, clock=clock.__name__, device=device, dtype=dtype)
        except (tdfx.TdfxError, RuntimeError) as error:
            failures[name] = f"{type(error).__name__}: {error}"
    Console(width=150).print(make_table({head: text.format(**row) for head, text in _COLUMNS.items()} for row in rows))
    slow = [row["net"] for row in rows if never_slower and row["faster"] < LEAST_SPEED]
    for title, listed in (("left out for their size", large), ("slower", slow)):
        if listed:
            click.echo(f"{title}: {', '.join(listed)}")
    for name, reason in failures.items():
        click.echo(f"failed: {name}: {reason}")
    if slow or failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
