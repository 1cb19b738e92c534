"""Layer kinds that users register: rewritten, trained, merged and carried in the layout of their own parameter."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.optim import SGD, Adam, Optimizer

import tdfx
from tdfx.kinds import registry
from tdfx.kinds.registry import find_kind, kind_of, register_kind

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0)
LOW = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
# A few products of at most a few hundred terms each, one after the other.
TOLERANCE = 1e4 * torch.finfo(torch.float64).eps
EMITS: tuple[tdfx.Emit, ...] = ("graph", "modules")
every_emit = pytest.mark.parametrize("emit", EMITS)


@pytest.fixture(autouse=True)
def _registry_as_it_was() -> Iterator[None]:
    before = dict(registry._kinds)
    yield
    forget(*(set(registry._kinds) - set(before)))
    registry._kinds.update(before)


def forget(*layers: type[nn.Module] | str) -> None:
    for layer in layers:
        del registry._kinds[layer]
    registry._kind_of_class.cache_clear()


class Projection(nn.Module):
    """A linear map that stores its weight transposed, under other names, and has an attribute for its width."""

    def __init__(self, n_in: int, n_out: int, shift: bool = True) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(n_out)) if shift else None
        self.kernel = nn.Parameter(torch.randn(n_in, n_out))
        self.width = n_out

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.kernel
        return y if self.shift is None else y + self.shift


class ProjectionKind(tdfx.LayerKind):
    layer: ClassVar[type[nn.Module] | str] = Projection
    weight = "kernel"
    bias = "shift"

    def operation(self, layer: nn.Module) -> tdfx.Operation | None:
        n_in, n_out = cast("Tensor", layer.kernel).shape
        return tdfx.Operation(in_channels=n_in, out_channels=n_out)

    def to_dense(self, weight: Tensor) -> Tensor:
        return weight.mT

    def from_dense(self, weight: Tensor) -> Tensor:
        return weight.mT


class Backwards(nn.Module):
    """A convolution that stores its weight as (kernel..., in, out), and has no bias."""

    def __init__(self, n_in: int, n_out: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(*size, n_in, n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filters.permute(3, 2, 0, 1), None, (2, 1), "valid", (1, 2))


class BackwardsKind(tdfx.LayerKind):
    layer = Backwards
    weight = "filters"
    bias = None

    def operation(self, layer: nn.Module) -> tdfx.Operation:
        assert isinstance(layer, Backwards)
        *size, n_in, n_out = layer.filters.shape
        return tdfx.Operation(
            in_channels=n_in, out_channels=n_out, kernel=tuple(size), stride=(2, 1), padding="valid", dilation=(1, 2)
        )

    def to_dense(self, weight: Tensor) -> Tensor:
        return weight.permute(3, 2, 0, 1)

    def from_dense(self, weight: Tensor) -> Tensor:
        return weight.permute(2, 3, 1, 0)


class Net(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(7, 9)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())  # type: ignore[no-any-return]


def nets() -> tuple[Net, Net]:
    """Return a net with a projection, and the same with the linear layer that it is."""
    mine, stock = Net(Projection(9, 5)).double(), Net(nn.Linear(9, 5)).double()
    with torch.no_grad():
        stock.first.load_state_dict(mine.first.state_dict())
        stock.get_parameter("last.weight").copy_(mine.get_parameter("last.kernel").mT)
        stock.get_parameter("last.bias").copy_(mine.get_parameter("last.shift"))
    return mine, stock


def batch(seed: int = 1) -> Tensor:
    return torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(tensor: Tensor, other: Tensor) -> float:
    tensor, other = tensor.detach(), other.detach()
    return float((tensor - other).abs().max() / other.abs().max().clamp_min(1e-30))


def train(model: nn.Module, optimizer: Optimizer) -> None:
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def described(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype, tuple[int, ...]]]:
    return [(key, value.shape, value.dtype, value.stride()) for key, value in model.state_dict().items()]


def test_a_layer_without_a_kind_is_a_site_by_its_parameter() -> None:
    assert [site.name for site in tdfx.plan(Net(Projection(9, 5)), FULL)] == ["first", "last.kernel"]
    register_kind(ProjectionKind)
    plan = tdfx.plan(Net(Projection(9, 5)), FULL, example_inputs=torch.rand(3, 7))
    assert [(site.name, site.kind, site.shape) for site in plan.factorized] == [
        ("first", "Linear", (9, 7)),
        ("last", "Projection", (5, 9)),
    ]
    assert plan["last"].parameter is None
    assert plan["last"].flops_before == 2 * 3 * 9 * 5


@every_emit
@pytest.mark.parametrize("shift", [True, False])
def test_full_rank_changes_nothing_and_low_rank_does(shift: bool, emit: tdfx.Emit) -> None:
    register_kind(ProjectionKind)
    dense = Net(Projection(9, 5, shift)).double()
    results: list[tuple[Tensor, Tensor]] = []
    for model in (dense, tdfx.rewrite(dense, FULL, emit=emit), tdfx.rewrite(dense, LOW, emit=emit)):
        x = batch().requires_grad_()
        output = model(x)
        output.square().sum().backward()
        assert x.grad is not None
        results.append((output, x.grad))
        if model is not dense:
            assert isinstance(model.get_submodule("last"), tdfx.Factorized)
            assert isinstance(model, fx.GraphModule) == (emit == "graph")
            assert sum(key.startswith("last") for key in model.state_dict()) == 2 + shift
    expected, full, low = results
    assert all(distance(value, other) < TOLERANCE for value, other in zip(full, expected, strict=True))
    assert all(distance(value, other) > 1e-2 for value, other in zip(low, expected, strict=True))


def test_the_layers_attributes_can_be_read_from_the_factorized_layer() -> None:
    register_kind(ProjectionKind)
    dense = Projection(9, 5).double()
    factorized: Any = tdfx.rewrite(dense, FULL)
    assert isinstance(factorized, tdfx.Factorized)
    assert factorized.width == 5
    assert factorized.kernel.shape == (9, 5)
    assert distance(factorized.kernel, dense.kernel) < TOLERANCE
    assert distance(factorized.weight, dense.kernel) < TOLERANCE
    assert factorized.shift is dense.shift
    assert "Projection()" in repr(factorized)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = factorized.nothing


@every_emit
def test_merge_restores_the_class_and_the_layout(emit: tdfx.Emit) -> None:
    register_kind(ProjectionKind)
    dense = Net(Projection(9, 5)).double()
    low = tdfx.rewrite(dense, LOW, emit=emit)
    optimizer = SGD(low.parameters(), lr=0.05)
    train(low, optimizer)
    merged = tdfx.merge(low)
    assert type(merged) is Net
    last = merged.get_submodule("last")
    assert type(last) is Projection
    assert last.width == 5
    assert described(merged) == described(dense)
    assert distance(merged(batch()), low(batch())) < TOLERANCE
    fresh = Net(Projection(9, 5)).double()
    fresh.load_state_dict(merged.state_dict(), strict=True)
    assert distance(fresh(batch()), low(batch())) < TOLERANCE
    assert distance(fresh(batch()), dense(batch())) > 1e-2


@every_emit
def test_a_convolution_stored_backwards(emit: tdfx.Emit) -> None:
    register_kind(BackwardsKind)
    dense = nn.Sequential(Backwards(4, 6, (3, 2)), nn.Tanh()).double()
    x = torch.rand(2, 4, 9, 8, dtype=torch.float64)
    plan = tdfx.plan(dense, FULL, example_inputs=x)
    assert [(site.name, site.kind, site.shape, site.scheme) for site in plan] == [
        ("0", "Backwards", (6, 4, 3, 2), "tucker2")
    ]
    assert plan.flops_before == 2 * (2 * 6 * 4 * 6) * (4 * 3 * 2)
    full = tdfx.rewrite(dense, FULL, emit=emit)
    low = tdfx.rewrite(dense, LOW, emit=emit)
    assert distance(full(x), dense(x)) < TOLERANCE
    assert distance(low(x), dense(x)) > 1e-2
    for model in (full, low):
        merged = tdfx.merge(model)
        assert described(merged) == described(dense)
        assert distance(merged(x), model(x)) < TOLERANCE


MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda given: SGD(given, lr=0.02, momentum=0.9),
    "adam": lambda given: Adam(given, lr=1e-2),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_optimizer_state_is_carried_as_for_a_linear_layer(make: Callable[[Any], Optimizer]) -> None:
    register_kind(ProjectionKind)
    pair: list[nn.Module] = list(nets())
    optimizers = [make(model.named_parameters()) for model in pair]
    names = list(optimizers[0].param_groups[0]["param_names"])

    def state(index: int, weight: Any) -> dict[str, Tensor]:
        return cast("dict[str, Tensor]", optimizers[index].state[weight])

    def dense_states_agree() -> None:
        mine = state(0, pair[0].get_parameter("last.kernel"))
        stock = state(1, pair[1].get_parameter("last.weight"))
        assert mine.keys() == stock.keys() != set()
        for key, value in mine.items():
            assert distance(value.mT if value.dim() == 2 else value, stock[key]) < TOLERANCE, key

    for _ in range(2):
        for model, optimizer in zip(pair, optimizers, strict=True):
            train(model, optimizer)
        dense_states_agree()
        pair = [
            tdfx.rewrite(model, LOW, optimizer=optimizer) for model, optimizer in zip(pair, optimizers, strict=True)
        ]
        assert "last.factors.1.bias" in optimizers[0].param_groups[0]["param_names"]
        assert "last.factors.0.weight" in optimizers[0].param_groups[0]["param_names"]
        for mine, stock in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
            assert distance(mine, stock) < TOLERANCE
            assert state(0, mine).keys() == state(1, stock).keys() != set()
            for key, value in state(0, mine).items():
                assert distance(value, state(1, stock)[key]) < TOLERANCE, key
        for model, optimizer in zip(pair, optimizers, strict=True):
            train(model, optimizer)
        pair = [tdfx.merge(model, optimizer=optimizer) for model, optimizer in zip(pair, optimizers, strict=True)]
        dense_states_agree()
        assert optimizers[0].param_groups[0]["param_names"] == names
        assert distance(pair[0].get_parameter("last.kernel").mT, pair[1].get_parameter("last.weight")) < TOLERANCE


class Renamed(Projection):
    """The same forward: a projection."""


class Doubled(Projection):
    """Another forward: none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class HasMore(Projection):
    def __init__(self) -> None:
        super().__init__(5, 5)
        self.extra = nn.Parameter(torch.ones(1))


def test_a_subclass_is_of_the_kind_as_long_as_it_computes_the_same() -> None:
    register_kind(ProjectionKind)
    plan = tdfx.plan(nn.Sequential(Renamed(5, 5), Doubled(5, 5), HasMore()), FULL)
    assert plan["0"].factorized
    assert plan["0"].kind == "Projection"
    assert (plan["1"].kind, plan["1"].parameter) == ("matmul[io]", "1.kernel"), "a product within a forward of its own"
    assert plan["2"].note == "HasMore holds more than a weight and a bias"
    merged = tdfx.merge(tdfx.rewrite(Net(Renamed(9, 5)), FULL))
    assert type(merged.get_submodule("last")) is Renamed


def test_a_layer_with_another_forward_or_call_is_not_of_the_kind() -> None:
    register_kind(ProjectionKind)
    patched, calls = Projection(9, 5), type("Calls", (Projection,), {"__call__": lambda self, x: x})(9, 5)
    patched.__dict__["forward"] = lambda x: x
    for layer in (patched, calls):
        assert not kind_of(layer).is_intact(layer)
    assert kind_of(Projection(9, 5)).is_intact(Projection(9, 5))


class Steps(Projection):
    """Computes its output by a method that a subclass may override."""

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)

    def step(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OtherSteps(Steps):
    def step(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)


def test_every_method_of_the_kind_must_be_the_same() -> None:
    class StepsKind(ProjectionKind):
        layer = Steps
        methods = ("forward", "step")

    register_kind(ProjectionKind)
    register_kind(StepsKind)
    assert tdfx.plan(Net(Steps(9, 5)), FULL)["last"].kind == "Steps"
    assert tdfx.plan(Net(OtherSteps(9, 5)), FULL)["last"].reason is tdfx.Reason.CUSTOM_FORWARD


def test_the_kind_of_the_nearest_class_counts() -> None:
    class DoubledKind(ProjectionKind):
        layer = Doubled

    for kinds in ((ProjectionKind, DoubledKind), (DoubledKind, ProjectionKind)):
        for kind in kinds:
            register_kind(kind)
        assert type(find_kind(Doubled(9, 5))) is DoubledKind
        assert type(find_kind(Projection(9, 5))) is ProjectionKind
        assert type(find_kind(Renamed(9, 5))) is ProjectionKind
        assert find_kind(Net(Doubled(9, 5))) is None
        forget(Projection, Doubled)


def test_a_kind_may_be_for_a_subclass_of_a_stock_layer_with_its_own_forward() -> None:
    class Flipped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight.flip(0), self.bias)

    class FlippedKind(tdfx.LayerKind):
        layer = Flipped

        def operation(self, layer: nn.Module) -> tdfx.Operation:
            assert isinstance(layer, Flipped)
            return tdfx.Operation(in_channels=layer.in_features, out_channels=layer.out_features)

        def to_dense(self, weight: Tensor) -> Tensor:
            return weight.flip(0)

        def from_dense(self, weight: Tensor) -> Tensor:
            return weight.flip(0)

    dense = Net(Flipped(9, 5)).double()
    assert tdfx.plan(dense, FULL)["last"].reason is tdfx.Reason.CUSTOM_FORWARD
    register_kind(FlippedKind)
    full = tdfx.rewrite(dense, FULL)
    assert isinstance(full.get_submodule("last"), tdfx.Factorized)
    assert distance(full(batch()), dense(batch())) < TOLERANCE
    assert distance(tdfx.merge(full).get_parameter("last.weight"), dense.get_parameter("last.weight")) < TOLERANCE


def test_a_class_may_be_named_by_its_dotted_name() -> None:
    class ByName(ProjectionKind):
        layer = f"{__name__}.Projection"

    assert tdfx.register_kind(ByName) is ByName
    (site,) = tdfx.plan(Projection(9, 5), FULL)
    assert site.kind == "Projection"
    assert site.factorized
    assert type(tdfx.merge(tdfx.rewrite(Renamed(9, 5), FULL))) is Renamed
    assert find_kind(nn.Linear(2, 2)) is not find_kind(Projection(9, 5))


def test_registering_again_replaces_the_kind() -> None:
    class Refuses(ProjectionKind):
        def operation(self, layer: nn.Module) -> None:
            return None

    register_kind(ProjectionKind)
    assert tdfx.plan(Projection(9, 5), FULL).sites[0].factorized
    register_kind(Refuses)
    (site,) = tdfx.plan(Projection(9, 5), FULL)
    assert site.reason is tdfx.Reason.NO_SCHEME
    assert site.shape == (9, 5)
    register_kind(ProjectionKind)
    assert tdfx.plan(Projection(9, 5), FULL).sites[0].factorized
    assert [type(kind) for kind in registry._kinds.values()].count(ProjectionKind) == 1


def kind_for(layer: Any) -> type[tdfx.LayerKind]:
    return type("Wrong", (ProjectionKind,), {"layer": layer})


class Unfinished(tdfx.LayerKind):
    def operation(self, layer: nn.Module) -> None:
        return None


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (Projection, r"Projection'> is not a subclass of tdfx\.LayerKind\. Write a class that derives from it\."),
        (ProjectionKind(), r"object at .* is not a subclass of tdfx\.LayerKind"),
        ("Projection", r"'Projection' is not a subclass of tdfx\.LayerKind"),
        (
            Unfinished,
            r"Unfinished\.layer is None, which names no class of layers\. Set it to a subclass of torch\.nn\.M",
        ),
        (
            kind_for("Projection"),
            r"Wrong\.layer is 'Projection', which names no class .* or to its dotted name as text",
        ),
        (kind_for(int), r"Wrong\.layer is <class 'int'>, which names no class"),
        (kind_for(Projection(1, 1)), r"Wrong\.layer is Projection\(\), which names no class"),
        (
            kind_for(nn.Linear),
            r"Wrong is for <class '.*Linear'>, which has a built-in kind\. .* derive a class from it",
        ),
        (
            kind_for("transformers.pytorch_utils.Conv1D"),
            r"Wrong is for 'transformers\.pytorch_utils\.Conv1D', which has a built-in kind",
        ),
    ],
)
def test_invalid_kinds_are_refused(wrong: Any, text: str) -> None:
    before = dict(registry._kinds)
    with pytest.raises(tdfx.KindError, match=text):
        tdfx.register_kind(wrong)
    assert registry._kinds == before
    assert issubclass(tdfx.KindError, TypeError)


def test_a_kind_without_an_operation_is_a_kind_error() -> None:
    wrong = type("Wrong", (tdfx.LayerKind,), {"layer": Projection})
    with pytest.raises(tdfx.KindError, match=r"Wrong does not say what a layer computes: it has no operation\(\)"):
        register_kind(wrong)


def test_a_stock_layer_by_its_dotted_name_has_a_kind_too() -> None:
    with pytest.raises(tdfx.KindError, match="which has a built-in kind"):
        register_kind(kind_for("torch.nn.modules.linear.Linear"))


class NoTranspose(ProjectionKind):
    def to_dense(self, weight: Tensor) -> Tensor:
        return weight


class NoWayBack(ProjectionKind):
    def from_dense(self, weight: Tensor) -> Tensor:
        return weight


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            NoTranspose,
            r"NoTranspose says that a Projection computes Operation\(in_channels=9, out_channels=5.*, whose weight has the "
            r"shape \(5, 9\); its to_dense gives \(9, 5\) for a parameter of shape \(9, 5\), and from_dense gives \(5, 9\) "
            r"back\. Correct the kind\.",
        ),
        (
            NoWayBack,
            r"its to_dense gives \(5, 9\) for a parameter of shape \(9, 5\), and from_dense gives \(5, 9\) back",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_any_change(kind: type[tdfx.LayerKind], text: str) -> None:
    register_kind(kind)
    model = Net(Projection(9, 5))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for action in (tdfx.plan, tdfx.rewrite):
        with pytest.raises(tdfx.KindError, match=text):
            cast("Any", action)(model, FULL)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


BAD_OPERATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "one": ({"kernel": (3, 3), "padding": 1}, r"padding=1\) is not a tuple .* Pass for example padding=\(1, 1\)"),
    "number": ({"kernel": 3}, r"Operation\(kernel=3\) is not a tuple of whole numbers"),
    "channels": ({"in_channels": 0}, r"Operation\(in_channels=0\) is not a whole number of at least 1"),
    "groups": ({"groups": 3}, r"Operation\(groups=3\) does not divide in_channels=4 and out_channels=8"),
    "taps": (
        {"kernel": (3.0,)},
        r"Operation\(kernel=\(3\.0,\)\) is not a tuple of whole numbers of at least 1, one for",
    ),
    "stride": (
        {"kernel": (3, 3), "stride": (0, 1)},
        r"stride=\(0, 1\)\) is not a tuple .* Pass for example stride=",
    ),
    "dims": (
        {"kernel": (3,), "stride": (1, 1)},
        r"stride=\(1, 1\)\) does not go with kernel=\(3,\): it needs one number",
    ),
    "linear": ({"stride": (1, 1)}, r"does not go with kernel=\(\): .* its 0 dimensions\. Leave it out for the default"),
    "padding": ({"kernel": (3,), "padding": "sme"}, r"padding='sme'\) is not a tuple of whole numbers of at least 0"),
    "mode": (
        {"kernel": (3,), "padding_mode": "x"},
        r"padding_mode='x'\) is not one of zeros, reflect, replicate, circular",
    ),
}


@pytest.mark.parametrize("case", BAD_OPERATIONS)
def test_an_operation_that_cannot_be_is_refused(case: str) -> None:
    settings, text = BAD_OPERATIONS[case]
    with pytest.raises(tdfx.KindError, match=text):
        tdfx.Operation(**{"in_channels": 4, "out_channels": 8, **settings})


def test_an_operation_has_defaults_for_each_dimension() -> None:
    pointwise = tdfx.Operation(in_channels=4, out_channels=8, kernel=(1, 1))
    assert pointwise == tdfx.Operation.pointwise(4, 8, dims=2)
    assert (pointwise.stride, pointwise.padding, pointwise.dilation) == ((1, 1), (0, 0), (1, 1))
    assert tdfx.Operation(in_channels=4, out_channels=8, kernel=(3, 3), padding=(1, 1), stride=(2, 2)).out_size(
        (8, 8)
    ) == (4, 4)


class Pointwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oi,nihw->nohw", self.weight, x)


class PointwiseKind(tdfx.LayerKind):
    layer = Pointwise
    bias = None

    def operation(self, layer: nn.Module) -> tdfx.Operation:
        return tdfx.Operation(in_channels=6, out_channels=8, kernel=(1, 1))

    def to_dense(self, weight: Tensor) -> Tensor:
        return weight[..., None, None]

    def from_dense(self, weight: Tensor) -> Tensor:
        return weight[..., 0, 0]


def test_a_kind_may_leave_out_what_its_operation_does_not_need() -> None:
    tdfx.register_kind(PointwiseKind)
    try:
        model, x = nn.Sequential(Pointwise()).double(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
        assert distance(tdfx.rewrite(model, FULL, example_inputs=(x,))(x), model(x)) < TOLERANCE
        low = tdfx.rewrite(model, LOW)
        assert distance(tdfx.merge(low)(x), low(x)) < TOLERANCE
        kind = type("Texts", (PointwiseKind,), {"operation": lambda self, layer: "a map"})
        tdfx.register_kind(kind)
        with pytest.raises(tdfx.KindError, match=r"Texts\.operation returned 'a map', which is no tdfx\.Operation"):
            tdfx.plan(model, FULL)
    finally:
        forget(Pointwise)


def test_a_kind_that_is_missing_at_the_merge() -> None:
    register_kind(ProjectionKind)
    model = Net(Projection(9, 5)).double()
    optimizer = SGD(model.parameters(), lr=0.1)
    low = tdfx.rewrite(model, LOW, optimizer=optimizer)
    packed, held = pickle.dumps(low), list(map(id, optimizer.param_groups[0]["params"]))
    forget(Projection)
    text = "No layer kind is registered for Projection, but one was when the model was rewritten. Import the code that"
    with pytest.raises(tdfx.KindError, match=text):
        tdfx.merge(low, optimizer=optimizer)
    assert list(map(id, optimizer.param_groups[0]["params"])) == held
    # What does not need the kind goes on without it: loading, copying, computing.
    unpickled = copy.deepcopy(pickle.loads(packed))
    assert distance(unpickled(batch()), low(batch())) == 0
    register_kind(ProjectionKind)
    assert described(tdfx.merge(unpickled)) == described(model)


def test_the_compiler_reads_the_names_of_the_kind() -> None:
    register_kind(ProjectionKind)
    layer = Projection(9, 5)
    layer.kernel.requires_grad_(False)
    assert tdfx.plan(layer, FULL).sites[0].reason is tdfx.Reason.FROZEN
    tied = nn.Sequential(Projection(9, 9), Projection(9, 9))
    tied[1].kernel = tied[0].kernel
    assert {site.reason for site in tdfx.plan(tied, FULL)} == {tdfx.Reason.TIED}
    frozen_shift = Projection(9, 5)
    assert frozen_shift.shift is not None
    frozen_shift.shift.requires_grad_(False)
    merged = tdfx.merge(tdfx.rewrite(frozen_shift, FULL))
    assert [parameter.requires_grad for parameter in merged.parameters()] == [False, True]


class StandIn(nn.Module):
    """What Hugging Face's Conv1D does, for where transformers is not installed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def huggingface_layer(real: bool) -> type[nn.Module]:
    if not real:
        named = {"__module__": "transformers.pytorch_utils", "__qualname__": "Conv1D"}
        return type("Conv1D", (StandIn,), {**named, "forward": StandIn.forward})
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    return cast("type[nn.Module]", utils.Conv1D)


@pytest.mark.parametrize("real", [False, True], ids=["stand-in", "transformers"])
def test_the_layer_of_transformers_has_a_kind(real: bool) -> None:
    kind: Any = huggingface_layer(real)
    dense = Net(kind(6, 9)).double()
    plan = tdfx.plan(dense, FULL)
    assert [(site.name, site.kind, site.shape) for site in plan.factorized] == [
        ("first", "Linear", (9, 7)),
        ("last", "Conv1D", (6, 9)),
    ]
    x = batch()[None]
    full, low = tdfx.rewrite(dense, FULL), tdfx.rewrite(dense, LOW)
    assert distance(full(x), dense(x)) < TOLERANCE
    assert distance(low(x), dense(x)) > 1e-2
    merged = tdfx.merge(low)
    assert type(merged.get_submodule("last")) is kind
    assert described(merged) == described(dense)
    assert distance(merged(x), low(x)) < TOLERANCE


def test_nothing_of_transformers_is_imported_for_it() -> None:
    before = "transformers" in sys.modules
    assert isinstance(tdfx.rewrite(cast("Any", huggingface_layer(False))(6, 9), FULL), tdfx.Factorized)
    assert ("transformers" in sys.modules) == before


class CalledByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = Projection(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x=x) if x.sum() > -1e9 else x


def test_a_layer_called_with_a_keyword_argument() -> None:
    tdfx.register_kind(ProjectionKind)
    model = CalledByName().double()
    x = torch.rand(3, 8, dtype=torch.float64)
    plan = tdfx.plan(model, FULL, example_inputs=x)
    assert plan["projection"].flops_before == 2 * 3 * 64
    assert float((tdfx.rewrite(model, plan)(x) - model(x)).detach().abs().max()) < 1e-12
