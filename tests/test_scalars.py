"""A plan as scalars: for any logger, for the real TensorBoard, and from a switch in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tdfx
import tdfx.report
from tdfx.errors import PolicyError, TdfxWarning
from tdfx.training.step_check import StepCheck

QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), cost=tdfx.Modelled(), min_gain=0)


class Recorder:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any = None) -> None:
        self.seen[tag, global_step] = float(scalar_value)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(64, 64))


@pytest.fixture
def plan() -> tdfx.Plan:
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), cost=tdfx.Modelled(), exclude=("0",), min_gain=0)
    return tdfx.plan(net(), policy, example_inputs=torch.randn(2, 3, 5, 5))


def test_ranks_energy_and_sizes_are_logged(plan: tdfx.Plan) -> None:
    writer = Recorder()
    tdfx.report.log_plan(writer, plan, step=7)
    seen = {tag: value for (tag, step), value in writer.seen.items() if step == 7}
    assert len(seen) == len(writer.seen)
    assert {tag: value for tag, value in seen.items() if "rank" in tag} == {
        "tdfx_rank/1/out": 16,
        "tdfx_rank/1/in": 8,
        "tdfx_rank/3": 16,
    }
    assert set(seen) - {tag for tag in seen if "rank" in tag} == {
        *(
            "tdfx/sites_factorized",
            "tdfx/parameters",
            "tdfx/parameters_share",
            "tdfx/total_error",
            "tdfx/flops_forward",
        ),
        *("tdfx_energy/1", "tdfx_energy/3"),
    }
    assert seen["tdfx/parameters"] == plan.parameters_after
    assert seen["tdfx/parameters_share"] == plan.parameters_after / plan.parameters_before


def test_the_energy_is_the_share_of_the_squares_that_the_split_keeps(plan: tdfx.Plan) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    layer_plan = tdfx.plan(model, QUARTER)
    writer = Recorder()
    tdfx.report.log_plan(writer, layer_plan, step=0)
    squares = torch.linalg.svdvals(model[0].weight.detach().double()).square()  # type: ignore[operator]
    # Both are sums of squares; the logged one comes from the Gram matrix.
    assert writer.seen["tdfx_energy/0", 0] == pytest.approx(float(squares[:16].sum() / squares.sum()), rel=1e-10)


def test_times_that_were_measured_are_logged_in_milliseconds(plan: tdfx.Plan) -> None:
    from dataclasses import replace

    site = replace(plan["3"], name="", seconds_before=0.004, seconds_after=0.001)
    timed = replace(plan, sites=(site,), step_seconds=0.010)
    check = StepCheck(seconds_before=0.011, seconds_after=0.0085, seconds_predicted=0.008)
    writer = Recorder()
    tdfx.report.log_plan(writer, timed, step=1, check=check)
    times = {tag: value for (tag, _), value in writer.seen.items() if "ms" in tag}
    assert times == pytest.approx(
        {
            "tdfx/step_ms_dense": 10,
            "tdfx/step_ms_predicted": 7,
            "tdfx/step_ms_dense_checked": 11,
            "tdfx/step_ms_checked": 8.5,
            "tdfx/step_ms_predicted_checked": 8,
            "tdfx_ms/root/dense": 4,
            "tdfx_ms/root/factorized": 1,
        }
    )


def test_a_writer_without_add_scalar_is_refused(plan: tdfx.Plan) -> None:
    with pytest.raises(PolicyError, match=r"writer=3 has no add_scalar\(tag, value, step\)"):
        tdfx.report.log_plan(3, plan, step=0)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match=r"writer=\[\] has no add_scalar"):
        tdfx.Switch(QUARTER, when=tdfx.AtStep(1), writer=[])  # type: ignore[arg-type]


def test_a_switch_logs_what_it_did_once() -> None:
    writer, ticks = Recorder(), iter(range(100))
    switch = tdfx.Switch(QUARTER, when=tdfx.AtStep(3), writer=writer, clock=lambda: float(next(ticks)))
    model: nn.Module = net()
    for step in range(1, 6):
        model = switch.step(model)
        assert bool(writer.seen) == (step >= 3)
    assert {step for _, step in writer.seen} == {3}
    assert writer.seen["tdfx/sites_factorized", 3] == 3
    assert writer.seen["tdfx/step_ms_before_switch", 3] == 1000
    assert switch.plan is not None
    direct = Recorder()
    tdfx.report.log_plan(direct, switch.plan, 3)
    assert direct.seen.items() <= writer.seen.items()


def test_a_switch_survives_a_failing_logger() -> None:
    class Broken(Recorder):
        def add_scalar(self, tag: str, scalar_value: Any, global_step: Any = None) -> None:
            raise OSError("no room on the disk")

    switch = tdfx.Switch(QUARTER, when=tdfx.AtStep(1), writer=Broken())
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(TdfxWarning, match=r"The switch at step 1 was not logged: OSError\('no room on the disk'\)"):
        small = switch.step(model, optimizer=optimizer)
    assert small is not model
    assert switch.done
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in small.parameters()}


@pytest.mark.filterwarnings("ignore")  # of tensorboard's own imports
def test_tensorboard_reads_back_what_was_logged(plan: tdfx.Plan, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    expected = Recorder()
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (5, 9):
            tdfx.report.log_plan(writer, plan, step)
            tdfx.report.log_plan(expected, plan, step)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    read = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    # Event files hold float32.
    assert read == {key: pytest.approx(value, rel=2**-23) for key, value in expected.seen.items()}
