"""Parameters that a model passes to F.linear and F.conv* itself: how they are factorized, trained, merged, or kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.checkpoint import checkpoint
from torchvision.models import SwinTransformer

import tdfx
from tdfx.kinds.functional import parse_call
from tdfx.layers.parameter import FactorizedParameter

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0)
LOW = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)
EPS = torch.finfo(torch.float64).eps
# A chain of d layers rounds about d times, and a product of n terms, a few hundred at most, rounds about sqrt(n) times.
TOLERANCE = 1e5 * EPS
EMITS: tuple[tdfx.Emit, ...] = ("graph", "modules")
every_emit = pytest.mark.parametrize("emit", EMITS)


def new(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64) / max(1, shape[-1]))


class Direct(nn.Module):
    """Has weights and other parameters in turns in one module; a bias is a parameter, None, or computed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = new(3, 1, 1)
        self.stem = new(8, 3, 3, 3)
        self.stem_bias = new(8)
        self.gain = new(1)
        self.wide = new(8, 8, 3, 1)
        self.point = new(6, 8, 1, 1)
        self.line = new(6, 6, 3)
        self.head = new(5, 6)
        self.head_bias = new(5)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x * self.scale, self.stem, self.stem_bias, 2, padding=1).tanh()
        x = F.conv2d(x, self.wide, padding="same", dilation=(2, 1)).tanh()
        x = self.drop(F.conv2d(x, self.point, None, stride=(1, 2), padding=(1, 0))).flatten(2)
        x = F.conv1d(x, self.line, self.gain * torch.ones_like(self.head_bias).sum() * self.line.shape[0] * ones(x), 2)
        return F.linear(x.mean(2), weight=self.head, bias=self.head_bias)


def ones(x: Tensor) -> Tensor:
    """Return six ones, as a bias that the graph computes."""
    return x.mean((0, 2)) * 0 + 1


class Hidden(Direct):
    """The same, with code that torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else super().forward(x)


class WithTail(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Linear(5, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(super().forward(x))  # type: ignore[no-any-return]


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias).tanh()


fx.wrap("project")


class Wrapped(nn.Module):
    """Passes its weight to a function that torch.fx does not trace into."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(9, 9).double()
        self.head = nn.Linear(9, 5, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(project(x.flatten(1, 2), self.mix.weight, self.mix.bias).mean(1))  # type: ignore[no-any-return]


class Listed(nn.Module):
    """Has weights in ParameterList and ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList([new(6, 3, 3, 3), new(6, 6, 3, 3)])
        self.heads = nn.ParameterDict({"a": new(5, 6), "a_bias": new(5), "b": new(5, 6)})

    def forward(self, x: Tensor) -> Tensor:
        for kernel in self.kernels:
            x = F.conv2d(x, kernel, padding=1).tanh()
        x = x.mean((2, 3))
        return F.linear(x, self.heads["a"], self.heads["a_bias"]) * F.linear(x, self.heads["b"])


class OwnForward(nn.Conv2d):
    """A convolution that centers its input, and calls F.conv2d itself."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input - input.mean(), self.weight, self.bias, self.stride, self.padding)


class Layers(nn.Module):
    """Passes parameters of layers to functions, in the layer itself and in its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = OwnForward(3, 8, 3, stride=2, padding=1).double()
        self.qkv = nn.Linear(8, 12).double()
        self.head = nn.Linear(12, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.stem(x).flatten(2).mT, self.qkv.weight, self.qkv.bias)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class Volumes(nn.Module):
    """Uses the same weight in two calls with different strides."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = new(4, 4, 2, 2, 2)
        self.lift = new(4, 1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv3d(x[:, None], self.lift)
        x = F.conv3d(x, self.kernel, stride=(1, 2, 2)).tanh()
        return F.conv3d(x, self.kernel, dilation=(1, 2, 1), padding=(1, 1, 0)).mean((2, 3, 4))


NETS: dict[str, Callable[[], nn.Module]] = {
    net.__name__: net for net in (Direct, Hidden, Wrapped, Listed, Layers, Volumes)
}
PARAMETERS = {
    "Direct": {"stem", "wide", "point", "line", "head"},
    "Hidden": {"stem", "wide", "point", "line", "head"},
    "Wrapped": {"mix.weight"},
    "Listed": {"kernels.0", "kernels.1", "heads.a", "heads.b"},
    "Layers": {"stem.weight", "qkv.weight"},
    "Volumes": {"kernel", "lift"},
}
NEEDS_A_RUN = ("Hidden", "Wrapped")
every_net = pytest.mark.parametrize("name", NETS)


def inputs() -> Tensor:
    return torch.rand(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def distance(value: Tensor, other: Tensor) -> float:
    value, other = value.detach(), other.detach()
    return float((value - other).abs().max() / other.abs().max().clamp_min(1e-30))


def run(model: nn.Module, mode: bool, x: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and the gradients of the parameters and of the input, from a copy."""
    copied = copy.deepcopy(model).train(mode)
    torch.manual_seed(11)
    given = (inputs() if x is None else x.clone()).requires_grad_()
    output = copied(given)
    output.square().sum().backward()
    assert given.grad is not None
    gradients = {name: parameter.grad for name, parameter in copied.named_parameters() if parameter.grad is not None}
    return output.detach(), {**gradients, "(input)": given.grad}


def factorized_parameters(model: nn.Module) -> dict[str, FactorizedParameter]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorizedParameter)}


def rewritten(model: nn.Module, policy: tdfx.Policy = FULL, **settings: Any) -> nn.Module:
    return tdfx.rewrite(model, policy, example_inputs=inputs(), **settings)


def entries_of(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]


@every_net
def test_sites_are_named_by_the_parameter_or_the_layer_that_holds_it(name: str) -> None:
    model = NETS[name]()
    plan = tdfx.plan(model, FULL, example_inputs=inputs())
    functional = {site.parameter: site for site in plan if site.parameter is not None}
    assert set(functional) == PARAMETERS[name]
    assert all(site.factorized for site in plan)
    for parameter, site in functional.items():
        layer, _, last = str(parameter).rpartition(".")
        holds = last == "weight" and name in {"Layers", "Wrapped"}
        assert site.name == (layer if holds else parameter)
        assert site.kind.startswith("F.") != holds
        assert site.shape == tuple(model.get_parameter(str(parameter)).shape)
        assert site.flops_before is not None
        assert site.flops_before > 0
    assert len({site.name for site in plan}) == len(plan)


@every_net
def test_some_sites_are_seen_in_a_run_alone(name: str) -> None:
    parameters = {site.parameter for site in tdfx.plan(NETS[name](), FULL).factorized}
    assert parameters & PARAMETERS[name] == (set() if name in NEEDS_A_RUN else PARAMETERS[name])


def test_a_layer_that_is_seen_in_a_run_alone_is_kept_without_a_run() -> None:
    plan = tdfx.plan(Wrapped(), FULL)
    assert plan["mix"].reason is tdfx.Reason.READ_ELSEWHERE
    assert plan["head"].factorized


def test_sites_are_in_the_order_of_modules_and_parameters() -> None:
    for model in (Direct(), Hidden()):
        plan = tdfx.plan(model, FULL, example_inputs=inputs())
        assert [site.name for site in plan] == ["stem", "wide", "point", "line", "head"]
    plan = tdfx.plan(Wrapped(), FULL, example_inputs=inputs())
    assert [site.name for site in plan] == ["mix", "head"]
    plan = tdfx.plan(WithTail(), FULL, example_inputs=inputs())
    assert [site.name for site in plan] == ["stem", "wide", "point", "line", "head", "tail"]


@every_emit
@every_net
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_full_rank_changes_nothing(name: str, emit: tdfx.Emit, mode: bool) -> None:
    dense = NETS[name]()
    full = rewritten(dense, emit=emit)
    assert set(factorized_parameters(full)) == PARAMETERS[name]
    assert isinstance(full, fx.GraphModule) == (emit == "graph" and name != "Hidden")
    expected, dense_gradients = run(dense, mode)
    output, gradients = run(full, mode)
    assert distance(output, expected) < TOLERANCE
    for key in dense_gradients.keys() & gradients.keys():
        assert distance(gradients[key], dense_gradients[key]) < TOLERANCE, key
    for path, parameter in factorized_parameters(full).items():
        # By the chain rule, the factors' gradients follow from the gradient of the joined weight.
        parameter.weight.backward(dense_gradients[path])  # type: ignore[no-untyped-call]
        for index, weight in enumerate(parameter.weights):
            assert weight.grad is not None
            assert distance(gradients[f"{path}.factors.{index}.weight"], weight.grad) < TOLERANCE, path


@every_emit
@every_net
def test_low_rank_changes_the_output(name: str, emit: tdfx.Emit) -> None:
    dense = NETS[name]()
    assert distance(run(rewritten(dense, LOW, emit=emit), False)[0], run(dense, False)[0]) > 1e-3


@every_emit
@every_net
def test_the_factors_are_called_and_never_joined(name: str, emit: tdfx.Emit, monkeypatch: pytest.MonkeyPatch) -> None:
    low = rewritten(NETS[name](), LOW, emit=emit)
    expected = run(low, False)[0]
    kinds = {type(module.scheme) for module in low.modules() if isinstance(module, tdfx.Factorized)}
    for kind in kinds:
        monkeypatch.setattr(kind, "join", lambda *_: pytest.fail("the weight was joined"))
    assert distance(run(low, False)[0], expected) == 0


@every_emit
@every_net
def test_merge_restores_the_names_and_keeps_the_outputs(name: str, emit: tdfx.Emit) -> None:
    dense = NETS[name]()
    low = rewritten(dense, LOW, emit=emit)
    optimizer = SGD(low.parameters(), lr=1e-2)
    low(inputs()).square().mean().backward()
    optimizer.step()
    merged = tdfx.merge(low)
    assert type(merged) is type(dense)
    assert entries_of(merged) == entries_of(dense)
    assert [key for key, _ in merged.named_parameters()] == [key for key, _ in dense.named_parameters()]
    for mode in (True, False):
        assert distance(run(merged, mode)[0], run(low, mode)[0]) < TOLERANCE
    fresh = NETS[name]()
    fresh.load_state_dict(merged.state_dict(), strict=True)
    assert distance(run(fresh, False)[0], run(merged, False)[0]) == 0
    assert distance(run(fresh, False)[0], run(dense, False)[0]) > 1e-3


@every_emit
@pytest.mark.parametrize("keep", [(), ("stem",), ("head", "wide"), ("point", "line")])
def test_merge_restores_the_order_of_parameters_in_a_module(keep: tuple[str, ...], emit: tdfx.Emit) -> None:
    dense = Direct()
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, exclude=keep)
    low = tdfx.rewrite(dense, policy, emit=emit)
    assert set(factorized_parameters(low)) == PARAMETERS["Direct"] - set(keep)
    low.register_parameter("added", new(2))
    merged = tdfx.merge(low)
    # A parameter that was added later goes to the end.
    assert [name for name, _ in merged.named_parameters()] == [*(name for name, _ in dense.named_parameters()), "added"]
    shared = {id(parameter) for parameter in dense.parameters()} & {id(parameter) for parameter in merged.parameters()}
    assert shared == {
        id(parameter) for name, parameter in dense.named_parameters() if name not in factorized_parameters(low)
    }


def test_the_factors_have_keys_below_their_parameter() -> None:
    keys = list(rewritten(Layers(), LOW).state_dict())
    assert keys == [
        "stem.bias",
        *(f"stem.weight.factors.{index}.weight" for index in range(3)),
        "qkv.bias",
        *(f"qkv.weight.factors.{index}.weight" for index in range(2)),
        *(f"head.factors.{index}.weight" for index in range(2)),
        "head.factors.1.bias",
    ]


@every_emit
def test_the_model_passed_in_is_not_changed(emit: tdfx.Emit) -> None:
    dense = Layers()
    before = [(name, id(parameter), parameter.detach().clone()) for name, parameter in dense.named_parameters()]
    attributes = dense.stem.__dict__.keys()
    low = rewritten(dense, LOW, emit=emit)
    low(inputs())
    tdfx.merge(low)
    after = [(name, id(parameter), parameter.detach()) for name, parameter in dense.named_parameters()]
    assert [entry[:2] for entry in before] == [entry[:2] for entry in after]
    assert all(torch.equal(entry[2], other[2]) for entry, other in zip(before, after, strict=True))
    assert dense.stem.__dict__.keys() == attributes
    assert set(factorized_parameters(low)) == PARAMETERS["Layers"]


class AsLayers(nn.Module):
    """Computes the same as ``Functional`` with layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, bias=False).double()
        self.fc = nn.Linear(6, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).tanh().mean((2, 3)))  # type: ignore[no-any-return]


class Functional(nn.Module):
    def __init__(self, like: AsLayers) -> None:
        super().__init__()
        self.conv = nn.Parameter(like.conv.weight.detach().clone())
        self.fc = nn.Parameter(like.fc.weight.detach().clone())
        self.bias = nn.Parameter(like.fc.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.conv2d(x, self.conv, stride=2).tanh().mean((2, 3)), self.fc, self.bias)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=1e-2),
}


def states(optimizer: Optimizer, model: nn.Module, sites: tuple[str, ...] = ("conv", "fc")) -> dict[str, Tensor]:
    """Return the optimizer's tensors for each weight, or for each factor of it."""
    tensors: dict[str, Tensor] = {}
    for name in sites:
        layer: Any = getattr(model, name)
        weights = (
            layer.weights
            if isinstance(layer, tdfx.Factorized)
            else [layer if isinstance(layer, Tensor) else layer.weight]
        )
        for index, weight in enumerate(weights):
            tensors |= {f"{name}.{index}.{key}": value.clone() for key, value in optimizer.state[weight].items()}
    return tensors


@pytest.mark.parametrize("of", [0.5, 1.0])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@every_emit
def test_optimizer_state_is_carried_as_for_a_layer_with_the_same_weight(
    make: Callable[[Any], Optimizer], of: float, emit: tdfx.Emit
) -> None:
    layers = AsLayers()
    pair: list[nn.Module] = [layers, Functional(layers)]
    optimizers = [make(model.parameters()) for model in pair]
    policy = tdfx.Policy(rank=tdfx.Ratio(of=of), min_gain=0, round_to=1)

    def check_states() -> None:
        expected, carried = (states(optimizer, model) for optimizer, model in zip(optimizers, pair, strict=True))
        assert expected.keys() == carried.keys()
        for key, value in expected.items():
            assert value.shape == carried[key].shape
            assert (value - carried[key]).norm() <= TOLERANCE * value.norm(), key
        assert any(float(value.norm()) > 0 for value in expected.values())

    for _ in range(2):
        for model, optimizer in zip(pair, optimizers, strict=True):
            train(model, optimizer)
        check_states()
        pair = [
            tdfx.rewrite(model, policy, optimizer=optimizer, emit=emit, carry_state=True)
            for model, optimizer in zip(pair, optimizers, strict=True)
        ]
        assert len(factorized_parameters(pair[1])) == 2
        check_states()
        for model, optimizer in zip(pair, optimizers, strict=True):
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            assert held == {id(parameter) for parameter in model.parameters()}
            train(model, optimizer)
        check_states()
        assert distance(pair[1](inputs()), pair[0](inputs())) < TOLERANCE
        pair = [tdfx.merge(model, optimizer=optimizer) for model, optimizer in zip(pair, optimizers, strict=True)]
        check_states()
    assert all(
        {id(parameter) for parameter in optimizers[1].state} <= {id(parameter) for parameter in pair[1].parameters()}
        for _ in pair
    )


@every_net
def test_parameter_names_in_an_optimizer_follow_a_rewrite_and_a_merge(name: str) -> None:
    dense = NETS[name]()
    optimizer = SGD(dense.named_parameters(), lr=0.01, momentum=0.9)
    before = list(optimizer.param_groups[0]["param_names"])

    def check_names(model: nn.Module) -> None:
        (group,) = optimizer.param_groups
        names = {id(parameter): key for key, parameter in model.named_parameters()}
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]

    low = rewritten(dense, LOW, optimizer=optimizer)
    check_names(low)
    first = min(PARAMETERS[name])
    assert f"{first}.factors.0.weight" in optimizer.param_groups[0]["param_names"]
    check_names(merged := tdfx.merge(low, optimizer=optimizer))
    assert optimizer.param_groups[0]["param_names"] == before
    assert [key for key, _ in merged.named_parameters()] == before


class Calls(nn.Module):
    """Passes its kernel to functions that the test chooses."""

    def __init__(self, weight: nn.Parameter, calls: list[tuple[Callable[..., Tensor], dict[str, Any]]]) -> None:
        super().__init__()
        self.kernel = weight
        self.offset = new(weight.shape[0])
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        outputs = [
            function(x, self.kernel, **(named | ({"bias": self.offset} if "bias" in named else {})))
            for function, named in self.calls
        ]
        return torch.cat([output.flatten() for output in outputs])


GEOMETRIES: dict[str, dict[str, Any]] = {
    "stride": {"stride": 2},
    "list": {"stride": [2, 1], "padding": [1, 2]},
    "a tuple of one value": {"stride": (2,), "padding": (1,)},
    "dilation": {"dilation": (1, 2), "padding": 1},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid", "stride": 2},
}


@every_emit
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 1, 1)], ids=["tucker2", "svd"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_every_call_keeps_its_stride_padding_and_dilation(
    geometry: dict[str, Any], shape: tuple[int, ...], emit: tdfx.Emit
) -> None:
    x = torch.rand(2, 4, 9, 8, dtype=torch.float64)
    dense = Calls(new(*shape), [(F.conv2d, geometry), (F.conv2d, {}), (F.conv2d, {"stride": 3, "bias": True})])
    plan = tdfx.plan(dense, FULL, example_inputs=x, emit=emit)
    assert plan["kernel"].calls == 3
    assert plan["kernel"].scheme == ("tucker2" if shape[-1] > 1 else "svd")
    full = tdfx.rewrite(dense, plan)
    assert distance(run(full, True, x)[0], run(dense, True, x)[0]) < TOLERANCE
    low = tdfx.rewrite(dense, LOW, emit=emit)
    assert distance(run(low, True, x)[0], run(dense, True, x)[0]) > 1e-3


def flops(x: Tensor, kernel: Tensor, calls: list[dict[str, Any]]) -> int:
    """Count a multiplication and an addition for each tap and each output value."""
    return 2 * sum(F.conv2d(x, kernel, **named).numel() for named in calls) * kernel[0].numel()


def test_flops_are_those_of_all_calls() -> None:
    x = torch.rand(2, 4, 9, 8, dtype=torch.float64)
    named = {"stride": 2, "padding": 1}
    dense = Calls(new(6, 4, 3, 3), [(F.conv2d, named), (F.conv2d, named)])
    assert tdfx.plan(dense, FULL, example_inputs=x).flops_before == flops(x, dense.kernel, [named, named])


def test_flops_of_calls_with_other_strides() -> None:
    x = torch.rand(2, 4, 9, 8, dtype=torch.float64)
    dense = Calls(new(6, 4, 3, 3), [(F.conv2d, {}), (F.conv2d, {"stride": 3})])
    assert tdfx.plan(dense, FULL, example_inputs=x).flops_before == flops(x, dense.kernel, [{}, {"stride": 3}])


@every_emit
def test_a_call_that_the_scheme_does_not_support_gets_the_joined_weight(emit: tdfx.Emit) -> None:
    dense = Calls(new(8, 2, 3, 3), [(F.conv2d, {})])
    full = tdfx.rewrite(dense, FULL, emit="modules")
    x = torch.rand(2, 4, 9, 9, dtype=torch.float64)
    assert isinstance(full, Calls)
    full.calls = [(F.conv2d, {"groups": 2})]
    assert distance(full(x), F.conv2d(x, dense.kernel, groups=2).flatten()) < TOLERANCE
    both = Calls(new(8, 2, 3, 3), [(F.conv2d, {}), (grouped, {})])
    x = torch.rand(2, 2, 9, 9, dtype=torch.float64)
    assert tdfx.plan(both, FULL)["kernel"].factorized
    assert distance(run(tdfx.rewrite(both, FULL, emit=emit), True, x)[0], run(both, True, x)[0]) < TOLERANCE


def grouped(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(torch.cat([x, 2 * x], 1), kernel, groups=2)


def test_a_kernel_may_also_be_used_by_a_transposed_convolution() -> None:
    dense = Calls(new(4, 4, 3, 3), [(F.conv2d, {}), (F.conv_transpose2d, {})])
    x = torch.rand(2, 4, 5, 5, dtype=torch.float64)
    for emit in EMITS:
        assert distance(tdfx.rewrite(dense, FULL, emit=emit)(x), dense(x)) < TOLERANCE


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize(
    ("shape", "function", "settings"),
    [
        ((4, 6, 3, 3), F.conv_transpose2d, {"stride": 2, "padding": 1, "output_padding": 1}),
        ((4, 3, 3, 3), F.conv_transpose2d, {"groups": 2}),
        ((8, 2, 3, 3), F.conv2d, {"groups": 2, "padding": 1}),
    ],
    ids=["transposed", "transposed in groups", "groups"],
)
def test_transposed_and_grouped_calls(
    shape: tuple[int, ...], function: Callable[..., Tensor], settings: Any, emit: tdfx.Emit
) -> None:
    dense = Calls(new(*shape), [(function, settings)])
    x = torch.rand(2, 4, 6, 4, dtype=torch.float64)
    plan = tdfx.plan(dense, FULL, emit=emit)
    again = tdfx.rewrite(dense, tdfx.Plan.from_json(plan.to_json()))
    assert plan["kernel"].scheme == "tucker2"
    assert distance(again(x), dense(x)) < TOLERANCE
    low = tdfx.rewrite(dense, LOW, emit=emit)
    assert distance(low(x), dense(x)) > 1e-3
    merged = tdfx.merge(low)
    assert distance(merged(x), low(x)) < TOLERANCE
    assert merged.get_parameter("kernel").shape == shape


@pytest.mark.parametrize(
    ("shape", "function", "settings"),
    [((4, 1, 3, 3), F.conv2d, {"groups": 4}), ((4,), F.linear, {})],
    ids=["depthwise", "a vector"],
)
def test_a_weight_without_a_scheme_is_kept(
    shape: tuple[int, ...], function: Callable[..., Tensor], settings: Any
) -> None:
    dense = Calls(new(*shape), [(function, settings)])
    x = torch.rand(2, 4, 6, 4, dtype=torch.float64)
    for given in (None, x):
        plan = tdfx.plan(dense, FULL, example_inputs=given)
        assert {site.name: site.reason for site in plan} == {"kernel": tdfx.Reason.NO_SCHEME}
    assert distance(tdfx.rewrite(dense, FULL)(x), dense(x)) == 0


class Reads(nn.Module):
    """Also reads its weight in a way that the test chooses, in one mode or in both."""

    def __init__(self, read: Callable[[Tensor], Any], seen: bool, modes: tuple[bool, ...] = (True, False)) -> None:
        super().__init__()
        self.weight = new(6, 9)
        self.read = read
        self.seen = seen
        self.modes = modes

    def forward(self, x: Tensor) -> Tensor:
        if not self.seen and x.sum() > 1e9:
            return x
        y = F.linear(x, self.weight)
        for mode in self.modes:
            if mode == bool(self.training):
                y = y + 0 * torch.as_tensor(self.read(self.weight)).sum() if self.seen else y + self.read(self.weight)
        return y


def metadata(weight: Tensor) -> int:
    return len(weight.shape) + weight.shape[0] + weight.size(1) + weight.ndim + weight.dim() + weight.numel()


READS: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda weight: weight.norm(),
    "product": lambda weight: (weight * 2).sum(),
    "reflected": lambda weight: (2 * weight).sum(),
    "cast": lambda weight: weight.to(torch.float32).sum(),
    "detached": lambda weight: weight.detach().sum(),
    "data": lambda weight: weight.data.sum(),
    "transposed": lambda weight: weight.mT.sum(),
    "indexed": lambda weight: weight[0, 0],
    "as a bias": lambda weight: F.linear(weight[0], weight),
    "as an input": lambda weight: F.linear(weight, torch.ones(1, 9, dtype=torch.float64)).sum(),
    "in a list": lambda weight: torch.stack([weight, weight]).sum(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_weight_that_is_also_read_is_kept(read: Callable[[Tensor], Any]) -> None:
    x = torch.rand(2, 9, dtype=torch.float64)
    for modes in ((True, False), (True,), (False,)):
        plan = tdfx.plan(Reads(read, seen=False, modes=modes), FULL, example_inputs=x)
        assert {site.name: site.reason for site in plan} == {"weight": tdfx.Reason.READ_ELSEWHERE}, modes


@pytest.mark.parametrize("name", [name for name in READS if name not in {"as an input", "as a bias"}])
def test_a_graph_shows_reads_without_a_run(name: str) -> None:
    model = ReadsInGraph(READS[name])
    for given in (None, torch.rand(2, 9, dtype=torch.float64)):
        (site,) = tdfx.plan(model, FULL, example_inputs=given)
        assert site.reason is tdfx.Reason.READ_ELSEWHERE
        assert site.note == "forward reads its weight without calling it"
    (site,) = tdfx.plan(ReadsInGraph(lambda weight: 0.0), FULL)
    assert site.factorized


class ReadsInGraph(nn.Module):
    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight = new(6, 9)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.read(self.weight)  # type: ignore[no-any-return]


def test_reading_a_shape_does_not_keep_a_weight() -> None:
    x = torch.rand(2, 9, dtype=torch.float64)
    for model in (Reads(metadata, seen=False), ReadsInGraph(metadata)):
        plan = tdfx.plan(model, FULL, example_inputs=x)
        assert plan["weight"].factorized
        for emit in EMITS:
            full = tdfx.rewrite(model, FULL, example_inputs=x, emit=emit)
            assert distance(run(full, True, x)[0], run(model, True, x)[0]) < TOLERANCE


def test_a_model_that_fails_in_train_mode_keeps_sites_that_are_seen_in_a_run_alone() -> None:
    class NeedsABatch(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and len(x) < 2:
                raise ValueError("a batch of one")
            return super().forward(x)

    plan = tdfx.plan(NeedsABatch(), FULL, example_inputs=inputs()[:1])
    assert {site.reason for site in plan} == {tdfx.Reason.READ_ELSEWHERE}
    assert plan["stem"].note == "in train mode the model does not run on the example inputs: ValueError"
    assert len(tdfx.plan(NeedsABatch(), FULL, example_inputs=inputs()).factorized) == 5


def test_tied_and_frozen_parameters_keep_their_reason() -> None:
    for kind, settings in ((Direct, {}), (Hidden, {"example_inputs": inputs()})):
        model = kind()
        model.stem.requires_grad_(False)
        model.register_module("other", nn.Module())
        model.get_submodule("other").register_parameter("weight", model.head)
        plan = tdfx.plan(model, FULL, **cast("Any", settings))
        assert plan["stem"].reason is tdfx.Reason.FROZEN
        assert plan["head"].reason is tdfx.Reason.TIED
        assert plan["head"].note == "2 modules hold its weight"
        # A tied parameter is listed once, under its first name.
        assert [site.name for site in plan] == ["stem", "wide", "point", "line", "head"]
        assert [site.name for site in plan.factorized] == ["wide", "point", "line"]


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 9).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(x, self.layer.weight)  # type: ignore[no-any-return]


def test_a_layer_that_is_also_called_is_not_a_functional_site() -> None:
    for given in (None, torch.rand(2, 9, dtype=torch.float64)):
        (site,) = tdfx.plan(Both(), FULL, example_inputs=given)
        assert (site.reason, site.parameter) == (tdfx.Reason.READ_ELSEWHERE, None)
        assert site.note == "forward reads its weight besides calling it"


class Elsewhere(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(*[x.flatten(1)[:, None, :8]] * 3)[0]
        return super().forward(x) + y.mean()  # type: ignore[no-any-return]


def test_parameters_that_attention_of_torch_uses_are_functional_sites() -> None:
    plan = tdfx.plan(Elsewhere(), FULL, example_inputs=inputs())
    assert plan["attention.in_proj_weight"].parameter == "attention.in_proj_weight"
    assert plan["attention.out_proj"].parameter == "attention.out_proj.weight"
    assert len(plan.factorized) == 5 + 2


class Checkpointed(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    dense = Checkpointed()
    full = rewritten(dense)
    assert set(factorized_parameters(full)) == PARAMETERS["Direct"]
    (output, gradients), (expected, dense_gradients) = run(full, True), run(dense, True)
    assert distance(output, expected) < TOLERANCE
    assert distance(gradients["(input)"], dense_gradients["(input)"]) < TOLERANCE


@every_net
def test_a_plan_from_json_needs_no_example_inputs(name: str) -> None:
    dense = NETS[name]()
    plan = tdfx.plan(dense, LOW, example_inputs=inputs())
    read = tdfx.Plan.from_json(plan.to_json())
    assert read == plan
    direct, other = rewritten(dense, LOW), tdfx.rewrite(copy.deepcopy(dense), read)
    assert type(direct) is type(other) or isinstance(direct, fx.GraphModule) == isinstance(other, fx.GraphModule)
    assert list(direct.state_dict()) == list(other.state_dict())
    for left, right in zip(direct.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
    assert distance(run(other, True)[0], run(direct, True)[0]) == 0
    assert entries_of(tdfx.merge(other)) == entries_of(dense)


@every_net
@every_emit
def test_rewriting_twice_is_rewriting_once(name: str, emit: tdfx.Emit) -> None:
    plan = tdfx.plan(dense := NETS[name](), LOW, example_inputs=inputs(), emit=emit)
    once = tdfx.rewrite(dense, plan)
    twice = tdfx.rewrite(once, plan)
    assert [id(parameter) for parameter in twice.parameters()] == [id(parameter) for parameter in once.parameters()]
    assert distance(run(twice, True)[0], run(once, True)[0]) == 0
    assert entries_of(tdfx.merge(twice)) == entries_of(dense)
    for given in (None, inputs()):
        again = tdfx.plan(once, LOW, example_inputs=given)
        assert {site.name: site.reason for site in again} == dict.fromkeys(
            [site.name for site in plan], tdfx.Reason.FACTORIZED
        )
        assert {site.parameter for site in again} == {site.parameter for site in plan}
        for site, planned in zip(sorted(again, key=by_name), sorted(plan, key=by_name), strict=True):
            # Without a run, the calls inside a function that torch.fx does not trace into cannot be counted.
            assert site.calls == planned.calls or (given is None and name == "Wrapped")
            assert site.parameters_before == planned.parameters_after


def by_name(site: tdfx.SitePlan) -> str:
    return site.name


def test_a_plan_of_another_model_is_refused() -> None:
    plan = tdfx.plan(Direct(), LOW)
    other = Direct()
    other.stem = new(9, 3, 3, 3)
    with pytest.raises(tdfx.PlanError, match=r"F\.conv2d of shape \(8, 3, 3, 3\) .* site 'stem', .*\(9, 3, 3, 3\)"):
        tdfx.rewrite(other, plan)
    with pytest.raises(tdfx.PlanError, match="names site 'stem', which Volumes does not have"):
        tdfx.rewrite(Volumes(), plan)
    # A parameter that the plan keeps may be invisible without example inputs.
    kept = tdfx.plan(Hidden(), tdfx.Policy(exclude=("*",)), example_inputs=inputs())
    assert tdfx.rewrite(Hidden(), kept)(inputs()).shape == (4, 5)
    read = ReadsInGraph(READS["norm"])
    (site,) = tdfx.plan(ReadsInGraph(lambda weight: 0.0), LOW)
    assert site.factorized
    assert tdfx.plan(read, LOW)["weight"].reason is tdfx.Reason.READ_ELSEWHERE


@every_emit
@every_net
def test_copies_pickles_and_saved_weights(name: str, emit: tdfx.Emit, tmp_path: Path) -> None:
    low = rewritten(NETS[name](), LOW, emit=emit)
    expected = run(low, True)[0]
    twins = [copy.deepcopy(low), copy.copy(low), pickle.loads(pickle.dumps(low))]
    for twin in twins:
        assert isinstance(twin, NETS[name])  # type: ignore[arg-type]
        assert list(twin.state_dict()) == list(low.state_dict())
        assert distance(run(twin, True)[0], expected) == 0
        assert list(tdfx.merge(twin).state_dict()) == list(NETS[name]().state_dict())
    assert not {id(parameter) for parameter in twins[0].parameters()} & {
        id(parameter) for parameter in low.parameters()
    }
    torch.save(low.state_dict(), tmp_path / "weights.pt")
    other = rewritten(NETS[name](), LOW, emit=emit)
    assert distance(run(other, True)[0], expected) > 1e-3
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    assert distance(run(other, True)[0], expected) == 0


COMPILED = ("Direct", "Listed", "Layers")


@every_emit
@pytest.mark.parametrize("name", COMPILED)
def test_the_result_compiles_as_one_graph(name: str, emit: tdfx.Emit) -> None:
    low = rewritten(NETS[name](), LOW, emit=emit).eval()
    torch._dynamo.reset()
    compiled = cast("nn.Module", torch.compile(low, fullgraph=True, backend="eager"))
    output = compiled(inputs())
    assert distance(output, low(inputs())) < TOLERANCE
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in low.parameters())


def test_compiling_gives_no_warning() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.warn_once_cache.clear()
    low = rewritten(Direct(), LOW)
    torch.compile(low, fullgraph=True, backend="eager")(inputs())


@every_emit
@pytest.mark.parametrize("name", COMPILED)
def test_the_result_exports(name: str, emit: tdfx.Emit) -> None:
    low = rewritten(NETS[name](), LOW, emit=emit).eval()
    exported: Any = torch.export.export(low, (inputs(),)).module()
    assert distance(exported(inputs()), low(inputs())) < TOLERANCE


def test_other_functions_get_the_joined_weight() -> None:
    dense = Direct()
    full = factorized_parameters(tdfx.rewrite(dense, FULL))["head"]
    weight: Any = full
    expected = dense.head.detach()
    assert weight.shape == expected.shape
    assert weight.dtype is torch.float64
    assert weight.device == expected.device
    assert weight.requires_grad
    assert (weight.ndim, weight.dim(), weight.size(1), weight.numel()) == (2, 2, 6, 30)
    pairs = {
        "function": (torch.linalg.matrix_norm(weight), torch.linalg.matrix_norm(expected)),
        "method": (weight.norm(), expected.norm()),
        "list": (torch.cat([weight, weight]), torch.cat([expected, expected])),
        "by name": (torch.sum(input=weight, dim=0), expected.sum(0)),
        "linear": (F.linear(torch.eye(6, dtype=torch.float64), weight), expected.mT),
        "as input": (F.linear(weight, expected), expected @ expected.mT),
        "as bias": (F.linear(expected, expected, weight @ expected.mT), expected @ expected.mT * 2),
    }
    for key, (value, wanted) in pairs.items():
        assert distance(value, wanted) < TOLERANCE, key
    with pytest.raises(AttributeError, match="'FactorizedParameter' object has no attribute 'nothing'"):
        _ = weight.nothing
    found_gradients = torch.autograd.grad(weight.norm(), full.weights)
    assert all(bool(gradient.abs().max() > 0) for gradient in found_gradients)


def test_a_tiny_swin() -> None:
    """Swin's attention passes weights to a function that torch.fx does not trace into."""
    dense = SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[2], num_heads=[2], window_size=[2, 2], num_classes=5
    ).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    without_run = tdfx.plan(dense, FULL)
    assert {site.name for site in without_run.kept} == {
        f"features.1.{block}.attn.{layer}" for block in range(2) for layer in ("qkv", "proj")
    }
    plan = tdfx.plan(dense, FULL, example_inputs=x)
    assert plan.kept == ()
    assert plan["features.1.0.attn.qkv"].parameter == "features.1.0.attn.qkv.weight"
    low = tdfx.rewrite(dense, LOW, example_inputs=x)
    for emit in EMITS:
        full = tdfx.rewrite(dense, FULL, example_inputs=x, emit=emit)
        assert isinstance(full, fx.GraphModule) == (emit == "graph")
        for mode in (True, False):
            assert distance(run(full, mode, x)[0], run(dense, mode, x)[0]) < TOLERANCE
        assert entries_of(tdfx.merge(full)) == entries_of(dense)
    assert distance(run(low, False, x)[0], run(dense, False, x)[0]) > 1e-3


def test_calls_are_parsed_by_the_signatures_of_the_functions() -> None:
    call = parse_call(F.conv_transpose2d, ("x", "w", None, 2, 1, 0, 3, 4), {})
    assert call is not None
    assert (call.name, call.dims, call.transposed, call.weight) == ("F.conv_transpose2d", 2, True, "w")
    assert call.rest == {
        "input": "x", "bias": None, "stride": 2, "padding": 1, "output_padding": 0, "groups": 3, "dilation": 4
    }  # fmt: skip
    assert call.operation((6, 4, 3, 3)) == tdfx.Operation(
        in_channels=6,
        out_channels=12,
        kernel=(3, 3),
        stride=(2, 2),
        padding=(1, 1),
        dilation=(4, 4),
        groups=3,
        transposed=True,
        output_padding=(0, 0),
    )
    named = parse_call(F.conv1d, (), {"input": "x", "weight": "w", "dilation": 2})
    assert named is not None
    operation = named.operation((4, 6, 3))
    assert operation == tdfx.Operation(
        in_channels=6, out_channels=4, kernel=(3,), stride=(1,), padding=(0,), dilation=(2,)
    )
    assert parse_call(F.relu, ("x",), {}) is None
    assert parse_call([], (), {}) is None


@pytest.mark.parametrize(
    ("named", "shape"),
    [
        ({"stride": fx.Graph().placeholder("n")}, (4, 6, 3, 3)),
        ({"padding": (1, fx.Graph().placeholder("n"))}, (4, 6, 3, 3)),
        ({"groups": fx.Graph().placeholder("n")}, (4, 6, 3, 3)),
        ({"stride": (1, 2, 3)}, (4, 6, 3, 3)),
        ({}, (4, 6, 3)),
    ],
)
def test_a_call_with_computed_settings_has_no_operation(named: dict[str, Any], shape: tuple[int, ...]) -> None:
    call = parse_call(F.conv2d, ("x", "w"), named)
    assert call is not None
    assert call.operation(shape) is None


OPERATORS: dict[str, Callable[[Any], Any]] = {
    "product": lambda weight: weight * 2,
    "reflected": lambda weight: 2 - weight,
    "power": lambda weight: weight**2,
    "negative": lambda weight: -weight,
    "index": lambda weight: weight[0, 1:],
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_operators_get_the_joined_weight(operator: Callable[[Any], Any]) -> None:
    dense = Direct()
    full = factorized_parameters(tdfx.rewrite(dense, FULL))["head"]
    assert distance(operator(full), operator(dense.head.detach())) < TOLERANCE


def test_the_model_is_run_in_both_modes_whatever_its_own_mode() -> None:
    x = torch.rand(1, 9, dtype=torch.float64)
    only_in_train = Reads(READS["norm"], seen=False, modes=(True,))
    for mode in (True, False):
        (site,) = tdfx.plan(only_in_train.train(mode), FULL, example_inputs=x)
        assert site.reason is tdfx.Reason.READ_ELSEWHERE
        assert only_in_train.training is mode
    # In train mode the norm refuses a batch of one sample.
    model = nn.Sequential(ReadsInGraph(lambda weight: 0.0), nn.BatchNorm1d(6).double())
    assert tdfx.plan(model.train(), FULL, example_inputs=x)["0.weight"].factorized


class InOneMode(nn.Module):
    """Has another graph for each mode; the second weight is used in train mode alone."""

    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body = new(9, 9)
        self.auxiliary = new(4, 9)
        self.read = read

    def forward(self, x: Tensor) -> Any:
        y = F.linear(x, self.body).tanh()
        return (y, F.linear(y, self.auxiliary), self.read(self.auxiliary)) if self.training else y


def test_both_graphs_call_the_factors() -> None:
    x = torch.rand(2, 9, dtype=torch.float64)
    dense = InOneMode(lambda weight: 0.0)
    full = tdfx.rewrite(dense, FULL)
    assert isinstance(full, fx.GraphModule)
    assert {site.name: site.calls for site in tdfx.plan(dense, FULL)} == {"body": 1, "auxiliary": 1}
    for mode in (True, False):
        called = {node.target for node in full.train(mode).graph.nodes if node.op == "call_module"}
        assert called == ({"body", "auxiliary"} if mode else {"body"})
        pairs = zip(full(x), dense.train(mode)(x), strict=True)
        assert all(
            distance(torch.as_tensor(output), torch.as_tensor(expected)) < TOLERANCE for output, expected in pairs
        )
    kept = tdfx.plan(InOneMode(READS["norm"]), FULL)
    assert kept["auxiliary"].reason is tdfx.Reason.READ_ELSEWHERE
    assert kept["body"].factorized


@every_emit
def test_parameters_rewritten_in_two_steps_merge_in_their_order(emit: tdfx.Emit) -> None:
    dense = Direct()
    first = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, exclude=("stem", "head"))
    full = tdfx.rewrite(tdfx.rewrite(dense, first, emit=emit), FULL, emit=emit)
    assert set(factorized_parameters(full)) == PARAMETERS["Direct"]
    assert distance(run(full, True)[0], run(dense, True)[0]) < TOLERANCE
    assert entries_of(tdfx.merge(full)) == entries_of(dense)


class TiedEmbedding(nn.Module):
    """A language model that uses its embedding table for its output too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6).double()
        self.mix = new(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.table(x), self.mix), self.table.weight)


@pytest.mark.parametrize("given", [pytest.param(None, id="without a run"), torch.tensor([1, 2])])
def test_a_weight_of_an_embedding_is_kept(given: Tensor | None) -> None:
    plan = tdfx.plan(TiedEmbedding(), FULL, example_inputs=given)
    assert plan["table.weight"].reason is tdfx.Reason.READ_ELSEWHERE
    assert plan["mix"].factorized


def test_a_plan_is_checked_against_the_model_as_it_is_now() -> None:
    plan = tdfx.plan(Hidden(), LOW, example_inputs=inputs())
    tied, frozen, broken = Hidden(), Hidden(), Hidden()
    tied.register_module("other", nn.Module())
    tied.get_submodule("other").register_parameter("weight", tied.head)
    frozen.head.requires_grad_(False)
    with torch.no_grad():
        broken.head[0, 0] = float("nan")
    for model, reason in ((tied, "tied"), (frozen, "frozen")):
        with pytest.raises(tdfx.PlanError, match=f"factorizes site 'head', which must be kept: {reason}"):
            tdfx.rewrite(model, plan)
    with pytest.raises(tdfx.WeightError, match="weight of site 'head' has 1 values that are NaN"):
        tdfx.rewrite(broken, plan)


def test_functional_calls_of_torch_func_take_the_factors() -> None:
    low = rewritten(Layers(), LOW)
    given = {name: 2 * parameter.detach() for name, parameter in low.named_parameters()}
    output = torch.func.functional_call(low, given, (inputs(),))
    twin = copy.deepcopy(low)
    twin.load_state_dict(given)
    assert distance(output, twin(inputs())) == 0
    assert distance(output, low(inputs())) > 1e-3


@every_emit
def test_hooks_of_a_layer_whose_parameter_is_factorized_run(emit: tdfx.Emit) -> None:
    dense = Layers()
    dense.stem.register_forward_hook(lambda _, __, output: output.abs())
    full = rewritten(dense, emit=emit)
    assert set(factorized_parameters(full)) == PARAMETERS["Layers"]
    assert distance(run(full, True)[0], run(dense, True)[0]) < TOLERANCE
    assert distance(run(dense, True)[0], run(rewritten(Layers()), True)[0]) > 1e-3


def test_dtypes_change_with_the_model() -> None:
    low = rewritten(Direct(), LOW).to(torch.float32)
    assert low(inputs().float()).dtype is torch.float32
    assert {parameter.dtype for parameter in tdfx.merge(low).parameters()} == {torch.float32}
    half = Direct().to(torch.bfloat16)
    merged = tdfx.merge(tdfx.rewrite(half, FULL))
    assert entries_of(merged) == entries_of(half)
    # Each factor is rounded once to the dtype; a product of three of them is off by a few units in the last place.
    for parameter, expected in zip(merged.parameters(), half.parameters(), strict=True):
        assert distance(parameter.double(), expected.double()) < 30 * torch.finfo(torch.bfloat16).eps


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Direct()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2  # type: ignore[no-any-return]


def test_a_block_that_is_called_is_traced_by_itself() -> None:
    dense = Parent()
    dense.inner.register_forward_hook(lambda _, __, output: output.abs())
    plan = tdfx.plan(dense, FULL)
    assert len(plan.notes) == 1
    assert {site.parameter: site.calls for site in plan.factorized} == {
        f"inner.{name}": 1 for name in PARAMETERS["Direct"]
    }
    full = tdfx.rewrite(dense, FULL)
    assert isinstance(full, fx.GraphModule)
    assert distance(run(full, True)[0], run(dense, True)[0]) < TOLERANCE


class CallsTwice(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner(2 * x)  # type: ignore[no-any-return]


def test_sites_in_a_block_count_every_call_of_the_block() -> None:
    for given in (None, inputs()):
        dense = CallsTwice()
        dense.inner.register_forward_hook(lambda _, __, output: output.abs())
        plan = tdfx.plan(dense, FULL, example_inputs=given)
        assert {site.calls for site in plan} == {2}
        assert len(plan.factorized) == 5


@pytest.mark.parametrize("seen", [True, False], ids=["in a graph", "in a run"])
def test_a_weight_that_is_also_the_input_of_a_call_is_kept(seen: bool) -> None:
    model: Any = ReadsInGraph(lambda weight: 0.0) if seen else Reads(lambda weight: 0.0, seen=False)
    model.weight = new(9, 9)
    x = torch.rand(2, 9, dtype=torch.float64)
    assert tdfx.plan(model, FULL, example_inputs=x)["weight"].factorized
    model.read = lambda weight: F.linear(weight, weight).sum()
    assert tdfx.plan(model, FULL, example_inputs=x)["weight"].reason is tdfx.Reason.READ_ELSEWHERE
    if seen:
        assert tdfx.plan(model, FULL)["weight"].reason is tdfx.Reason.READ_ELSEWHERE
