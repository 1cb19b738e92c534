"""The time of an optimizer's step: measured on values of its own, counted for each value and each tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer, optimizer

import tdfx
from tdfx.cost import update
from tdfx.cost.count import Flow
from tdfx.cost.timing import Timing
from tdfx.cost.update import UpdateTime, time_update
from tdfx.factors.operation import Operation

PER_VALUE, PER_TENSOR = 3e-9, 2e-5


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Optimizer]:
    """The optimizers whose steps are timed, which take the same time for each value and each tensor by a clock of ours."""
    stepped: list[Optimizer] = []

    def take_turns(runs: Sequence[Callable[[], object]], **_: Any) -> list[Timing]:
        timings = []
        for run in runs:
            run()
            each = run.__self__  # type: ignore[attr-defined]
            stepped.append(each)
            tensors = [tensor for group in each.param_groups for tensor in group["params"]]
            values = sum(map(torch.Tensor.numel, tensors))
            timings.append(Timing((PER_VALUE * values + PER_TENSOR * len(tensors),)))
        return timings

    monkeypatch.setattr(update, "take_turns", take_turns)
    monkeypatch.setattr(update, "_LARGE", 2**12)
    return stepped


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


def test_an_update_is_timed_with_the_settings_of_the_optimizer_that_has_most_values(timed: list[Optimizer]) -> None:
    large = AdamW(weights((8, 8), (4,), dtype=torch.float64), lr=0.5, amsgrad=True, weight_decay=0.25)
    measured = time_update([SGD(weights((4, 4)), lr=0.1), large])
    assert measured is not None
    assert measured.per_tensor == pytest.approx(PER_TENSOR, rel=0.01)
    assert measured.per_value == pytest.approx(PER_VALUE, rel=0.01)
    assert measured.seconds(1000, 2) == pytest.approx(1000 * PER_VALUE + 2 * PER_TENSOR, rel=0.01)
    assert {type(each) for each in timed} == {AdamW}
    for each in timed:
        (group,) = each.param_groups
        assert (group["lr"], group["amsgrad"], group["weight_decay"]) == (0.5, True, 0.25)
        assert {tensor.dtype for tensor in group["params"]} == {torch.float64}
    # The user's own has taken no step.
    assert not large.state
    assert all(bool((tensor == 1).all()) for tensor in large.param_groups[0]["params"])


class Own(SGD):
    """An optimizer of a user's own, whose steps may do anything."""


def test_what_cannot_be_timed_by_itself_is_not(timed: list[Optimizer]) -> None:
    meta = nn.Parameter(torch.empty(4, 4, device="meta"))
    for each in (Own(weights((4, 4))), LBFGS(weights((4, 4))), SGD([meta], lr=0.1)):
        assert time_update([each]) is None
    assert time_update([]) is None
    handle = optimizer.register_optimizer_step_post_hook(lambda *_: None)
    try:
        assert time_update([SGD(weights((4, 4)), lr=0.1)]) is None
    finally:
        handle.remove()
    assert not timed


def test_layers_count_the_update_of_each_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = Operation(in_channels=64, out_channels=64)
    factors = (Operation(in_channels=64, out_channels=8), Operation(in_channels=8, out_channels=64))
    case, cut = ((dense,), Flow(8)), (factors, Flow(8))
    monkeypatch.setattr(tdfx.Measured, "_time", lambda self, cases, most: {each: Timing((0.5, 0.5)) for each in cases})
    known: dict[str, float] = {}
    monkeypatch.setattr("tdfx.cost.measured._known", known)
    plain = tdfx.Measured(cache=False, update_bytes=0).measure([[case, cut]])
    assert plain == {case: 0.5, cut: 0.5}
    cost = tdfx.Measured(cache=False, update=UpdateTime(PER_VALUE, PER_TENSOR))
    timed = cost.measure([[case, cut]])
    assert timed[case] == pytest.approx(0.5 + 64 * 64 * PER_VALUE + PER_TENSOR, abs=1e-12)
    assert timed[cut] == pytest.approx(0.5 + 2 * 64 * 8 * PER_VALUE + 2 * PER_TENSOR, abs=1e-12)


def test_a_plan_times_the_update_of_the_optimizer_that_it_is_given(
    timed: list[Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[UpdateTime | None] = []
    measure = tdfx.Measured.measure

    def record(self: tdfx.Measured, groups: Any, *, spent: float = 0.0) -> Any:
        seen.append(self.update)
        return measure(self, groups, spent=spent)

    monkeypatch.setattr(tdfx.Measured, "measure", record)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(4, 64)
    settings: dict[str, Any] = {"rank": tdfx.Ratio(of=0.25)}
    adam = AdamW(model.parameters())
    for optimizers, cost, is_timed in (
        (adam, tdfx.Measured(cache=False), True),
        ([adam], tdfx.Measured(cache=False), True),
        (None, tdfx.Measured(cache=False), False),
        ("no optimizer", tdfx.Measured(cache=False), False),
        (adam, tdfx.Measured(cache=False, update_bytes=20), False),
    ):
        seen.clear()
        policy = tdfx.Policy(**settings, cost=cost)
        plan = tdfx.plan(model, policy, example_inputs=(x,), optimizer=optimizers)  # type: ignore[arg-type]
        assert seen
        assert [each is not None for each in seen] == [is_timed] * len(seen)
        assert plan.policy == repr(policy)
