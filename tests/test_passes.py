"""Each pass by itself: what is traced, what is found and why it is kept, what flows, and the contract."""

from __future__ import annotations

import operator
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

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


class Wrapper(nn.Module):
    """Calls what it is given, by a forward of the test's choice."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class ByValue(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else -self.inner(x)  # type: ignore[operator, no-any-return]


class Noisy(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.randn(4)  # type: ignore[operator, no-any-return]


class Optional(Wrapper):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.layer(x)  # type: ignore[operator]
        return y if mask is None else y * mask  # type: ignore[no-any-return]


class ReadsWeight(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(x, self.layer.weight)  # type: ignore[operator, union-attr, arg-type, no-any-return]


class Attending(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.attention(x, x, x)[0])  # type: ignore[operator, no-any-return]


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Labelled(nn.Linear):
    label = "a subclass that keeps the stock forward"


def sites(model: nn.Module) -> dict[str, tdfx.SitePlan]:
    return {site.name: site for site in tdfx.plan(model, QUARTER)}


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            ByValue(inner=nn.Sequential(nn.Linear(4, 4))),
            r"torch\.fx cannot follow its forward at test_passes\.py:\d+ .*TraceError",
        ),
        (Noisy(layer=nn.Linear(4, 4)), "its forward makes tensors that a graph would freeze"),
        (Optional(layer=nn.Linear(4, 4)), "its forward has the optional argument 'mask'"),
    ],
)
def test_a_model_that_a_graph_would_change_keeps_its_class_and_the_plan_says_why(model: nn.Module, why: str) -> None:
    plan = tdfx.plan(model, QUARTER)
    assert plan.emit == "modules"
    (note,) = plan.notes
    assert note.startswith(f"given back as {type(model).__name__}, not as a graph: ")
    assert re.search(why, note), note
    low = tdfx.rewrite(model, QUARTER)
    assert type(low) is type(model)
    assert len(plan.factorized) == 1
    assert any(isinstance(one, tdfx.Factorized) for one in low.modules())


def test_a_model_that_traces_comes_back_as_a_graph_unless_modules_are_asked_for() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    assert isinstance(tdfx.rewrite(model, QUARTER), fx.GraphModule)
    assert type(tdfx.rewrite(model, QUARTER, emit="modules")) is nn.Sequential
    assert tdfx.plan(model, QUARTER).notes == ()


def test_a_block_with_hooks_is_called_as_it_is_so_that_they_run() -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.ReLU())
    model[0].register_forward_hook(lambda *_: seen.append("block"))
    model.get_submodule("0.0").register_forward_hook(lambda *_: seen.append("layer"))
    low = tdfx.rewrite(model, QUARTER)
    low(torch.rand(2, 8))
    assert isinstance(low, fx.GraphModule)
    assert tdfx.plan(model, QUARTER).notes == (
        "the graph calls 1 Sequential as it is: it has hooks, which a graph would not call",
    )
    assert seen == ["layer", "block"]


def test_a_trace_leaves_nothing_on_the_model() -> None:
    for model in (Noisy(layer=nn.Linear(4, 4)), ByValue(inner=nn.Sequential(nn.Linear(4, 4)))):
        before = [sorted(one.__dict__) for one in model.modules()]
        tdfx.plan(model, QUARTER)
        assert [sorted(one.__dict__) for one in model.modules()] == before


def test_every_layer_is_a_site_or_has_its_reason() -> None:
    tied = nn.Linear(8, 8)
    other = nn.Linear(8, 8)
    other.weight = tied.weight
    model = nn.Sequential(
        nn.Linear(8, 8),
        Labelled(8, 8),
        OwnForward(8, 8),
        parametrizations.weight_norm(nn.Linear(8, 8)),
        tied,
        other,
        nn.Linear(8, 8).requires_grad_(False),
        ReadsWeight(layer=nn.Linear(8, 8)),
        nn.LazyLinear(8),
        nn.Unflatten(1, (4, 2)),
        nn.Conv1d(4, 4, 1, groups=4),
        nn.Conv1d(4, 4, 1, groups=2),
        nn.ConvTranspose1d(4, 4, 1),
    )
    model.add_module("unused", Wrapper(layer=nn.Linear(8, 8)))
    model[-1].forward = lambda x: x
    found = {name: site.reason for name, site in sites(model).items()}
    reason = tdfx.Reason
    assert found == {
        "0": None,
        "1": None,
        "2": None,
        "3": reason.PARAMETRIZED,
        "4": reason.TIED,
        "5": reason.TIED,
        "6": reason.FROZEN,
        "7.layer": reason.READ_ELSEWHERE,
        "8": reason.UNINITIALIZED,
        "10": reason.NO_SCHEME,
        "11": None,
        "12": None,
        "unused.layer": reason.NOT_CALLED,
    }


def test_attention_reads_its_projection_and_keeps_it() -> None:
    model = Attending(attention=nn.MultiheadAttention(8, 2, batch_first=True), after=nn.Linear(8, 8))
    found = sites(model)
    assert found["attention.out_proj"].reason is tdfx.Reason.READ_ELSEWHERE
    assert "MultiheadAttention may read its weight" in found["attention.out_proj"].note
    assert found["after"].factorized
    x = torch.rand(2, 3, 8)
    assert tdfx.rewrite(model.eval(), QUARTER)(x).shape == (2, 3, 8)


def test_example_inputs_find_out_what_an_untraced_model_calls() -> None:
    model = ByValue(inner=nn.Linear(4, 4), spare=nn.Linear(4, 4))
    assert {site.name: site.calls for site in tdfx.plan(model, QUARTER)} == {"inner": 1, "spare": 1}
    plan = tdfx.plan(model, QUARTER, example_inputs=torch.rand(2, 4))
    assert plan["inner"].factorized
    assert plan["spare"].reason is tdfx.Reason.NOT_CALLED


@pytest.mark.parametrize(
    "given", [torch.rand(2, 3, 9, 9), (torch.rand(2, 3, 9, 9),), {"input": torch.rand(2, 3, 9, 9)}]
)
def test_flops_follow_the_example_inputs(given: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> None:
    plan = tdfx.plan(nn.Sequential(nn.Conv2d(3, 6, 3, stride=2)), QUARTER, example_inputs=given)
    assert plan.flops_before == 2 * 2 * (6 * 4 * 4) * (3 * 9)
    assert tdfx.plan(nn.Sequential(nn.Conv2d(3, 6, 3)), QUARTER).flops_before is None


def test_example_inputs_move_neither_statistics_nor_the_random_stream() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    state = torch.random.get_rng_state()
    before = {key: one.clone() for key, one in model.state_dict().items()}
    tdfx.plan(model, QUARTER, example_inputs=torch.rand(2, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())
    assert model.training


def test_a_network_with_no_site_is_an_empty_plan() -> None:
    plan = tdfx.plan(nn.Sequential(nn.ReLU()))
    assert len(plan) == 0
    assert "0 of 0 sites factorized" in str(plan)


def test_untrained_weights_are_kept_for_want_of_signal() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    plan = tdfx.plan(model, tdfx.Policy(rank=tdfx.VBMF(), min_gain=0))
    assert {site.reason for site in plan} == {tdfx.Reason.NO_SIGNAL}
    assert "train longer" in plan.sites[0].note


def test_a_site_that_would_not_gain_is_kept_with_the_gain() -> None:
    plan = tdfx.plan(nn.Sequential(nn.Linear(8, 8), nn.Linear(512, 512)), tdfx.Policy(rank=tdfx.Ratio(of=1.0)))
    assert [site.reason for site in plan] == [tdfx.Reason.TOO_SMALL, tdfx.Reason.NO_GAIN]
    for site, ranks in zip(plan, (8, 512), strict=True):
        assert site.gain is not None
        assert site.gain < 1
        assert site.note == f"at ranks {ranks}; 1.05x was asked"


def test_overrides_and_patterns_decide_by_name() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    policy = replace(
        QUARTER, exclude=("1",), overrides={"2": None, "3": tdfx.Policy(rank=tdfx.Fixed({"3": 5}), min_gain=0)}
    )
    found = {site.name: site.ranks or site.reason for site in tdfx.plan(model, policy)}
    assert found == {"0": (8,), "1": tdfx.Reason.EXCLUDED, "2": tdfx.Reason.EXCLUDED, "3": (5,)}


def prepared(model: nn.Module) -> Program:
    return Select(QUARTER)(Find()(Trace()(Program(module=model)).program).program).program


def test_what_a_pass_reports_is_what_it_did() -> None:
    program = prepared(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    result = Rewrite()(program)
    assert [(change.site, change.what) for change in result.changes] == [("0", "Linear -> Factorized")]
    assert [swap.site for swap in result.swaps] == ["0"]


def test_a_pass_can_be_run_twice() -> None:
    program = prepared(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    rewrite = Rewrite()
    first, second = rewrite(program), rewrite(program)
    assert [swap.site for swap in first.swaps] == [swap.site for swap in second.swaps] == ["0"]
    for one, other in zip(first.program.module.parameters(), second.program.module.parameters(), strict=True):
        assert torch.equal(one, other)
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
    program = prepared(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    with pytest.raises(tdfx.PassError, match=message):
        broken(program)


def test_operators_between_sites_stay_in_the_graph() -> None:
    class Doubled(Wrapper):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * 2  # type: ignore[operator, no-any-return]

    graph = tdfx.rewrite(Doubled(layer=nn.Linear(8, 8)), QUARTER)
    assert isinstance(graph, fx.GraphModule)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [operator.mul]
