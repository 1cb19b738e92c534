"""A budget that is kept in instalments comes to what a plan made at once does, whether or not anything was measured."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx import Budget, Modelled, Plan, Policy, Ratio
from tdfx.cost.count import Flow
from tdfx.factors.registry import get_scheme
from tdfx.kinds.registry import operation_of
from tdfx.training.switch.instalments import left_of, only

SIZES = (64, 48, 96, 32, 80)
X = torch.randn(6, SIZES[0], generator=torch.Generator().manual_seed(0))
# Layers this small take most of their time to start, which would make no factors pay.
COST = Modelled(seconds_per_call=0)
SETTINGS: dict[str, Any] = {"min_gain": 0, "round_to": 1, "cost": COST}


def net() -> nn.Sequential:
    """Return linear layers whose spectra fall off, each at a pace of its own."""
    torch.manual_seed(0)
    layers = [nn.Linear(first, second) for first, second in itertools.pairwise(SIZES)]
    for number, one in enumerate(layers):
        u, s, v = torch.linalg.svd(one.weight.detach(), full_matrices=False)
        one.weight.data = (u * torch.exp(-torch.arange(len(s)) * (0.04 + 0.05 * (number % 3)))) @ v
    return nn.Sequential(*layers)


def seconds_of(model: nn.Module, plan: Plan, inputs: Tensor | None) -> tuple[float, float]:
    """Return what all sites take before and after a plan, by the modelled cost and from the layers alone."""
    flow = None if inputs is None else Flow(len(inputs))
    before = after = 0.0
    for one in plan:
        operation = operation_of(model.get_submodule(one.name))
        assert operation is not None
        scheme = get_scheme(one.scheme) if one.scheme is not None else None
        before += COST.seconds([operation], flow)
        after += COST.seconds(scheme.chain(operation, one.ranks or ()) if scheme else [operation], flow)
    return before, after


def in_two(policy: Policy, first: tuple[str, ...], inputs: Tensor | None) -> tuple[Plan, Plan]:
    """Return the plan of a model, and what comes of it when some sites are switched before the others."""
    model = net()
    whole = tdfx.plan(model, policy, example_inputs=inputs)
    begun = only(whole, first)
    flow = None if inputs is None else Flow(len(inputs))
    operations = {one.name: operation_of(model.get_submodule(one.name)) for one in whole}
    seconds = {name: COST.seconds([one], flow) / (begun[name].gain or 1) for name, one in operations.items() if one}
    half = tdfx.rewrite(model, begun)
    rest = tdfx.plan(half, left_of(policy, begun, seconds), example_inputs=inputs)
    joined = dataclasses.replace(whole, sites=tuple(a if a.factorized else b for a, b in zip(begun, rest, strict=True)))
    return whole, joined


ANYWHERE = [{"speedup": 2}, {"speedup": 2.4}, {"parameters": 0.4}]
WITH_INPUTS = [{"flops": 0.4}, {"memory": 0.6}]
CASES = [(one, X) for one in (*ANYWHERE, *WITH_INPUTS)] + [(one, None) for one in ANYWHERE]


@pytest.mark.parametrize("first", [("0",), ("1", "2"), ("0", "1", "2")], ids=str)
@pytest.mark.parametrize(("budget", "inputs"), CASES, ids=lambda one: "inputs" if isinstance(one, Tensor) else str(one))
def test_what_is_left_is_decided_as_it_was_at_once(budget: dict[str, Any], inputs: Any, first: tuple[str, ...]) -> None:
    whole, joined = in_two(Policy(**budget, **SETTINGS), first, inputs)
    # What is best with some sites settled as in the best of all is the rest of that.
    assert [one.ranks for one in joined] == [one.ranks for one in whole]
    if "speedup" in budget:
        before, after = seconds_of(net(), joined, inputs)
        assert budget["speedup"] <= before / after < 1.1 * budget["speedup"]


def test_a_switch_by_and_by_comes_to_what_one_at_once_does() -> None:
    """Layers turn, and settle, one after another; what they could be cut to is the same before and after."""
    policy = Policy(speedup=2, **SETTINGS)
    model: nn.Module = net()
    whole = tdfx.plan(model, policy)
    turns = {
        step: (f"{place}.weight", model.get_parameter(f"{place}.weight").data)
        for place, step in enumerate((2, 8, 14, 20))
    }
    draw = torch.Generator().manual_seed(1)
    for path, weight in turns.values():
        turn = torch.linalg.qr(torch.randn(len(weight), len(weight), generator=draw)).Q
        model.get_parameter(path).data = turn @ weight
    switch = tdfx.Switch(policy, when=tdfx.Settled(every=1, window=2, tolerance=0.1))
    for step in range(1, 26):
        if step in turns:
            path, weight = turns[step]
            model.get_parameter(path).data.copy_(weight)
        model = switch.step(model)
    assert switch.done
    assert len([one for one in switch.events if one.what == "switched"]) > 2
    assert switch.plan is not None
    assert [one.ranks for one in switch.plan] == [one.ranks for one in whole]


def test_sites_that_a_budget_does_not_decide_take_time_too() -> None:
    own = Policy(rank=Ratio(of=0.125), **SETTINGS)
    policy = Policy(speedup=1.4, exclude=("1",), overrides={"2": own}, **SETTINGS)
    for inputs in (X, None):
        plan = tdfx.plan(net(), policy, example_inputs=inputs)
        assert (plan["1"].factorized, plan["2"].ranks) == (False, (4,))
        before, after = seconds_of(net(), plan, inputs)
        assert 1.4 <= before / after < 1.5
    with pytest.raises(
        tdfx.PolicyError, match=r"cannot be kept: the most that the 1 sites in question can give is speedup="
    ) as no:
        tdfx.plan(net(), Policy(speedup=50, include=("0",), **SETTINGS))
    most = float(str(no.value).partition("can give is speedup=")[2].split(" ")[0].rstrip("."))
    plan = tdfx.plan(net(), Policy(speedup=most, include=("0",), **SETTINGS))
    before, after = seconds_of(net(), plan, None)
    assert most <= before / after < 2


@pytest.mark.parametrize("name", ["flops", "memory"])
@pytest.mark.parametrize("strict", [True, False])
def test_what_needs_inputs_says_so_without_candidates_too(name: str, strict: bool) -> None:
    settings: dict[str, Any] = {name: 0.5}
    budget = Budget(**settings, strict=strict)
    for exclude in ((), ("*",)):
        with pytest.raises(
            tdfx.PolicyError, match=f"counts {name}, which depends on what flows .* Pass example_inputs="
        ):
            tdfx.plan(net(), Policy(rank=budget, exclude=exclude))
    assert not tdfx.plan(nn.ReLU(), Policy(rank=budget)).sites
    if strict:
        with pytest.raises(tdfx.PolicyError, match="cannot be kept: the 0 sites in question can give nothing of it"):
            tdfx.plan(net(), Policy(rank=budget, exclude=("*",)), example_inputs=X)


def test_a_site_of_which_nothing_is_known_is_left_out_of_what_is_left() -> None:
    begun = only(tdfx.plan(net(), Policy(rank=Ratio(of=0.25), **SETTINGS), example_inputs=X), ("0",))
    unknown = dataclasses.replace(
        begun["3"], flops_before=None, flops_after=None, memory_before=None, memory_after=None
    )
    partly = dataclasses.replace(begun, sites=(*begun.sites[:3], unknown))
    assert partly.flops_before is None
    known = begun.sites[:3]
    share = sum(one.flops_after or 0 for one in known) / sum(one.flops_before or 0 for one in known)
    left = left_of(Policy(flops=0.5, **SETTINGS), partly, {}).rank
    assert isinstance(left, Budget)
    assert left.flops == pytest.approx(0.5 / share)


class Pair(nn.Module):
    """Two linear maps of the same input, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 48, bias=False), nn.Linear(48, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.first(x) + self.second(x))


def falling(rank: int, seed: int) -> Tensor:
    """Return a matrix of a rank, all of whose values stand far above noise."""
    draw = torch.Generator().manual_seed(seed)
    sides = [torch.randn(48, rank, generator=draw) for _ in range(2)]
    return sides[0] @ sides[1].T


LATER = 8
"""The step at which the second layer turns."""


def turned(model: nn.Module, step: int, later: Tensor) -> None:
    """Let the first layer turn at the second step, and the other one later, to what it is to be then."""
    for name, when, weight in (("first", 2, falling(12, 1) + 0.1 * falling(48, 6)), ("second", LATER, later)):
        if step == when:
            model.get_parameter(f"{name}.weight").data.copy_(weight)


def begun() -> tuple[tdfx.Switch, nn.Module]:
    """Return a model of whose layers the second one alone could keep a budget without any loss, and what watches it."""
    torch.manual_seed(0)
    model = Pair()
    model.second.weight.data.copy_(falling(4, 2))
    policy = Policy(rank=Budget(parameters=0.7), min_gain=0, round_to=1, cost=COST)
    return tdfx.Switch(policy, when=tdfx.Settled(every=1, window=2, tolerance=0.1)), model


def ranks_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: one.origin.ranks for name, one in model.named_modules() if isinstance(one, tdfx.Factorized)}


def test_a_site_that_was_not_needed_comes_back_when_others_give_less() -> None:
    switch, model = begun()
    # The second layer comes to be what can be cut least.
    later = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(3))).Q
    saved: list[tuple[int, Any, Any]] = []
    for step in range(1, 20):
        turned(model, step, later)
        saved.append((step, copy.deepcopy(switch.state_dict()), copy.deepcopy(model)))
        model = switch.step(model)
        if step < LATER:
            assert not ranks_of(model)
    assert [(one.what, one.sites) for one in switch.events if one.step < LATER] == [("waiting", ("first",))]
    assert "not needed beside what the others give" in str(switch)
    assert switch.done
    assert set(ranks_of(model)) == {"first"}
    assert switch.plan is not None
    assert switch.plan.parameters_after <= 0.7 * switch.plan.parameters_before
    # From the second alone, 0.4 · 48² values make 9 ranks, and of an orthogonal matrix the others are lost.
    assert switch.plan.total_error < 0.25 * (1 - 9 / 48)
    # The state of a run from before any site was spared is taken too.
    for one in saved[2][1]["watch"]["sites"].values():
        assert one.pop("spare") is False
    for step, state, before in saved:
        again, _ = begun()
        again.load_state_dict(state)
        for later_step in range(step, 20):
            if later_step > step:
                turned(before, later_step, later)
            before = again.step(before)
        assert again.events == switch.events
        assert again.plan == switch.plan
        assert ranks_of(before) == ranks_of(model)


def test_a_site_that_stays_unneeded_is_kept_once_nothing_else_waits() -> None:
    switch, model = begun()
    for step in range(1, 20):
        turned(model, step, falling(4, 5))
        model = switch.step(model)
    assert switch.done
    assert set(ranks_of(model)) == {"second"}
    said = [(one.what, one.sites) for one in switch.events]
    assert said == [("waiting", ("first",)), ("switched", ("second",)), ("kept", ("first",))]
    assert "not_needed" in switch.events[-1].why


def test_the_timeout_ends_the_waiting_of_what_was_not_needed() -> None:
    _, model = begun()
    policy = Policy(rank=Budget(parameters=0.7), min_gain=0, round_to=1, cost=COST)
    switch = tdfx.Switch(policy, when=tdfx.Settled(every=1, window=2, tolerance=0.1, timeout=LATER - 1))
    for step in range(1, LATER):
        turned(model, step, falling(4, 5))
        model = switch.step(model)
    assert switch.done
    assert set(ranks_of(model)) == {"second"}
