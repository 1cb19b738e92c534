"""The contract of a pass: it reports what it did, can run twice, and is caught if it breaks its promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import tdfx
from tdfx.passes.analysis.find import Find
from tdfx.passes.analysis.shapes import ObserveInputs
from tdfx.passes.analysis.trace import Trace
from tdfx.passes.base import Pass, PassResult
from tdfx.passes.planning.select import Select, Selected
from tdfx.passes.program import Program
from tdfx.passes.transform.merge import Merge
from tdfx.passes.transform.rewrite import Rewrite, Rewritten

QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)


def planned(model: nn.Module) -> Program:
    return Select(QUARTER)(Find()(Trace()(Program(module=model)).program).program).program


def test_what_a_pass_reports_is_what_it_did() -> None:
    program = planned(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    result = Rewrite()(program)
    assert [(change.site, change.what) for change in result.changes] == [("0", "Linear -> Factorized")]
    assert [swap.site for swap in result.swaps] == ["0"]


def test_a_pass_can_be_run_twice() -> None:
    program = planned(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    rewrite = Rewrite()
    first, second = rewrite(program), rewrite(program)
    assert [swap.site for swap in first.swaps] == [swap.site for swap in second.swaps] == ["0"]
    pairs = zip(first.program.module.parameters(), second.program.module.parameters(), strict=True)
    assert all(torch.equal(parameter, again) for parameter, again in pairs)
    merge = Merge()
    assert [join.name for join in merge(first.program).joins] == [join.name for join in merge(second.program).joins]


class LosesASite(Find):
    def run(self, program: Program) -> PassResult:
        result = super().run(program)
        return PassResult(replace(result.program, sites=result.program.sites[1:]), result.changes)


class ForgetsToRewrite(Rewrite):
    def run(self, program: Program) -> Rewritten:
        return replace(super().run(program), program=program)


class ForgetsDecisions(Select):
    def run(self, program: Program) -> Selected:
        result = super().run(program)
        assert result.program.plan is not None
        return replace(result, program=replace(result.program, plan=replace(result.program.plan, sites=())))


class LosesAParameter(Trace):
    def run(self, program: Program) -> PassResult:
        result = super().run(program)
        del result.program.module._modules["0"]
        return result


class LosesShapes(ObserveInputs):
    def run(self, program: Program) -> PassResult:
        return PassResult(replace(super().run(program).program, sites=()))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (LosesAParameter(), "pass 'trace' broke its promise: the copy has the model's parameters"),
        (LosesASite(), "pass 'find' broke its promise: every convolution and linear layer is a site"),
        (LosesShapes(torch.rand(2, 8)), "pass 'observe_inputs' broke its promise: no site is lost or moved"),
        (ForgetsDecisions(QUARTER), "pass 'select' broke its promise: every site has a decision"),
        (ForgetsToRewrite(), "pass 'rewrite' broke its promise: '0' is factorized"),
    ],
)
def test_a_pass_that_breaks_its_promise_is_caught(broken: Pass[Any], message: str) -> None:
    program = planned(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    with pytest.raises(tdfx.PassError, match=message):
        broken(program)
