"""Budgets of time by estimates where nothing was measured, with a solver out of time, and on several processes."""

from __future__ import annotations

import copy
import json
import re
import time
from typing import Any

import highspy
import pytest
import torch
from budgeted import ByFlops, Scaled, X, net, plan_net, set_step_seconds
from torch import Tensor, nn

import tdfx
import tdfx.report
from tdfx import Budget, Plan, Policy, PolicyError
from tdfx.cost.count import Flow
from tdfx.distributed.processes import Processes, Solo
from tdfx.kinds.registry import operation_of
from tdfx.passes.pipeline import find_sites, make_plan
from tdfx.passes.planning import knapsack
from tdfx.text import milliseconds


class MeasuresOnce(ByFlops):
    """Measures what the first request asks for, and has no time for more."""

    def measure(self, groups: Any, *, spent: float = 0.0) -> dict[Any, float]:
        return {} if self.requests else super().measure(groups)


def test_a_plan_marks_the_times_that_are_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    set_step_seconds(monkeypatch)
    plan = plan_net(speedup=1.5, cost=MeasuresOnce())
    estimated = [site for site in plan if site.estimated]
    assert estimated
    assert all(site.factorized and site.seconds_after is not None for site in estimated)
    (note,) = (note for note in plan.notes if "for lack of time" in note)
    assert re.match(rf"{len(estimated)} sites? (was|were) not timed as planned, for lack of time", note)
    for site in estimated:
        assert site.seconds_before is not None
        assert site.seconds_after is not None
        times = milliseconds(site.seconds_before, site.seconds_after)
        (row,) = (line for line in str(plan).splitlines() if line.startswith(f"{site.name} "))
        assert f" ~{times}" in row
    assert f"measured, 4 sites, {len(estimated)} of them by estimate: " in str(plan)
    assert Plan.from_json(plan.to_json()) == plan
    older = json.loads(plan.to_json())
    for entry in older["sites"]:
        del entry["estimated"]
    assert not any(site.estimated for site in Plan.from_json(json.dumps(older)))


def test_a_plan_by_measured_times_marks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    set_step_seconds(monkeypatch)
    plan = plan_net(speedup=1.5, cost=ByFlops())
    assert not any("not timed" in note for note in plan.notes)
    assert not any(site.estimated for site in plan)
    assert "~" not in str(plan)
    assert "estimate" not in str(plan)


def test_sites_that_were_not_timed_at_all_count_as_the_solver_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    set_step_seconds(monkeypatch, step_of(Scaled(1e3)))
    plan = plan_net(speedup=1.5, cost=Scaled(1e3, slice(0, 1)))
    estimated = {site.name for site in plan.factorized if site.estimated}
    assert estimated & {"2", "6", "7"}
    assert plan.speedup is not None
    assert 1.5 <= plan.speedup < 1.6
    tags: list[str] = []

    class Writer:
        def add_scalar(self, tag: str, *_: Any) -> None:
            tags.append(tag)

    tdfx.report.log_plan(Writer(), plan, 1)
    logged = {tag.split("/")[1] for tag in tags if tag.startswith("tdfx_ms/")}
    assert logged == {site.name for site in plan if site.seconds_after is not None} - estimated


def test_a_check_says_how_much_of_the_prediction_was_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    set_step_seconds(monkeypatch)
    plan = plan_net(speedup=1.5, cost=MeasuresOnce())
    estimated = sum(site.estimated for site in plan)
    check = plan.check(tdfx.rewrite(net(), plan), example_inputs=(X,), rounds=1)
    assert check.estimated == estimated > 0
    assert f"in time, {estimated} sites by estimate)" in str(check)
    measured = plan_net(speedup=1.5, cost=ByFlops())
    check = measured.check(tdfx.rewrite(net(), measured), example_inputs=(X,), rounds=1)
    assert str(check).endswith(" in time)")


def test_a_solver_out_of_time_is_an_error_only_where_the_budget_is_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    best = plan_net(parameters=0.4, flops=0.4)
    silent_solver = knapsack._silent_solver

    def hasty_solver() -> highspy.Highs:
        highs = silent_solver()
        highs.setOptionValue("mip_max_improving_sols", 1)
        highs.setOptionValue("presolve", "off")
        return highs

    monkeypatch.setattr(knapsack, "_silent_solver", hasty_solver)
    for strict in (True, False):
        first = plan_net(rank=Budget(parameters=0.4, flops=0.4, strict=strict))
        assert first.parameters_after <= 0.4 * first.parameters_before
        assert first.total_error >= best.total_error > 0
        assert "the solver's 20 s ran out: the best choice that it had found by then was taken" in " ".join(first.notes)
    monkeypatch.setattr(knapsack, "TIME_LIMIT", 0.0)
    with pytest.raises(PolicyError, match=r"No choice for the 4 sites was found in 20 s that keeps Budget\(flops=0\.4"):
        plan_net(parameters=0.4, flops=0.4)
    kept = plan_net(rank=Budget(parameters=0.4, flops=0.4, strict=False))
    assert not kept.factorized
    assert "no choice for the 4 sites was found in 20 s that comes near Budget" in " ".join(kept.notes)


def test_one_process_chooses_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between several solves, all processes measure together; only the first solves, and broadcasts the result."""
    messages: list[Any] = []

    class First(Solo):
        def broadcast_object(self, value: Any) -> Any:
            messages.append(copy.deepcopy(value))
            return value

    class Other(Solo):
        is_first = False

        def broadcast_object(self, value: Any) -> Any:
            return next(received)

    def plan_as(processes: Processes) -> Plan:
        policy = Policy(rank=Budget(speedup=1.5, strict=False), min_gain=0, round_to=1, cost=ByFlops())
        return make_plan(find_sites(net(), processes=processes), policy, (X,)).plan

    plan = plan_as(First())
    received = iter(messages)

    def refuse(*_: Any) -> Any:
        raise AssertionError("only the first process solves the knapsack")

    monkeypatch.setattr("tdfx.passes.planning.budget.solve_knapsack", refuse)
    assert plan_as(Other()) == plan
    assert list(received) == []
    assert len(messages) > 2


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("measured", [slice(0, 2), slice(1, 3), slice(3, 4)], ids=str)
def test_estimates_are_scaled_to_the_measured_times(
    measured: slice, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where measured times are a multiple of the estimates, it does not matter which of the sites are measured."""
    step = step_of(Scaled(scale))
    set_step_seconds(monkeypatch, step)
    for budget in ({"speedup": 1.5}, {"seconds": step / 1.8}):
        by_all = plan_net(cost=Scaled(scale), **budget)
        by_some = plan_net(cost=Scaled(scale, measured), **budget)
        assert by_all.factorized
        assert [site.ranks for site in by_some] == [site.ranks for site in by_all]
        assert by_some.step_seconds == step
    with pytest.raises(PolicyError, match="cannot be kept: the most that") as error_by_all:
        plan_net(cost=Scaled(scale), speedup=100)
    with pytest.raises(PolicyError, match=re.escape(str(error_by_all.value))):
        plan_net(cost=Scaled(scale, measured), speedup=100)


FLOWS = {"0": Flow(4, (12, 12)), "2": Flow(4, (12, 12)), "6": Flow(4), "7": Flow(4)}
"""Path of a layer of ``net`` -> what flows into it from X."""


def step_of(cost: ByFlops) -> float:
    """Return the time of a step of which a fifth is not the sites'."""
    layers = [(operation_of(net().get_submodule(path)), flow) for path, flow in FLOWS.items()]
    return 1.25 * sum(cost.seconds([operation], flow) for operation, flow in layers if operation is not None)


class MeasuresNothing(Scaled):
    """Has no time for any measurement."""

    def measure(self, groups: Any, *, spent: float = 0.0) -> dict[Any, float]:
        return {}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_where_no_site_was_timed_the_sites_are_taken_for_the_whole_step(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This does not depend on the scale of the estimates, which are made for no machine in particular."""
    set_step_seconds(monkeypatch, scale * step_of(Scaled(1.0)))
    by_estimates = plan_net(cost=Scaled.modelled, speedup=1.5)
    assert by_estimates.factorized
    plan = plan_net(cost=MeasuresNothing(1.0), speedup=1.5)
    assert [site.ranks for site in plan] == [site.ranks for site in by_estimates]


class SlowStep(nn.Sequential):
    """Takes its time in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            time.sleep(0.05)
        y: Tensor = self[0](x)
        return y


def test_a_long_step_is_timed_less_often_so_that_there_is_time_for_its_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sleep = time.sleep
    for seconds, width in ((0.2, 64), (15.0, 72)):  # a step of the same form would be known
        slept: list[float] = []
        # What a model counts itself is put back after each run.
        monkeypatch.setattr(time, "sleep", lambda seconds, slept=slept: (slept.append(seconds), sleep(seconds)))
        cost = tdfx.Measured(budget=seconds, cache=False)
        policy = Policy(rank=Budget(speedup=1.5, strict=False), cost=cost)
        plan = tdfx.plan(SlowStep(nn.Linear(64, width)), policy, example_inputs=(torch.ones(8, 64),))
        assert plan.step_seconds is not None
        assert plan.step_seconds > 0.05
        calls.append(len(slept))
    # One sample in place of two or three.
    assert calls[1] > calls[0]
