"""What is traced, which sites there are and why they are kept, and what flows."""

from __future__ import annotations

import operator
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import tdfx

QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)


class Wrapper(nn.Module):
    """Holds some modules; a subclass defines the forward."""

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
        (Noisy(layer=nn.Linear(4, 4)), "its forward (makes tensors that a graph would freeze|calls randn)"),
        (Optional(layer=nn.Linear(4, 4)), "its forward asks whether mask is"),
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
    assert any(isinstance(module, tdfx.Factorized) for module in low.modules())


def test_a_model_that_traces_comes_back_as_a_graph_unless_modules_are_asked_for() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    assert isinstance(tdfx.rewrite(model, QUARTER), fx.GraphModule)
    assert type(tdfx.rewrite(model, QUARTER, emit="modules")) is nn.Sequential
    assert tdfx.plan(model, QUARTER).notes == ()


def test_a_block_with_hooks_is_called_as_it_is_so_that_they_run() -> None:
    calls: list[str] = []
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.ReLU())
    model[0].register_forward_hook(lambda *_: calls.append("block"))
    model.get_submodule("0.0").register_forward_hook(lambda *_: calls.append("layer"))
    low = tdfx.rewrite(model, QUARTER)
    low(torch.rand(2, 8))
    assert isinstance(low, fx.GraphModule)
    assert tdfx.plan(model, QUARTER).notes == (
        "the graph calls 1 Sequential as it is: it has hooks, which a graph would not call",
    )
    assert calls == ["layer", "block"]


def test_a_trace_leaves_nothing_on_the_model() -> None:
    for model in (Noisy(layer=nn.Linear(4, 4)), ByValue(inner=nn.Sequential(nn.Linear(4, 4)))):
        attributes = [sorted(module.__dict__) for module in model.modules()]
        tdfx.plan(model, QUARTER)
        assert [sorted(module.__dict__) for module in model.modules()] == attributes


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
    reason = tdfx.Reason
    assert {name: site.reason for name, site in sites(model).items()} == {
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


def test_a_recurrent_layer_may_read_the_weights_inside_it() -> None:
    model = Attending(attention=nn.MultiheadAttention(8, 2, batch_first=True), after=nn.Linear(8, 8))
    assert all(site.factorized for site in sites(model).values())
    plan = tdfx.plan(nn.Sequential(nn.RNN(8, 8), nn.Linear(8, 8)), QUARTER)
    assert [site.reason for site in plan] == [tdfx.Reason.READ_ELSEWHERE] * 2 + [None]
    assert plan["0.weight_ih_l0"].note == "RNN may read its weight without calling it"


def test_example_inputs_show_what_an_untraced_model_calls() -> None:
    model = ByValue(inner=nn.Linear(4, 4), spare=nn.Linear(4, 4))
    assert {site.name: site.calls for site in tdfx.plan(model, QUARTER)} == {"inner": 1, "spare": 1}
    plan = tdfx.plan(model, QUARTER, example_inputs=torch.rand(2, 4))
    assert plan["inner"].factorized
    assert plan["spare"].reason is tdfx.Reason.NOT_CALLED


@pytest.mark.parametrize(
    "inputs", [torch.rand(2, 3, 9, 9), (torch.rand(2, 3, 9, 9),), {"input": torch.rand(2, 3, 9, 9)}]
)
def test_flops_follow_the_example_inputs(inputs: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> None:
    plan = tdfx.plan(nn.Sequential(nn.Conv2d(3, 6, 3, stride=2)), QUARTER, example_inputs=inputs)
    assert plan.flops_before == 2 * 2 * (6 * 4 * 4) * (3 * 9)
    assert tdfx.plan(nn.Sequential(nn.Conv2d(3, 6, 3)), QUARTER).flops_before is None


def test_example_inputs_change_neither_statistics_nor_the_random_generator() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    state = torch.random.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tdfx.plan(model, QUARTER, example_inputs=torch.rand(2, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


def test_the_plan_of_a_network_without_sites_is_empty() -> None:
    plan = tdfx.plan(nn.Sequential(nn.ReLU()))
    assert len(plan) == 0
    assert "0 of 0 sites factorized" in str(plan)


def test_untrained_weights_are_kept_because_they_show_no_signal() -> None:
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
    decisions = {site.name: site.ranks or site.reason for site in tdfx.plan(model, policy)}
    assert decisions == {"0": (8,), "1": tdfx.Reason.EXCLUDED, "2": tdfx.Reason.EXCLUDED, "3": (5,)}


def test_operators_between_sites_stay_in_the_graph() -> None:
    class Doubled(Wrapper):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * 2  # type: ignore[operator, no-any-return]

    graph = tdfx.rewrite(Doubled(layer=nn.Linear(8, 8)), QUARTER)
    assert isinstance(graph, fx.GraphModule)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [operator.mul]
