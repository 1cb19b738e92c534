"""What a budget makes of times that are estimates, of a solver without time, and of several processes."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Sequence
from typing import Any

import highspy
import pytest
import torch
from budgeted import ByFlops, X, net, planned
from torch import Tensor, nn

import tdfx
import tdfx.report
from tdfx import Budget, Modelled, Plan, Policy, PolicyError
from tdfx.cost.count import Flow
from tdfx.distributed.processes import Processes, Solo
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme
from tdfx.kinds.registry import operation_of
from tdfx.passes.analysis.shapes import ObserveInputs
from tdfx.passes.pipeline import find_sites, make_plan
from tdfx.passes.planning import knapsack
from tdfx.passes.planning.calibration import Calibration
from tdfx.passes.planning.proposals import Candidate
from tdfx.passes.planning.site_cost import calls_of
from tdfx.passes.planning.times import SiteTimes, TimingRequest
from tdfx.text import milliseconds


class Impatient(ByFlops):
    """Times what it is asked for first, and has no time for more."""

    def measure(self, groups: Any, *, spent: float = 0.0) -> dict[Any, float]:
        return {} if self.asked else super().measure(groups)


def test_times_that_could_not_be_measured_are_said_to_be_estimates() -> None:
    plan = planned(speedup=1.5, cost=Impatient())
    assert any(re.search(r"\d+ sites? (was|were) not timed as planned, for lack of time", one) for one in plan.notes)
    guessed = [one for one in plan if one.estimated]
    assert guessed
    assert all(one.factorized and one.seconds_after is not None for one in guessed)
    (said,) = (one for one in plan.notes if "for lack of time" in one)
    assert said.startswith(f"{len(guessed)} site")
    for one in guessed:
        assert one.seconds_before is not None and one.seconds_after is not None  # noqa: PT018
        times = milliseconds(one.seconds_before, one.seconds_after)
        (row,) = (line for line in str(plan).splitlines() if line.startswith(f"{one.name} "))
        assert f" ~{times}" in row
    assert f"measured, 4 sites, {len(guessed)} of them by estimate: " in str(plan)
    assert Plan.from_json(plan.to_json()) == plan
    older = json.loads(plan.to_json())
    for site in older["sites"]:
        del site["estimated"]
    assert not any(one.estimated for one in Plan.from_json(json.dumps(older)))
    known = planned(speedup=1.5, cost=ByFlops())
    assert not any("not timed" in one for one in known.notes)
    assert not any(one.estimated for one in known)
    assert "~" not in str(known)
    assert "estimate" not in str(known)


def test_what_was_not_timed_at_all_counts_as_the_solver_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(Scaled(1e3))
    monkeypatch.setattr("tdfx.passes.planning.step_time.TimeStep._seconds", lambda *_: step)
    plan = planned(speedup=1.5, cost=Scaled(1e3, slice(0, 1)))
    guessed = {one.name for one in plan.factorized if one.estimated}
    assert guessed & {"2", "6", "7"}
    assert plan.speedup is not None
    assert 1.5 <= plan.speedup < 1.6
    tags: list[str] = []

    class Writer:
        def add_scalar(self, tag: str, *_: Any) -> None:
            tags.append(tag)

    tdfx.report.log_plan(Writer(), plan, 1)
    assert {tag.split("/")[1] for tag in tags if tag.startswith("tdfx_ms/")} == {
        one.name for one in plan if one.seconds_after is not None
    } - guessed


def test_a_check_says_how_much_of_the_prediction_was_estimated() -> None:
    plan = planned(speedup=1.5, cost=Impatient())
    guessed = sum(one.estimated for one in plan)
    model = tdfx.rewrite(net(), plan)
    check = plan.check(model, example_inputs=(X,), rounds=1)
    assert check.estimated == guessed > 0
    assert f"in time, {guessed} sites by estimate)" in str(check)
    known = planned(speedup=1.5, cost=ByFlops())
    assert str(known.check(tdfx.rewrite(net(), known), example_inputs=(X,), rounds=1)).endswith(" in time)")


def test_a_solver_out_of_time_is_an_error_only_where_the_budget_must_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(parameters=0.4, flops=0.4)
    ready = knapsack._quiet

    def hasty() -> highspy.Highs:
        highs = ready()
        highs.setOptionValue("mip_max_improving_sols", 1)
        highs.setOptionValue("presolve", "off")
        return highs

    monkeypatch.setattr(knapsack, "_quiet", hasty)
    for strict in (True, False):
        first = planned(rank=Budget(parameters=0.4, flops=0.4, strict=strict))
        assert first.parameters_after <= 0.4 * first.parameters_before
        assert first.total_error >= found.total_error > 0
        assert "the solver's 20 s ran out: the best choice that it had found by then was taken" in " ".join(first.notes)
    monkeypatch.setattr(knapsack, "SECONDS", 0.0)
    with pytest.raises(PolicyError, match=r"No choice for the 4 sites was found in 20 s that keeps Budget\(flops=0\.4"):
        planned(parameters=0.4, flops=0.4)
    kept = planned(rank=Budget(parameters=0.4, flops=0.4, strict=False))
    assert not kept.factorized
    assert "no choice for the 4 sites was found in 20 s that comes near Budget" in " ".join(kept.notes)


def test_one_process_chooses_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several solves, with measurements in between that all make together, of which the others hear the outcome."""
    settings: dict[str, Any] = {"rank": Budget(speedup=1.5, strict=False), "cost": ByFlops()}
    sent: list[Any] = []

    class First(Solo):
        def broadcast_object(self, value: Any) -> Any:
            sent.append(copy.deepcopy(value))
            return value

    class Other(Solo):
        is_first = False

        def broadcast_object(self, value: Any) -> Any:
            return next(received)

    def as_process(processes: Processes) -> Plan:
        program = find_sites(net(), processes=processes)
        policy = Policy(min_gain=0, round_to=1, **settings)
        return make_plan(program, policy, (X,)).plan

    first = as_process(First())
    received = iter(sent)

    def solves(*_: Any) -> Any:
        raise AssertionError("only the first process solves")

    monkeypatch.setattr("tdfx.passes.planning.budget.best_choice", solves)
    assert as_process(Other()) == first
    assert list(received) == []
    assert len(sent) > 2


class Scaled(ByFlops):
    """Takes a fixed number of times as long as is estimated, and times some of the sites alone, or all that is asked for."""

    modelled = Modelled(seconds_per_call=0)

    def __init__(self, scale: float, sites: slice | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.sites = sites

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        return self.scale * self.modelled.seconds(chain, flow)

    def measure(self, groups: Any, *, spent: float = 0.0) -> dict[Any, float]:
        if self.sites is not None:
            groups = [] if self.asked else list(groups)[self.sites]
        return super().measure(groups)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("known", [slice(0, 2), slice(1, 3), slice(3, 4)], ids=str)
def test_estimates_stand_beside_measured_times_in_their_scale(
    known: slice, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what was measured is a multiple of what is estimated, it does not matter which of the sites were measured."""
    step = step_of(Scaled(scale))
    monkeypatch.setattr("tdfx.passes.planning.step_time.TimeStep._seconds", lambda *_: step)
    for budget in ({"speedup": 1.5}, {"seconds": step / 1.8}):
        all_known = planned(cost=Scaled(scale), **budget)
        some_known = planned(cost=Scaled(scale, known), **budget)
        assert all_known.factorized
        assert [one.ranks for one in some_known] == [one.ranks for one in all_known]
        assert some_known.step_seconds == step
    with pytest.raises(PolicyError, match="cannot be kept: the most that") as exact:
        planned(cost=Scaled(scale), speedup=100)
    with pytest.raises(PolicyError, match=re.escape(str(exact.value))):
        planned(cost=Scaled(scale, known), speedup=100)


FLOWS = {"0": Flow(4, (12, 12)), "2": Flow(4, (12, 12)), "6": Flow(4), "7": Flow(4)}
"""The layers of ``net``, and what X brings to each."""


def step_of(cost: ByFlops) -> float:
    """Return the time of a step of which a fifth is not the sites'."""
    layers = [(operation_of(net().get_submodule(name)), flow) for name, flow in FLOWS.items()]
    return 1.25 * sum(cost.seconds([one], flow) for one, flow in layers if one is not None)


class SlowFactors(Scaled):
    """A machine on which what is factorized takes longer, in proportion, than estimated."""

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        return super().seconds(chain, flow) * (2.5 if len(chain) > 1 else 1.0)


def test_what_is_slow_about_the_sites_that_were_timed_is_expected_of_the_others() -> None:
    cost, times = SlowFactors(7.0), SiteTimes(Solo())
    program = ObserveInputs((X,))(find_sites(net())).program
    sites = {one.name: one for one in program.sites}
    least, half = (Candidate(get_scheme("svd"), (rank,)) for rank in (4, 24))
    lowest = {"svd": least}
    times.prepare([TimingRequest(cost, sites["6"], (least.chain,))])
    uncalibrated = Calibration(times, cost)
    learned = uncalibrated.learn([(sites["6"], lowest), (sites["7"], lowest)], None)
    known, guessed, blind = (
        calibration.of_site(sites[name], (least, half), lowest)
        for name, calibration in (("6", learned), ("7", learned), ("7", uncalibrated))
    )
    assert learned.dense == pytest.approx(7)
    assert learned.lowest["svd"] == pytest.approx(2.5)
    assert known.seconds(least) == times.measured(cost, sites["6"], least.chain)
    ((steps, flow),) = calls_of(sites["7"], least.chain)
    assert guessed.seconds(least) == pytest.approx(cost.seconds(steps, flow))
    assert guessed.seconds(None) / guessed.seconds(least) == pytest.approx(
        blind.seconds(None) / blind.seconds(least) / 2.5
    )
    # From there to what is not cut at all the scale goes over from the one to the other.
    assert blind.seconds(None) / blind.seconds(half) / 2.5 < guessed.seconds(None) / guessed.seconds(half)
    assert guessed.seconds(None) / guessed.seconds(half) < blind.seconds(None) / blind.seconds(half)


class Starting(Scaled):
    """A machine on which everything takes a while to begin, which estimates know nothing of."""

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        return 2.0 + super().seconds(chain, flow)


def test_between_what_was_timed_times_are_on_a_line() -> None:
    cost, times = Starting(7.0), SiteTimes(Solo())
    program = ObserveInputs((X,))(find_sites(net())).program
    site = next(one for one in program.sites if one.name == "6")
    least, half = (Candidate(get_scheme("svd"), (rank,)) for rank in (4, 16))
    times.prepare([TimingRequest(cost, site, (least.chain,))])
    curve = Calibration(times, cost).of_site(site, (least, half), {"svd": least})
    ((steps, flow),) = calls_of(site, half.chain)
    assert times.measured(cost, site, half.chain) is None
    assert curve.seconds(half) == pytest.approx(cost.seconds(steps, flow))
    assert curve.seconds(least) < curve.seconds(half) < curve.seconds(None)


class Speechless(Scaled):
    """Has no time for anything."""

    def measure(self, groups: Any, *, spent: float = 0.0) -> dict[Any, float]:
        return {}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_where_no_site_was_timed_they_are_taken_to_be_the_whole_step(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the scale of the estimates is: no machine is the one that they are made for."""
    monkeypatch.setattr("tdfx.passes.planning.step_time.TimeStep._seconds", lambda *_: scale * step_of(Scaled(1.0)))
    by_estimates = planned(cost=Scaled.modelled, speedup=1.5)
    assert by_estimates.factorized
    found = planned(cost=Speechless(1.0), speedup=1.5)
    assert [one.ranks for one in found] == [one.ranks for one in by_estimates]


class Sleepy(nn.Sequential):
    """Takes its time, and counts how often it is asked to train."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            Sleepy.calls += 1
            time.sleep(0.05)
        out: Tensor = self[0](x)
        return out


def test_a_long_step_is_timed_less_often_so_that_there_is_time_for_its_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for seconds in (0.2, 15.0):
        monkeypatch.setattr(Sleepy, "calls", 0)
        cost = tdfx.Measured(budget=seconds, cache=False)
        policy = Policy(rank=Budget(speedup=1.5, strict=False), cost=cost)
        step = tdfx.plan(Sleepy(nn.Linear(64, 64)), policy, example_inputs=(torch.ones(8, 64),)).step_seconds
        assert step is not None
        assert step > 0.05
        counts.append(Sleepy.calls)
    # One sample in place of three.
    assert counts[1] - counts[0] >= 2
