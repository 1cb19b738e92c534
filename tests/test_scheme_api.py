"""Every scheme through the public API: rewritten at full rank, merged, in each dtype, and in calls with more arguments."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tdfx
from tdfx.cost.count import Flow, flops
from tdfx.factors.operation import Operation
from tdfx.factors.registry import scheme_names
from tdfx.kinds.registry import operation_of

EPS = torch.finfo(torch.float64).eps
NAMES = [*scheme_names(), "channel", "tucker2:refine=2"]


class Calls(nn.Module):
    """One layer, called with whatever stands after the input."""

    def __init__(self, layer: nn.Module, *extra: Any, **named: Any) -> None:
        super().__init__()
        self.layer, self.extra, self.named = layer, extra, named

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, *self.extra, **self.named)
        return y


class SkipSize(nn.Module):
    """A step of a U-Net: down, and up again to the size before."""

    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x), output_size=x.size())  # type: ignore[no-any-return]


class Functional(nn.Module):
    """A parameter that two calls take as their weight, with different strides."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 2, 3, 3))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv_transpose2d(x, self.kernel, self.bias, 2, 1, 1, groups=2)
        z = F.conv_transpose2d(x, self.kernel, padding=1, groups=2, dilation=1)
        return y.mean((2, 3)) + z.mean((2, 3))


def largest(values: Tensor) -> float:
    return float(values.detach().abs().max())


def policy(scheme: str = "auto", of: float = 1.0) -> tdfx.Policy:
    return tdfx.Policy(scheme=scheme, rank=tdfx.Ratio(of=of), min_gain=0, round_to=1)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=2, bias=False),
        nn.Tanh(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv2d(6, 4, 1, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_full_rank_and_merge(name: str, emit: Any) -> None:
    model, x = net().double(), torch.randn(3, 4, 8, 8, dtype=torch.float64)
    small = tdfx.rewrite(model, policy(name), emit=emit)
    plan = tdfx.plan(small)
    changed = [site for site in plan if site.reason is tdfx.Reason.FACTORIZED]
    assert len(changed) >= (2 if name == "svd" else 3)
    expected = model(x)
    scale = 1e5 * EPS * largest(expected)
    assert largest(small(x) - expected) <= scale
    merged = tdfx.merge(small)
    assert list(merged.state_dict()) == list(model.state_dict())
    assert type(merged) is type(model)
    assert largest(merged(x) - expected) <= scale
    low = tdfx.rewrite(model, policy(name, of=0.3), emit=emit)
    assert largest(low(x) - expected) > 1e6 * scale
    assert largest(tdfx.merge(low)(x) - low(x)) <= scale


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_names_the_scheme_and_survives_json(name: str) -> None:
    plan = tdfx.plan(net(), policy(name, of=0.5))
    schemes = {site.scheme for site in plan.factorized}
    assert schemes == {"tucker1_out" if name == "channel" else name}
    assert tdfx.Plan.from_json(plan.to_json()) == plan
    kept = [site for site in plan.kept if site.reason is tdfx.Reason.NO_SCHEME]
    assert all(f"{name} does not stand for" in site.note for site in kept)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "svd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    layer = nn.Conv2d(6, 8, 3, padding=1, groups=2).to(dtype)
    x = torch.randn(2, 6, 5, 5, dtype=dtype)
    small = tdfx.rewrite(layer, policy(name))
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    out = small(x)
    assert out.dtype == dtype
    # Each of two to four factors rounds, and so does what passes between them.
    assert largest(out - layer(x)) <= 16 * torch.finfo(dtype).eps * largest(layer(x))
    merged = tdfx.merge(small)
    assert largest(merged.weight - layer.weight) <= 16 * torch.finfo(dtype).eps  # type: ignore[operator]


def test_complex_weights_are_kept() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, dtype=torch.complex64), nn.Flatten(), nn.Linear(4, 4, dtype=torch.complex64)
    )
    for site in tdfx.plan(model, policy()):
        assert site.reason is tdfx.Reason.NO_SCHEME
        assert "with a torch.complex64 weight" in site.note


def test_auto_keeps_depthwise_layers_and_rewrites_the_rest() -> None:
    plan = tdfx.plan(net(), policy())
    assert [site.scheme or site.reason for site in plan] == ["tucker2", "tucker2", "tucker2", "no_scheme", "svd", "svd"]
    assert plan["6"].note == "no scheme stands for a 3×3 kernel in 6 groups"
    assert (plan["5"].groups, plan["5"].transposed, plan["5"].shape) == (2, True, (8, 3, 3, 3))


def test_ranks_are_rounded_so_that_their_channels_are_a_multiple() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, groups=4), nn.Conv2d(64, 64, 3, groups=3 + 13))
    wish = tdfx.Policy(rank=tdfx.Ratio(of=0.2), min_gain=0, round_to=8)
    assert [site.ranks for site in tdfx.plan(model, wish)] == [(4, 4), (1, 1)]
    wish = tdfx.Policy(rank=tdfx.Ratio(of=0.2), min_gain=0, round_to=8, scheme="depthwise")
    assert [site.ranks for site in tdfx.plan(model, wish)] == [(2,), (1,)]


UP = {
    "2d": (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1), (2, 6, 5, 4), (10, 7)),
    "2d, stride 3": (
        nn.ConvTranspose2d(6, 4, (3, 2), stride=(3, 2), dilation=(1, 2), groups=2),
        (2, 6, 5, 4),
        (16, 10),
    ),
    "1d": (nn.ConvTranspose1d(6, 4, 4, stride=3), (2, 6, 5), (17,)),
    "3d": (nn.ConvTranspose3d(6, 4, (3, 1, 2), stride=(2, 2, 1), padding=(1, 0, 0)), (1, 6, 3, 4, 3), (6, 8, 4)),
}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "svd"])
@pytest.mark.parametrize("case", UP)
def test_output_size_goes_to_the_factor_that_strides(name: str, case: str) -> None:
    layer, shape, size = copy.deepcopy(UP[case])
    x = torch.randn(shape, dtype=torch.float64)
    layer.double()
    if name == "spatial" and case == "1d":
        return
    for extra in ((list(size),), ((*shape[:2], *size),)):
        model = Calls(layer, *extra)
        expected = model(x)
        assert tuple(expected.shape[2:]) == size
        small = tdfx.rewrite(model, policy(name))
        assert any(isinstance(module, tdfx.Factorized) for module in small.modules())
        assert largest(small(x) - expected) <= 1e5 * EPS * largest(expected)
    with pytest.raises(ValueError, match="requested an output size"):
        tdfx.rewrite(Calls(layer, [1000] * len(size)), policy(name))(x)


def test_output_size_from_a_skip_in_a_graph() -> None:
    model = SkipSize(nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1)).double()
    small = tdfx.rewrite(model, policy())
    assert isinstance(small, fx.GraphModule)
    for size in ((9, 8), (10, 11)):
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        assert largest(small(x) - model(x)) <= 1e5 * EPS * largest(model(x))
        assert largest(tdfx.merge(small)(x) - model(x)) <= 1e5 * EPS * largest(model(x))


def test_only_transposed_convolutions_take_an_output_size() -> None:
    small: Any = tdfx.rewrite(nn.Conv2d(4, 4, 3), policy(), emit="modules")
    with pytest.raises(TypeError, match="Conv2d takes no output_size: only transposed convolutions do"):
        small(torch.randn(1, 4, 5, 5), [3, 3])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_parameter_of_transposed_calls(name: str, emit: Any) -> None:
    if name == "svd":
        return
    model, x = Functional().double(), torch.randn(2, 6, 5, 4, dtype=torch.float64)
    expected = model(x)
    plan = tdfx.plan(model, policy(name), example_inputs=x, emit=emit)
    assert plan["kernel"].factorized
    assert (plan["kernel"].groups, plan["kernel"].transposed) == (2, True)
    for small in (tdfx.rewrite(model, plan), tdfx.rewrite(model, policy(name), emit=emit)):
        assert largest(small(x) - expected) <= 1e5 * EPS * largest(expected)
        merged: Any = tdfx.merge(small)
        assert merged.kernel.shape == model.kernel.shape
        assert largest(merged.kernel - model.kernel) <= 1e4 * EPS


@pytest.mark.parametrize(
    ("name", "optimizer_class"), [("tucker2", torch.optim.SGD), *((name, torch.optim.AdamW) for name in NAMES)]
)
def test_the_optimizers_state_is_carried_over(name: str, optimizer_class: Any) -> None:
    model = net().double()
    settings = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizer = optimizer_class(model.parameters(), lr=0.01, **settings)

    def step(model: nn.Module) -> None:
        x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model)
    small = tdfx.rewrite(model, policy(name, of=0.25), optimizer=optimizer)
    step(small)
    merged = tdfx.merge(small, optimizer=optimizer)
    step(merged)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in merged.parameters())
    states = [optimizer.state[parameter] for parameter in merged.parameters()]
    assert all(bool(torch.isfinite(v).all()) for state in states for v in state.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_flops_equal_torchs_count(groups: int, transposed: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    kind: Any = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(4, 6, (3, 2), stride=(2, 3), padding=1, groups=groups, bias=False)
    x = torch.randn(2, 4, 7, 9)
    with FlopCounterMode(display=False) as counter:
        out = layer(x)
    operation = operation_of(layer)
    assert isinstance(operation, Operation)
    assert operation.out_size((7, 9)) == tuple(out.shape[2:])
    if groups == 1:  # torch counts every group as if it saw all channels
        assert flops([operation], Flow(2, (7, 9))) == counter.get_total_flops()
    values = out.numel() if not transposed else x.numel()
    assert flops([operation], Flow(2, (7, 9))) == 2 * values * layer.weight[0].numel()
