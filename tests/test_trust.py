"""Plans on a busy machine: what times are compared with, what contradicts, and when nothing is worth it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from budgeted import ByFlops, plan_net, set_step_seconds, sites_seconds
from torch import nn

import tdfx
from tdfx import Budget, Measured, Modelled, Plan, Policy, Reason
from tdfx.cost import measured
from tdfx.cost.count import Flow
from tdfx.cost.store import Store
from tdfx.cost.timing import Timing, take_turns
from tdfx.cost.waiting import waiting_time, working_time
from tdfx.cost.workload import Workload
from tdfx.factors.operation import Operation
from tdfx.passes.planning.knapsack import Item
from tdfx.passes.planning.relative_time import Beside, StepTime
from tdfx.passes.planning.site_cost import Candidate
from tdfx.passes.planning.worthwhile import worthwhile

REST = 0.5
"""Share of the step that is not the layers'."""


# The clock.


def test_time_without_a_processor_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = waited = 0.0

    @contextmanager
    def waiting() -> Iterator[Callable[[], float]]:
        yield lambda: waited

    def run() -> None:
        nonlocal now, waited
        now += 3.0
        waited += 2.0

    monkeypatch.setattr("tdfx.cost.timing.waiting_time", waiting)
    monkeypatch.setattr("tdfx.cost.timing.time", SimpleNamespace(perf_counter=lambda: now))
    (timing,) = take_turns([run], rounds=2)
    assert [timing.seconds, timing.load] == pytest.approx([1.0, 3.0])
    # A clock of one's own is taken as it is.
    (timing,) = take_turns([run], rounds=2, clock=lambda: now)
    assert [timing.seconds, timing.load] == pytest.approx([3.0, 1.0])


def test_waiting_is_zero_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with waiting_time() as waited:
        first = waited()
        assert 0 <= first <= waited()
    (tmp_path / "schedstat").write_text("nothing that could be read")
    for file in ("missing", "schedstat"):
        monkeypatch.setattr("tdfx.cost.waiting._SCHEDULER", tmp_path / file)
        with waiting_time() as waited:
            assert waited() == 0


def test_times_are_kept_with_the_load_under_which_they_were_taken(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store._open(create=True) as connection:  # a file as earlier versions wrote it
        connection.execute("DROP TABLE times")
        connection.execute("CREATE TABLE times (key BLOB PRIMARY KEY, seconds REAL NOT NULL, at REAL NOT NULL)")
    store.put({"a": 1.0})
    store.put({"b": 2.0}, {"b": 1.5})
    assert store.get(["a", "b"]) == {"a": 1.0, "b": 2.0}
    assert {key: load for key, (_, load) in store.entries(["a", "b", "c"]).items()} == {"a": 1.0, "b": 1.5}


# A step and its layers.


def case(channels: int) -> Any:
    return (Operation.pointwise(channels, channels, 0),), Flow(4)


A, B = case(8), case(16)
BESIDE = Beside({A: 2, B: 1}, 0.8)


def test_a_step_is_as_many_times_longer_than_its_layers_as_in_the_same_round() -> None:
    loads = (1.0, 4.0, 2.5, 6.0)
    timings = {A: Timing(tuple(0.1 * load for load in loads)), B: Timing(tuple(0.2 * load for load in loads))}
    step = Timing(tuple(0.9 * load for load in loads))
    timed = StepTime.of(step, timings, {A: 0.1, B: 0.2}, BESIDE)
    assert timed.seconds == pytest.approx(0.9)
    assert timed.doubt == pytest.approx(0.03)
    assert not timed.contradictions
    # Its layers take twice 0.1 s and once 0.2 s, and these are four fifths of all of them.
    assert timed.layers == pytest.approx(0.4 / 0.8 / 0.9)
    # The layers were known from a machine that was twice as slow.
    assert StepTime.of(step, timings, {A: 0.2, B: 0.4}, BESIDE).seconds == pytest.approx(1.8)
    # Without layers there is nothing to compare with.
    alone = StepTime.of(step, {}, {}, BESIDE)
    assert alone.doubt > 0.3
    uneven = Timing(tuple(0.9 * load for load in reversed(loads)))
    assert StepTime.of(uneven, timings, {A: 0.1, B: 0.2}, BESIDE).doubt > 0.3


def test_what_contradicts_is_said() -> None:
    timings = {A: Timing((0.1,) * 3), B: Timing((0.2,) * 3)}
    short = StepTime.of(Timing((0.25,) * 3), timings, {}, BESIDE)
    assert short.contradictions == ["its layers alone take 2.0 times as long as the whole step"]
    changed = StepTime.of(Timing((0.9,) * 3), timings, {A: 0.1, B: 0.04}, BESIDE)
    assert "some of its layers have become" in changed.contradictions[0]
    assert changed.doubt >= 0.2
    # Layers of which the step hardly notices anything say nothing of its load.
    long = StepTime.of(Timing((90.0,) * 3), timings, {A: 0.01, B: 0.02}, BESIDE)
    assert long.seconds == 90.0


# Whole plans, on a machine whose speed is known and whose load is not.


class Machine:
    """Times nothing: a layer takes as long as a model says, and a step as its layers and the rest, times the load."""

    truth = Modelled(seconds_per_call=1e-6)

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.load: Callable[[], float] = lambda: 1.0
        """Returns how many times slower the machine is in the next round."""
        self.step_factor = 1.0
        """How many times slower the step is beside that."""
        self.timed: list[int] = []
        """How many functions were timed together, each time."""
        self.step = 1.0
        for module in ("tdfx.passes.planning.relative_time", "tdfx.cost.measured"):
            monkeypatch.setattr(f"{module}.take_turns", self.turns)

    def seconds(self, run: Any) -> float:
        work = run.__self__
        if not isinstance(work, Workload):
            return self.step * self.step_factor
        size = tuple(work.inputs[0].shape[2:]) if work.chain[0].dims else ()
        return work.steps * self.truth.seconds(work.chain, Flow(work.inputs[0].shape[0], size))

    def turns(self, runs: Sequence[Any], *, rounds: int = 3, **_: Any) -> list[Timing]:
        self.timed.append(len(runs))
        loads = [self.load() for _ in range(rounds)]
        return [Timing(tuple(self.seconds(run) * load for load in loads)) for run in runs]


def convs() -> nn.Module:
    torch.manual_seed(0)
    sizes = ((16, 64), (64, 64), (64, 64), (64, 128), (128, 128))
    return nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in sizes))


X_CONVS = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(0))
SOFT = Budget(speedup=1.5, strict=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.setenv("TDFX_CACHE_DIR", str(tmp_path))
    forget(monkeypatch)
    machine = Machine(monkeypatch)
    sites = tdfx.plan(convs(), Policy(rank=SOFT, min_gain=0, cost=Measured(update_bytes=0)), example_inputs=(X_CONVS,))
    machine.step = sum(site.seconds_before or 0 for site in sites) / (1 - REST)
    forget(monkeypatch)
    Store(tmp_path).clear()
    return machine


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next plan be made by another process."""
    for name in ("_known", "_measured_at", "_loads"):
        monkeypatch.setattr(measured, name, {})
    monkeypatch.setattr(measured, "_provisional", set())
    monkeypatch.setattr(measured, "_load_now", [])


def plan_convs(**settings: Any) -> Plan:
    policy = Policy(**{"rank": SOFT, "cost": Measured(update_bytes=0), **settings})
    return tdfx.plan(convs(), policy, example_inputs=(X_CONVS,))


def test_a_load_that_comes_and_goes_changes_no_decision(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = plan_convs()
    assert quiet.factorized
    assert quiet.step_seconds == pytest.approx(machine.step)
    assert quiet.uncertainty is not None
    assert 0 < quiet.uncertainty < 0.15
    draw = random.Random(0)
    for _ in range(3):
        forget(monkeypatch)
        machine.load = lambda: draw.uniform(1, 6)
        busy = plan_convs()
        assert busy.sites == quiet.sites
        assert (busy.step_seconds, busy.notes) == (quiet.step_seconds, quiet.notes)


def test_a_known_step_is_timed_once_and_counts_while_it_agrees(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan_convs()
    forget(monkeypatch)
    machine.timed.clear()
    machine.step_factor = 1.15
    assert plan_convs().step_seconds == first.step_seconds
    assert len(machine.timed) == 1
    machine.step_factor = 2.0
    forget(monkeypatch)
    changed = plan_convs()
    assert changed.step_seconds == pytest.approx(2 * machine.step)
    assert any("the step took 2 times as long as when it was timed before" in note for note in changed.notes)
    # From then on the new time is the known one.
    forget(monkeypatch)
    again = plan_convs()
    assert again.step_seconds == changed.step_seconds
    assert not any("contradict" in note for note in (*first.notes, *again.notes))


def test_a_step_that_varies_too_much_does_not_decide(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = plan_convs(cost=Measured(update_bytes=0, cache=False))
    measured._known.clear()
    seconds = machine.seconds

    def restless(runs: Sequence[Any], **_: Any) -> list[Timing]:
        step, *layers = (Timing((seconds(run),) * 3) for run in runs)
        return [
            Timing(tuple(step.seconds * load for load in (1, 5, 1, 5, 1, 5, 1, 5, 1))),
            *(Timing(each.samples * 3) for each in layers),
        ]

    monkeypatch.setattr("tdfx.passes.planning.relative_time.take_turns", restless)
    plan = plan_convs()
    assert plan.step_seconds is None
    (note,) = (note for note in plan.notes if note.startswith("the step as a whole was not timed"))
    assert "as on a busy machine; the layers' own times decide" in note
    assert 0 < plan.total_error <= quiet.total_error


# Never for nothing.


def test_a_plan_that_gains_too_little_of_the_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    of_sites = sites_seconds()
    settings: dict[str, Any] = {"rank": Budget(speedup=1.5, strict=False), "min_gain": 1.05, "cost": ByFlops()}
    set_step_seconds(monkeypatch, 1.2 * of_sites)
    assert plan_net(**settings).factorized
    set_step_seconds(monkeypatch, 30 * of_sites)
    plan = plan_net(**settings)
    assert not plan.factorized
    assert plan.speedup == 1.0
    (note,) = (note for note in plan.notes if "sites stay as they are" in note)
    assert "the whole step would get 1.0" in note
    assert note.endswith("and min_gain asks for 1.05x")
    assert Reason.NO_GAIN in {site.reason for site in plan}
    # What has to be kept, and what is asked for whatever it costs, is done.
    assert plan_net(**settings | {"min_gain": 0}).factorized
    assert plan_net(**settings | {"rank": Budget(speedup=1.01)}).factorized


def test_a_gain_that_is_not_sure_is_none(machine: Machine) -> None:
    sure = plan_convs()
    assert sure.speedup is not None
    assert sure.uncertainty is not None
    between = sure.speedup / (1 + sure.uncertainty / 2)
    assert not plan_convs(min_gain=between).factorized


def test_a_candidate_that_loses_much_for_little_is_left_out() -> None:
    def item(loss: float, seconds: float) -> tuple[Candidate | None, Item]:
        return None, Item(loss, (seconds,))

    place = [item(0.0, 10.0), item(0.1, 8.0), item(0.5, 7.9), item(0.6, 4.0)]
    assert worthwhile(place, 0.0) == place
    assert worthwhile(place, 1.0) == [place[0], place[1], place[3]]
    assert worthwhile(place, 100.0) == place[:1]


def test_layers_are_cut_only_as_far_as_the_step_gains(machine: Machine) -> None:
    torch.manual_seed(0)
    sizes = ((16, 32), *[(32, 32)] * 6, (32, 256), (256, 256))
    model = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in sizes))
    machine.step = 0.06

    def plan(min_gain: float) -> Plan:
        policy = Policy(rank=Budget(speedup=100, strict=False), min_gain=min_gain, cost=Measured(update_bytes=0))
        return tdfx.plan(model, policy, example_inputs=(X_CONVS,))

    whatever_it_loses, worth_it = plan(1.0), plan(1.05)
    assert whatever_it_loses.speedup is not None
    assert worth_it.speedup is not None
    assert worth_it.speedup > 0.98 * whatever_it_loses.speedup > 1.1
    assert worth_it.total_error < 0.95 * whatever_it_loses.total_error, (
        whatever_it_loses.to_json(),
        worth_it.to_json(),
    )


class MeasuresOnce(ByFlops):
    """Measures what the first request asks for, and has no time for more."""

    def measure(self, groups: Any, *, spent: float = 0.0) -> dict[Any, float]:
        return {} if self.requests else super().measure(groups)


def test_a_busy_machine_makes_less_of_a_reduction_that_is_not_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = sites_seconds()

    def plan(load: float, doubt: float, cost: ByFlops, *, strict: bool = False) -> Plan:
        step = StepTime(seconds, doubt, load=load)
        monkeypatch.setattr("tdfx.passes.planning.step_time.TimeStep._timed", lambda *_: (step, []))
        return plan_net(rank=Budget(speedup=2, strict=strict), cost=cost)

    def is_noted(plan: Plan) -> bool:
        return any("the machine is busy and times are not sure" in note for note in plan.notes)

    quiet, measured_quiet = plan(1.0, 0.03, MeasuresOnce()), plan(1.0, 0.03, ByFlops())
    assert any(site.estimated for site in quiet)
    busy, doubtful = plan(3.0, 0.03, MeasuresOnce()), plan(1.0, 0.4, ByFlops())
    for unsure, sure in ((busy, quiet), (doubtful, measured_quiet)):
        assert is_noted(unsure)
        assert unsure.factorized
        assert unsure.total_error < 0.9 * sure.total_error
    for sure in (quiet, plan(3.0, 0.03, ByFlops()), plan(3.0, 0.4, MeasuresOnce(), strict=True)):
        assert not is_noted(sure)
        assert sure.speedup is not None
        assert sure.speedup > 1.99


# What a plan says of itself.


def test_the_uncertainty_travels_with_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    set_step_seconds(monkeypatch, 1.2 * sites_seconds())
    plan = plan_net(speedup=1.5, cost=ByFlops())
    assert plan.uncertainty
    assert f"x faster, within {plan.uncertainty:.0%})" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan
    older = json.loads(plan.to_json())
    del older["uncertainty"]
    assert Plan.from_json(json.dumps(older)) == replace(plan, uncertainty=None)
    # A step that is slower now is predicted to be as many times faster.
    assert plan.step_seconds is not None
    assert plan.step_seconds_after is not None
    assert plan.predicted_seconds(3 * plan.step_seconds) == pytest.approx(3 * plan.step_seconds_after)


@pytest.mark.parametrize(("waits", "worked"), [(0.0, 3.0), (1.0, 2.0), (2.9, 1.0)])
def test_a_limit_counts_work_and_at_least_a_third_of_the_time(
    waits: float, worked: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = waited = 5.0

    @contextmanager
    def waiting() -> Iterator[Callable[[], float]]:
        yield lambda: waited

    monkeypatch.setattr("tdfx.cost.waiting.waiting_time", waiting)
    monkeypatch.setattr("tdfx.cost.waiting.time", SimpleNamespace(perf_counter=lambda: now))
    with working_time() as seconds:
        assert seconds() == 0
        now += 3.0
        waited += waits
        assert seconds() == pytest.approx(worked)


def test_as_much_is_measured_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    now = waited = lost = 0.0

    @contextmanager
    def waiting() -> Iterator[Callable[[], float]]:
        yield lambda: waited

    def time_slowly(self: Measured, cases: Sequence[Any], most: float) -> dict[Any, Timing]:
        nonlocal now, waited
        now += 1.0 + lost
        waited += lost
        return {each: Timing((0.5, 0.5), 1 + lost) for each in cases}

    monkeypatch.setattr("tdfx.cost.waiting.waiting_time", waiting)
    monkeypatch.setattr("tdfx.cost.waiting.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Measured, "_time", time_slowly)
    counts = []
    for lost in (0.0, 1.0, 2.0, 9.0):  # noqa: B007
        monkeypatch.setattr(measured, "_known", {})
        groups = [[case(8 * (index + 1))] for index in range(12)]
        counts.append(len(Measured(budget=5.5, cache=False, update_bytes=0).measure(groups)))
    assert counts == [6, 6, 6, 2]
