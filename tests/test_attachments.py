"""What a rewrite preserves of a model: hooks, flags, buffers, formats, attributes, outputs, and blocks that graphs call."""

from __future__ import annotations

import copy
import re
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.checkpoint import checkpoint

import tdfx

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0)
LOW = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)
EPS = torch.finfo(torch.float64).eps
# Rounding of a few products of eight terms each, in sequence.
TOLERANCE = 1e4 * EPS
EMITS: tuple[tdfx.Emit, ...] = ("graph", "modules")
every_emit = pytest.mark.parametrize("emit", EMITS)


def batch() -> Tensor:
    return torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def distance(value: Tensor, other: Tensor) -> float:
    value, other = value.detach(), other.detach()
    return float((value - other).abs().max() / other.abs().max().clamp_min(1e-30))


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and the gradients of the parameters and of the input, from a seeded run of a copy."""
    copied = copy.deepcopy(model)
    torch.manual_seed(3)
    x = batch().requires_grad_()
    output = copied(x)
    gradients: dict[str, Tensor] = {}
    if output.requires_grad:
        output.square().sum().backward()
        gradients = {
            name: parameter.grad for name, parameter in copied.named_parameters() if parameter.grad is not None
        }
    if x.grad is not None:
        gradients["(input)"] = x.grad
    return output, gradients


def check_same_run(rewritten: nn.Module, dense: nn.Module, tolerance: float = TOLERANCE) -> None:
    """Compare outputs and gradients of a model at full rank with the original's."""
    (output, gradients), (expected, dense_gradients) = run(rewritten), run(dense)
    assert distance(output, expected) <= tolerance
    assert output.requires_grad == expected.requires_grad
    kept = {key for key in dense_gradients if key in dict(rewritten.named_parameters()) or key == "(input)"}
    assert kept <= gradients.keys()
    for key in gradients.keys() & dense_gradients.keys():
        assert distance(gradients[key], dense_gradients[key]) <= tolerance, key


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.layer(x)).tanh()  # type: ignore[no-any-return]


class Net(nn.Module):
    """Has two blocks, persistent and other buffers, an attribute, a method, a property and an operator."""

    table: Tensor
    scratch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = Block()
        self.head = nn.Linear(8, 4)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("scratch", torch.ones(4), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("no_parameter", None)
        self.classes = ["a", "b", "c", "d"]
        self.order = [self.head, self.first]

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(self.second(self.first(x))) + self.table) * self.scratch  # type: ignore[no-any-return]

    def loss(self, x: Tensor) -> Tensor:
        return self(x).square().mean()  # type: ignore[no-any-return]

    @property
    def width(self) -> int:
        return self.head.in_features

    def __len__(self) -> int:
        return len(self.classes)


@every_emit
def test_hooks_run_in_the_same_order_on_layers_blocks_and_root(emit: tdfx.Emit) -> None:
    model = Net().double()
    calls: list[str] = []

    def recorder(text: str) -> Callable[..., None]:
        return lambda *_, **__: calls.append(text)

    for path in ("", "first", "first.layer", "first.norm", "head"):
        module = model.get_submodule(path)
        module.register_forward_pre_hook(recorder(f"{path} before"))
        module.register_forward_hook(recorder(f"{path} after"), with_kwargs=True)
        module.register_full_backward_hook(recorder(f"{path} back"))
        module.register_full_backward_pre_hook(recorder(f"{path} back before"))

    def record(model: nn.Module) -> list[str]:
        calls.clear()
        model(batch().requires_grad_()).sum().backward()
        model.zero_grad()
        return list(calls)

    expected = record(model)
    assert len(expected) == 20
    rewritten = tdfx.rewrite(model, FULL, emit=emit)
    assert calls == expected, "planning called a hook"
    assert isinstance(rewritten.get_submodule("first.layer"), tdfx.Factorized)
    assert isinstance(rewritten, fx.GraphModule) == (emit == "graph")
    assert record(rewritten) == expected
    assert record(tdfx.merge(rewritten)) == expected
    assert record(model) == expected
    notes = ("the graph calls 1 Block as it is: it has hooks, which a graph would not call",)
    assert tdfx.plan(model, FULL, emit=emit).notes == (notes if emit == "graph" else ())


@every_emit
def test_a_hook_that_changes_an_output_is_preserved(emit: tdfx.Emit) -> None:
    for path in ("", "first", "first.layer"):
        model = Net().double()
        plain = run(model)[0]
        handle = model.get_submodule(path).register_forward_hook(lambda _, __, output: output.abs() * 3)
        rewritten = tdfx.rewrite(model, FULL, emit=emit)
        check_same_run(rewritten, model)
        assert distance(run(rewritten)[0], plain) > 1e-3
        # The handle belongs to the original; the copy keeps its hook.
        handle.remove()
        assert distance(run(model)[0], plain) == 0
        assert distance(run(rewritten)[0], plain) > 1e-3


@every_emit
def test_requires_grad_is_preserved(emit: tdfx.Emit) -> None:
    model = Net()
    frozen = ["first.layer.bias", "first.norm.weight", "head.weight", "head.bias"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    rewritten = tdfx.rewrite(model, FULL, emit=emit)
    assert tdfx.plan(model, FULL)["head"].reason is tdfx.Reason.FROZEN
    flags = {name: parameter.requires_grad for name, parameter in rewritten.named_parameters()}
    assert {name for name, flag in flags.items() if not flag} == {
        "first.layer.factors.1.bias",
        "first.norm.weight",
        "head.weight",
        "head.bias",
    }
    merged = tdfx.merge(rewritten)
    assert [name for name, parameter in merged.named_parameters() if not parameter.requires_grad] == frozen


@every_emit
def test_modes_of_submodules_are_preserved(emit: tdfx.Emit) -> None:
    model = Net()
    model.first.eval()
    model.second.norm.eval()
    model.head.eval()
    modes = {path: module.training for path, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    rewritten = tdfx.rewrite(model, FULL, emit=emit)
    assert {path: module.training for path, module in rewritten.named_modules() if path in modes} == modes
    for path in ("first.layer", "head"):
        assert {module.training for module in rewritten.get_submodule(path).modules()} == {False}
    assert {path: module.training for path, module in tdfx.merge(rewritten).named_modules()} == modes


@every_emit
def test_dtype_device_and_memory_format_are_preserved(emit: tdfx.Emit) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 4))
    model.to(memory_format=torch.channels_last)
    model[4].to(torch.bfloat16)
    model[4].register_forward_pre_hook(lambda _, arguments: (arguments[0].to(torch.bfloat16),))
    rewritten = tdfx.rewrite(model, FULL, emit=emit)
    core = rewritten.get_parameter("0.factors.1.weight")
    assert core.is_contiguous(memory_format=torch.channels_last)
    assert not core.is_contiguous()
    assert {parameter.dtype for parameter in rewritten.get_submodule("4").parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in rewritten.get_submodule("0").parameters()} == {torch.float32}
    x = torch.rand(2, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    assert rewritten.get_submodule("0")(x).is_contiguous(memory_format=torch.channels_last)
    merged = tdfx.merge(rewritten)
    for merged_parameter, parameter in zip(merged.parameters(), model.parameters(), strict=True):
        assert (merged_parameter.dtype, merged_parameter.device) == (parameter.dtype, parameter.device)
        assert merged_parameter.is_contiguous(memory_format=torch.channels_last) or parameter.dim() != 4
    # The strides of a kernel of one tap mean nothing, so the 3×3 kernel is compared.
    assert merged.get_parameter("0.weight").stride() == model.get_parameter("0.weight").stride()
    assert rewritten(x).dtype is torch.bfloat16


@every_emit
def test_persistent_and_other_buffers_are_preserved(emit: tdfx.Emit) -> None:
    model = Net()
    rewritten = tdfx.rewrite(model, FULL, emit=emit)
    merged = tdfx.merge(rewritten)
    for copied in (rewritten, merged):
        assert [(name, id(buffer)) for name, buffer in copied.named_buffers()] == [
            (name, id(buffer)) for name, buffer in model.named_buffers()
        ]
        assert "table" in copied.state_dict()
        assert "scratch" not in copied.state_dict()
        assert copied._buffers["nothing"] is None
        assert copied._parameters["no_parameter"] is None
    kept = [key for key in model.state_dict() if not key.startswith(("first.layer", "second.layer", "head"))]
    assert [key for key in rewritten.state_dict() if "factors" not in key] == kept
    assert list(merged.state_dict()) == list(model.state_dict())
    twin = copy.deepcopy(rewritten)
    assert not {id(buffer) for buffer in twin.buffers()} & {id(buffer) for buffer in rewritten.buffers()}


def test_attributes_methods_properties_and_operators_are_preserved() -> None:
    model = Net().double()
    rewritten: Any = tdfx.rewrite(model, FULL)
    assert isinstance(rewritten, fx.GraphModule)
    assert isinstance(rewritten, Net)
    assert rewritten.classes == model.classes
    assert rewritten.classes is not model.classes
    assert (rewritten.width, len(rewritten)) == (8, 4)
    # A list of submodules contains those of the copy.
    assert rewritten.order[0] is rewritten.head
    assert rewritten.order[1] is rewritten.first
    assert isinstance(rewritten.head, tdfx.Factorized)
    assert model.order[0] is model.head
    assert distance(rewritten.loss(batch()), model.loss(batch())) < TOLERANCE
    rewritten.__dict__["extra"] = 5
    merged: Any = tdfx.merge(rewritten)
    assert merged.extra == 5
    assert not hasattr(model, "extra")
    with pytest.raises(AttributeError, match="nothing_at_all"):
        _ = rewritten.nothing_at_all


class Twice(nn.Module):
    """Has a layer and a block, each under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.first = nn.Linear(8, 8)
        self.decoder = self.encoder
        self.last = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.decoder(self.first(self.encoder(x))))  # type: ignore[no-any-return]


@every_emit
def test_a_layer_under_two_names_is_one_site_by_either(emit: tdfx.Emit) -> None:
    model = Twice().double()
    plan = tdfx.plan(model, FULL, example_inputs=batch())
    assert {site.name: site.calls for site in plan} == {"encoder.0": 2, "first": 2}
    rewritten = tdfx.rewrite(model, FULL, emit=emit)
    assert rewritten.get_submodule("first") is rewritten.get_submodule("last")
    assert rewritten.get_submodule("encoder") is rewritten.get_submodule("decoder")
    assert isinstance(rewritten.get_submodule("decoder.0"), tdfx.Factorized)
    check_same_run(rewritten, model)
    merged = tdfx.merge(rewritten)
    assert merged.get_submodule("first") is merged.get_submodule("last")
    assert list(merged.state_dict()) == list(model.state_dict())


def test_policies_may_use_any_name_of_a_shared_layer() -> None:
    model = Twice()
    reason = tdfx.Reason.EXCLUDED

    def decisions(policy: tdfx.Policy) -> list[Any]:
        return [site.ranks or site.reason for site in tdfx.plan(model, policy)]

    half, quarter = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1), LOW
    assert decisions(quarter) == [(2,), (2,)]
    for shared in ("last", "l*"):
        assert decisions(replace(quarter, include=(shared,))) == [reason, (2,)]
        assert decisions(replace(quarter, exclude=(shared,))) == [(2,), reason]
        assert decisions(replace(quarter, overrides={shared: half})) == [(2,), (4,)]
        assert decisions(replace(quarter, overrides={shared: None})) == [(2,), reason]
        assert decisions(tdfx.Policy(rank=tdfx.Fixed({shared: 3}), min_gain=0)) == [reason, (3,)]
    assert decisions(replace(quarter, exclude=("decoder.*",))) == [reason, (2,)]
    assert decisions(tdfx.Policy(rank=tdfx.Fixed({"decoder.0": 3, "first": 5}), min_gain=0)) == [(3,), (5,)]
    # A layer that is excluded by any of its names is excluded.
    assert decisions(replace(quarter, include=("first",), exclude=("last",))) == [reason, reason]
    with pytest.raises(tdfx.PolicyError, match=r"'lost' in exclude matches none of the model's 4 sites: .*'last'"):
        tdfx.plan(model, replace(quarter, exclude=("lost",)))


def test_a_lazy_layer_is_a_site_that_is_kept() -> None:
    for given in (None, torch.rand(3, 5)):
        model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 8))
        plan = tdfx.plan(model, FULL, example_inputs=given)
        assert plan["0"].reason is tdfx.Reason.UNINITIALIZED
        assert plan["0"].note == "run one batch through the model first"
        assert plan["0"].shape == ()
        assert plan["2"].factorized
        assert plan.other_parameters == 8
        assert isinstance(model.get_parameter("0.weight"), UninitializedParameter)
        assert type(model.get_submodule("0")) is nn.LazyLinear


@pytest.mark.parametrize("given", [False, True], ids=["without inputs", "with inputs"])
def test_a_lazy_layer_is_initialized_in_both_models_by_a_run(given: bool) -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.rand(3, 5)
    hooks = dict(model[0]._forward_pre_hooks)
    assert len(hooks) == 1
    rewritten = tdfx.rewrite(model, FULL, example_inputs=x if given else None)
    assert dict(model[0]._forward_pre_hooks) == hooks
    for lazy in (model, rewritten):
        assert isinstance(lazy.get_parameter("0.weight"), UninitializedParameter)
    expected = rewritten(x)
    assert type(rewritten.get_submodule("0")) is nn.Linear
    assert not rewritten.get_submodule("0")._forward_pre_hooks
    assert distance(rewritten(x), expected) == 0
    assert distance(tdfx.merge(rewritten)(x), expected) < 1e-4
    assert model(x).shape == (3, 8)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("given", [False, True], ids=["without inputs", "with inputs"])
def test_lazy_buffers_stay_lazy(given: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LazyBatchNorm1d())
    x = torch.rand(3, 5)
    rewritten = tdfx.rewrite(model, FULL, example_inputs=x if given else None)
    for lazy in (model, rewritten):
        assert isinstance(lazy.get_submodule("1")._buffers["running_mean"], UninitializedBuffer)
    assert rewritten(x).shape == (3, 8)


class Pair(NamedTuple):
    y: Tensor
    second: Tensor


@dataclass
class Record:
    y: Tensor
    others: list[Tensor]


class CustomDict(dict[str, Tensor]):
    """A subclass of dict, as the outputs of Hugging Face's models are."""


class Returns(nn.Module):
    def __init__(self, build: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.build = build

    def forward(self, x: Tensor) -> Any:
        return self.build(self.layer(x))


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "dict": (lambda y: {"y": y, "b": y * 2}, True),
    "ordered": (lambda y: OrderedDict(b=y * 2, a=y), True),
    "named": (lambda y: Pair(y, y * 2), True),
    "dataclass": (lambda y: Record(y, [y * 2, y]), False),
    "nested": (lambda y: (y, [y * 2, {"deep": (y, Pair(y, y))}], 3, None, "text"), True),
    "ordered inside": (lambda y: {"a": OrderedDict(c=y, b=(y,))}, True),
    "custom dict": (lambda y: CustomDict(a=y), False),
    "custom dict inside": (lambda y: [y, {"a": CustomDict(b=y)}], False),
    "custom list": (lambda y: type("CustomList", (list,), {})([y]), False),
}


def same(output: Any, other: Any) -> bool:
    """Compare outputs by class and by value, recursively."""
    if type(output).__name__ != type(other).__name__:
        return False
    if isinstance(output, Tensor):
        return distance(output, other) < TOLERANCE
    if isinstance(output, dict):
        return list(output) == list(other) and same(list(output.values()), list(other.values()))
    if isinstance(output, tuple | list):
        return len(output) == len(other) and all(map(same, output, other))
    return same(vars(output), vars(other)) if isinstance(output, Record) else bool(output == other)


@pytest.mark.parametrize(("build", "is_graph"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_keep_their_classes(build: Callable[[Tensor], Any], is_graph: bool) -> None:
    model = Returns(build).double()
    rewritten = tdfx.rewrite(model, FULL)
    assert isinstance(rewritten, fx.GraphModule) == is_graph
    assert isinstance(rewritten.get_submodule("layer"), tdfx.Factorized)
    assert same(rewritten(batch()), model(batch()))
    assert not same(tdfx.rewrite(model, LOW)(batch()), model(batch()))
    if not is_graph:
        assert re.search("would become a plain|its forward makes a", tdfx.plan(model, FULL).notes[0])


class KeepsHandle(nn.Module):
    """Keeps the handle of a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.handle = self.block.register_forward_hook(lambda _, __, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)  # type: ignore[no-any-return]


@every_emit
def test_a_handle_removes_the_hook_of_the_model_that_keeps_it(emit: tdfx.Emit) -> None:
    model = KeepsHandle().double()
    rewritten: Any = tdfx.rewrite(model, FULL, emit=emit)
    before = run(model)[0]
    rewritten.handle.remove()
    assert distance(run(model)[0], before) == 0
    assert len(model.block._forward_hooks) == 1
    assert len(rewritten.block._forward_hooks) == 0
    assert distance(2 * run(rewritten)[0], before) < TOLERANCE


class KeepsHandles(nn.Module):
    """Keeps the handles of hooks of its layers, which are methods of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls: list[str] = []
        self.handles = [
            self.first.register_forward_pre_hook(self.before, with_kwargs=True),
            self.first.register_forward_hook(self.after),
            self.second.register_full_backward_hook(self.after),
        ]

    def before(self, layer: nn.Module, arguments: Any, named: Any) -> None:
        self.calls.append("before")

    def after(self, *_: Any) -> None:
        self.calls.append("after")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


@every_emit
def test_a_handle_removes_the_hook_of_a_layer_that_became_factors(emit: tdfx.Emit) -> None:
    def calls(model: Any) -> list[str]:
        model.calls.clear()
        model(batch()).sum().backward()
        return list(model.calls)

    model = KeepsHandles().double()
    rewritten: Any = tdfx.rewrite(model, FULL, emit=emit)
    merged: Any = tdfx.merge(rewritten)
    for each in (rewritten, merged):
        assert calls(each) == ["before", "after", "after"]
        for handle in each.handles:
            handle.remove()
        assert calls(each) == []
    assert calls(model) == ["before", "after", "after"]


class Part(nn.Module):
    """Has a layer, a buffer and attributes that a forward may change."""

    counter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("counter", torch.ones(()))
        self.steps = 1
        self.kept: list[Tensor] = []
        self.recent: deque[int] = deque()


class Averages(Part):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.counter.mul_(0.5).add_(1)
        return self.layer(x) * self.counter.clone()  # type: ignore[no-any-return]


class Counts(Part):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.layer(x) * self.steps  # type: ignore[no-any-return]


class Keeps(Part):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.kept.append(y.mean())
        return y


class CreatesTensor(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.linspace(0, 1, 8, dtype=torch.float64)  # type: ignore[no-any-return]


class DrawsNumber(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (1 + torch.rand(()).item())  # type: ignore[no-any-return]


class DrawsTensor(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.randn(8, dtype=torch.float64)  # type: ignore[no-any-return]


class NoGradient(Part):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.layer(x)
        return x + y  # type: ignore[no-any-return]


class Casts(Part):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.layer(x.float().requires_grad_())
        return x + y  # type: ignore[no-any-return]


class Decorated(Part):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x  # type: ignore[no-any-return]


class Nested(Part):
    """Can be traced, but has a part that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DrawsNumber()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.inner(x))  # type: ignore[no-any-return]


class Checkpoints(Part):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda value: self.layer(value).tanh(), x, use_reentrant=False)  # type: ignore[no-any-return]


class CheckpointsReentrantly(Part):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda value: self.layer(value).tanh(), x, use_reentrant=True)  # type: ignore[no-any-return]


class ReadsGradMode(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (2 if torch.is_grad_enabled() else 1)  # type: ignore[no-any-return]


class BranchesOnData(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


PARTS: dict[str, tuple[type[Part], str]] = {
    build.__name__: (build, why)
    for build, why in [
        (Averages, "its forward enters a context by with"),
        (Counts, "its forward assigns to an attribute, self.steps"),
        (Keeps, "its forward changes a container by append()"),
        (CreatesTensor, "its forward calls linspace(), which leaves no trace in a graph"),
        (DrawsNumber, "its forward calls rand(), which leaves no trace in a graph"),
        (DrawsTensor, "its forward calls randn(), which leaves no trace in a graph"),
        (NoGradient, "its forward enters a context by with"),
        (Casts, "its forward enters a context by with"),
        (Decorated, "its forward enters no_grad"),
        (Checkpoints, "its forward calls checkpoint(), which leaves no trace in a graph"),
        (CheckpointsReentrantly, "its forward calls checkpoint(), which leaves no trace in a graph"),
        (ReadsGradMode, "its forward calls is_grad_enabled(), which leaves no trace in a graph"),
        (BranchesOnData, "torch.fx cannot follow its forward at test_attachments.py"),
    ]
}


class Around(nn.Module):
    """A model whose blocks cannot be traced, and whose root can."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.parts = nn.ModuleList([build(), build()])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        for part in self.parts:
            x = part(x)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", PARTS)
def test_a_block_that_cannot_be_traced_faithfully_is_called(name: str) -> None:
    build, why = PARTS[name]
    model = Around(build).double()
    if build is Casts:
        for part in model.parts:
            part.float()
    before = [(part.steps, len(part.kept), float(part.counter)) for part in cast("Any", model.parts)]
    plan = tdfx.plan(model, FULL, example_inputs=batch())
    (note,) = plan.notes
    assert note.startswith(f"the graph calls 2 {name} as it is: ")
    assert why in note
    assert plan.emit == "graph"
    assert len(plan.factorized) == 4
    rewritten = tdfx.rewrite(model, FULL)
    assert [(part.steps, len(part.kept), float(part.counter)) for part in cast("Any", model.parts)] == before
    assert isinstance(rewritten, fx.GraphModule)
    called = [str(node.target) for node in rewritten.graph.nodes if node.op == "call_module"]
    assert called == ["stem", "parts.0", "parts.1", "head"]
    assert all(isinstance(rewritten.get_submodule(f"parts.{index}.layer"), tdfx.Factorized) for index in (0, 1))
    # In autocast each factor's result is rounded to bfloat16, with a relative error of 2**-8.
    tolerance = 0.1 if build is Casts else TOLERANCE
    check_same_run(rewritten, model, tolerance)
    assert distance(run(tdfx.rewrite(model, LOW))[0], run(model)[0]) > tolerance / 4 + 1e-3


def test_only_the_part_that_cannot_be_traced_is_called() -> None:
    model = Around(Nested).double()
    rewritten = tdfx.rewrite(model, FULL)
    assert isinstance(rewritten, fx.GraphModule)
    called = [str(node.target) for node in rewritten.graph.nodes if node.op == "call_module"]
    assert called == ["stem", "parts.0.inner", "parts.0.layer", "parts.1.inner", "parts.1.layer", "head"]
    assert len(tdfx.plan(model, FULL).factorized) == 6
    check_same_run(rewritten, model)


class CheckpointsBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False))  # type: ignore[no-any-return]


def test_a_root_that_checkpoints_keeps_its_class() -> None:
    model = CheckpointsBlock().double()
    rewritten = tdfx.rewrite(model, FULL)
    assert type(rewritten) is CheckpointsBlock
    assert "its forward calls checkpoint(), which leaves no trace in a graph" in tdfx.plan(model, FULL).notes[0]
    assert len(tdfx.plan(model, FULL).factorized) == 2
    check_same_run(rewritten, model)


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, *, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def test_a_keyword_only_argument_is_preserved() -> None:
    model = KeywordOnly().double()
    rewritten = tdfx.rewrite(model, FULL, example_inputs={"x": batch()})
    assert isinstance(rewritten, fx.GraphModule)
    assert distance(rewritten(x=batch()), model(x=batch())) < TOLERANCE


def test_a_forward_that_was_set_on_an_instance_is_traced() -> None:
    model = Around(Block).double()
    plain = run(model)[0]
    part: Any = model.parts[0]
    part.forward = types.MethodType(lambda self, x: x * 2 + self.layer(x), part)
    rewritten = tdfx.rewrite(model, FULL)
    check_same_run(rewritten, model)
    assert distance(run(rewritten)[0], plain) > 1e-3


def test_the_state_of_a_block_is_copied_and_continues_in_the_copy() -> None:
    for build in (Counts, Keeps):
        model = Around(build)
        rewritten: Any = tdfx.rewrite(model, FULL)
        outputs = [rewritten(batch().float()) for _ in range(2)]
        assert (distance(*outputs) > 0.1) == (build is Counts)
        part = rewritten.parts[0]
        assert (part.steps, len(part.kept)) == ((3, 0) if build is Counts else (1, 2))
        merged: Any = tdfx.merge(rewritten)
        assert merged.parts[0].steps == part.steps
        first: Any = model.parts[0]
        assert (first.steps, len(first.kept)) == (1, 0)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.after = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)[:, None] * torch.tanh(x)[:, :, None]
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.after(self.encoder(x)).mean(1)  # type: ignore[no-any-return]


@every_emit
def test_attention_and_encoder_layers_compute_the_same(emit: tdfx.Emit) -> None:
    model = Attends().double()
    for given in (None, batch()):
        plan = tdfx.plan(model, FULL, example_inputs=given)
        assert [site.name for site in plan] == [
            "before",
            "attention.in_proj_weight",
            "attention.out_proj",
            "encoder.self_attn.in_proj_weight",
            "encoder.self_attn.out_proj",
            "encoder.linear1",
            "encoder.linear2",
            "after",
        ]
        assert not plan.kept
    projection = plan["attention.in_proj_weight"]
    assert (projection.kind, projection.shape, projection.parameter) == (
        "F.linear",
        (24, 8),
        "attention.in_proj_weight",
    )
    rewritten = tdfx.rewrite(model, FULL, emit=emit, example_inputs=batch())
    check_same_run(rewritten, model)
    for either in (rewritten, model):
        either.eval()
    check_same_run(rewritten, model)
    with torch.no_grad():  # torch takes its fast path here, which reads every weight itself
        assert distance(rewritten(batch()), model(batch())) < TOLERANCE
        assert distance(rewritten(batch()), rewritten.train()(batch())) < TOLERANCE


def test_three_separate_projections_are_listed() -> None:
    model = nn.Sequential()
    model.add_module("attention", nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    plan = tdfx.plan(model, FULL)
    assert [(site.name, site.shape) for site in plan] == [
        ("attention.q_proj_weight", (8, 8)),
        ("attention.k_proj_weight", (8, 6)),
        ("attention.v_proj_weight", (8, 4)),
        ("attention.out_proj", (8, 8)),
    ]
    assert plan.kept == ()


class Wrapping(Tensor):
    """A tensor that contains another tensor, as quantized and distributed tensors do."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapping:
        settings: Any = {"dtype": inner.dtype, "device": inner.device, "requires_grad": True}
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, **settings)
        wrapper.held = inner
        return wrapper

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: Any) -> Wrapping:
        return Wrapping(tensors["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        plain = [value.held if isinstance(value, Wrapping) else value for value in args]
        result = func(*plain, **(kwargs or {}))
        return Wrapping(result) if func is torch.ops.aten.detach.default else result


@pytest.mark.parametrize("given", [False, True], ids=["without inputs", "with inputs"])
def test_a_weight_that_is_not_a_plain_tensor_is_kept(given: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    inner = model.get_parameter("0.weight").detach().clone()
    model[0].weight = nn.Parameter(cast("Tensor", Wrapping(inner)))
    plan = tdfx.plan(model, FULL, example_inputs=batch() if given else None)
    assert plan["0"].reason is tdfx.Reason.PARAMETRIZED
    assert plan["0"].note == "its weight is a Wrapping, which is no plain tensor"
    assert plan["1"].factorized
    rewritten = tdfx.rewrite(model, FULL)
    assert rewritten.get_submodule("0") is not model[0]
    assert rewritten.get_parameter("0.weight") is model[0].weight
    assert distance(rewritten(batch()), model(batch())) < TOLERANCE


def test_a_weight_with_attributes_causes_a_warning_and_is_rewritten() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).double()
    cast("Any", model[0].weight).label = "mine"
    with pytest.warns(tdfx.TdfxWarning, match="weight of site '0' has hooks or attributes of its own"):
        rewritten = tdfx.rewrite(model, FULL)
    assert distance(rewritten(batch()), model(batch())) < TOLERANCE
