"""What surgery keeps of a model: hooks, flags, buffers, formats, attributes, outputs; and blocks that stay as they are."""

from __future__ import annotations

import copy
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
# A few products of eight terms each, one after the other.
TOLERANCE = 1e4 * EPS
EMITS: tuple[tdfx.Emit, ...] = ("graph", "modules")
every_emit = pytest.mark.parametrize("emit", EMITS)


def batch() -> Tensor:
    return torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def distance(one: Tensor, other: Tensor) -> float:
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and the gradients of the parameters and of the input, from a seeded run of a copy."""
    copied = copy.deepcopy(model)
    torch.manual_seed(3)
    x = batch().requires_grad_()
    output = copied(x)
    gradients: dict[str, Tensor] = {}
    if output.requires_grad:
        output.square().sum().backward()
        gradients = {name: one.grad for name, one in copied.named_parameters() if one.grad is not None}
    if x.grad is not None:
        gradients["(input)"] = x.grad
    return output, gradients


def same_run(made: nn.Module, dense: nn.Module, tolerance: float = TOLERANCE) -> None:
    """Hold outputs and gradients of a model at full rank to the original's."""
    (found, gradients), (expected, dense_gradients) = run(made), run(dense)
    assert distance(found, expected) <= tolerance
    assert found.requires_grad == expected.requires_grad
    kept = {key for key in dense_gradients if key in dict(made.named_parameters()) or key == "(input)"}
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
    """Two blocks, buffers of both sorts, an attribute, a method, a property and an operator of its own."""

    table: Tensor
    scratch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one = Block()
        self.other = Block()
        self.head = nn.Linear(8, 4)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("scratch", torch.ones(4), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("no_parameter", None)
        self.classes = ["a", "b", "c", "d"]
        self.order = [self.head, self.one]

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(self.other(self.one(x))) + self.table) * self.scratch  # type: ignore[no-any-return]

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
    seen: list[str] = []

    def note(text: str) -> Callable[..., None]:
        return lambda *_, **__: seen.append(text)

    for path in ("", "one", "one.layer", "one.norm", "head"):
        part = model.get_submodule(path)
        part.register_forward_pre_hook(note(f"{path} before"))
        part.register_forward_hook(note(f"{path} after"), with_kwargs=True)
        part.register_full_backward_hook(note(f"{path} back"))
        part.register_full_backward_pre_hook(note(f"{path} back before"))

    def record(one: nn.Module) -> list[str]:
        seen.clear()
        one(batch().requires_grad_()).sum().backward()
        one.zero_grad()
        return list(seen)

    expected = record(model)
    assert len(expected) == 20
    made = tdfx.rewrite(model, FULL, emit=emit)
    assert seen == expected, "planning calls no hook"
    assert isinstance(made.get_submodule("one.layer"), tdfx.Factorized)
    assert isinstance(made, fx.GraphModule) == (emit == "graph")
    assert record(made) == expected
    assert record(tdfx.merge(made)) == expected
    assert record(model) == expected
    notes = ("the graph calls 1 Block as it is: it has hooks, which a graph would not call",)
    assert tdfx.plan(model, FULL, emit=emit).notes == (notes if emit == "graph" else ())


@every_emit
def test_a_hook_that_changes_an_output_still_does(emit: tdfx.Emit) -> None:
    for path in ("", "one", "one.layer"):
        model = Net().double()
        plain = run(model)[0]
        handle = model.get_submodule(path).register_forward_hook(lambda _, __, output: output.abs() * 3)
        made = tdfx.rewrite(model, FULL, emit=emit)
        same_run(made, model)
        assert distance(run(made)[0], plain) > 1e-3
        # The handle is the original's; what was attached to the copy stays there.
        handle.remove()
        assert distance(run(model)[0], plain) == 0
        assert distance(run(made)[0], plain) > 1e-3


@every_emit
def test_gradient_flags_stay_with_each_parameter(emit: tdfx.Emit) -> None:
    model = Net()
    frozen = ["one.layer.bias", "one.norm.weight", "head.weight", "head.bias"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    made = tdfx.rewrite(model, FULL, emit=emit)
    assert tdfx.plan(model, FULL)["head"].reason is tdfx.Reason.FROZEN
    flags = {name: one.requires_grad for name, one in made.named_parameters()}
    assert {name for name, flag in flags.items() if not flag} == {
        "one.layer.factors.1.bias",
        "one.norm.weight",
        "head.weight",
        "head.bias",
    }
    merged = tdfx.merge(made)
    assert [name for name, one in merged.named_parameters() if not one.requires_grad] == frozen


@every_emit
def test_modes_of_submodules_stay(emit: tdfx.Emit) -> None:
    model = Net()
    model.one.eval()
    model.other.norm.eval()
    model.head.eval()
    modes = {path: one.training for path, one in model.named_modules()}
    assert set(modes.values()) == {True, False}
    made = tdfx.rewrite(model, FULL, emit=emit)
    assert {path: one.training for path, one in made.named_modules() if path in modes} == modes
    for path in ("one.layer", "head"):
        assert {one.training for one in made.get_submodule(path).modules()} == {False}
    assert {path: one.training for path, one in tdfx.merge(made).named_modules()} == modes


@every_emit
def test_dtype_device_and_memory_format_stay(emit: tdfx.Emit) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 4))
    model.to(memory_format=torch.channels_last)
    model[4].to(torch.bfloat16)
    model[4].register_forward_pre_hook(lambda _, arguments: (arguments[0].to(torch.bfloat16),))
    made = tdfx.rewrite(model, FULL, emit=emit)
    core = made.get_parameter("0.factors.1.weight")
    assert core.is_contiguous(memory_format=torch.channels_last)
    assert not core.is_contiguous()
    assert {one.dtype for one in made.get_submodule("4").parameters()} == {torch.bfloat16}
    assert {one.dtype for one in made.get_submodule("0").parameters()} == {torch.float32}
    x = torch.rand(2, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    assert made.get_submodule("0")(x).is_contiguous(memory_format=torch.channels_last)
    merged = tdfx.merge(made)
    for found, expected in zip(merged.parameters(), model.parameters(), strict=True):
        assert (found.dtype, found.device) == (expected.dtype, expected.device)
        assert found.is_contiguous(memory_format=torch.channels_last) or expected.dim() != 4
    # Of a kernel of one tap the strides of the last dimensions mean nothing, so only the other tells.
    assert merged.get_parameter("0.weight").stride() == model.get_parameter("0.weight").stride()
    assert made(x).dtype is torch.bfloat16


@every_emit
def test_buffers_stay_of_both_sorts(emit: tdfx.Emit) -> None:
    model = Net()
    made = tdfx.rewrite(model, FULL, emit=emit)
    merged = tdfx.merge(made)
    for one in (made, merged):
        assert [(name, id(buffer)) for name, buffer in one.named_buffers()] == [
            (name, id(buffer)) for name, buffer in model.named_buffers()
        ]
        assert "table" in one.state_dict()
        assert "scratch" not in one.state_dict()
        assert one._buffers["nothing"] is None
        assert one._parameters["no_parameter"] is None
    kept = [key for key in model.state_dict() if not key.startswith(("one.layer", "other.layer", "head"))]
    assert [key for key in made.state_dict() if "factors" not in key] == kept
    assert list(merged.state_dict()) == list(model.state_dict())
    twin = copy.deepcopy(made)
    assert not {id(one) for one in twin.buffers()} & {id(one) for one in made.buffers()}


def test_attributes_methods_properties_and_operators_are_the_originals() -> None:
    model = Net().double()
    made: Any = tdfx.rewrite(model, FULL)
    assert isinstance(made, fx.GraphModule)
    assert isinstance(made, Net)
    assert made.classes == model.classes
    assert made.classes is not model.classes
    assert (made.width, len(made)) == (8, 4)
    # A list of submodules holds those of the copy.
    assert made.order[0] is made.head
    assert made.order[1] is made.one
    assert isinstance(made.head, tdfx.Factorized)
    assert model.order[0] is model.head
    assert distance(made.loss(batch()), model.loss(batch())) < TOLERANCE
    made.__dict__["extra"] = 5
    merged: Any = tdfx.merge(made)
    assert merged.extra == 5
    assert not hasattr(model, "extra")
    with pytest.raises(AttributeError, match="nothing_at_all"):
        _ = made.nothing_at_all


class Twice(nn.Module):
    """One layer and one block, each under two names."""

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
    made = tdfx.rewrite(model, FULL, emit=emit)
    assert made.get_submodule("first") is made.get_submodule("last")
    assert made.get_submodule("encoder") is made.get_submodule("decoder")
    assert isinstance(made.get_submodule("decoder.0"), tdfx.Factorized)
    same_run(made, model)
    merged = tdfx.merge(made)
    assert merged.get_submodule("first") is merged.get_submodule("last")
    assert list(merged.state_dict()) == list(model.state_dict())


def test_policies_speak_of_a_shared_layer_by_any_of_its_names() -> None:
    model = Twice()
    reason = tdfx.Reason.EXCLUDED

    def decided(policy: tdfx.Policy) -> list[Any]:
        return [site.ranks or site.reason for site in tdfx.plan(model, policy)]

    half, quarter = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1), LOW
    assert decided(quarter) == [(2,), (2,)]
    for shared in ("last", "l*"):
        assert decided(replace(quarter, include=(shared,))) == [reason, (2,)]
        assert decided(replace(quarter, exclude=(shared,))) == [(2,), reason]
        assert decided(replace(quarter, overrides={shared: half})) == [(2,), (4,)]
        assert decided(replace(quarter, overrides={shared: None})) == [(2,), reason]
        assert decided(tdfx.Policy(rank=tdfx.Fixed({shared: 3}), min_gain=0)) == [reason, (3,)]
    assert decided(replace(quarter, exclude=("decoder.*",))) == [reason, (2,)]
    assert decided(tdfx.Policy(rank=tdfx.Fixed({"decoder.0": 3, "first": 5}), min_gain=0)) == [(3,), (5,)]
    # Excluded by one of its names is excluded, whatever the others say.
    assert decided(replace(quarter, include=("first",), exclude=("last",))) == [reason, reason]
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


@pytest.mark.parametrize("given", [False, True], ids=["blind", "with inputs"])
def test_a_lazy_layer_comes_to_life_in_the_model_and_in_what_comes_back(given: bool) -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.rand(3, 5)
    hooks = dict(model[0]._forward_pre_hooks)
    assert len(hooks) == 1
    made = tdfx.rewrite(model, FULL, example_inputs=x if given else None)
    assert dict(model[0]._forward_pre_hooks) == hooks
    for one in (model, made):
        assert isinstance(one.get_parameter("0.weight"), UninitializedParameter)
    expected = made(x)
    assert type(made.get_submodule("0")) is nn.Linear
    assert not made.get_submodule("0")._forward_pre_hooks
    assert distance(made(x), expected) == 0
    assert distance(tdfx.merge(made)(x), expected) < 1e-4
    assert model(x).shape == (3, 8)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("given", [False, True], ids=["blind", "with inputs"])
def test_lazy_buffers_stay_lazy(given: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LazyBatchNorm1d())
    x = torch.rand(3, 5)
    made = tdfx.rewrite(model, FULL, example_inputs=x if given else None)
    for one in (model, made):
        assert isinstance(one.get_submodule("1")._buffers["running_mean"], UninitializedBuffer)
    assert made(x).shape == (3, 8)


class Pair(NamedTuple):
    y: Tensor
    also: Tensor


@dataclass
class Record:
    y: Tensor
    also: list[Tensor]


class Named(dict[str, Tensor]):
    """A dictionary of somebody's own, as the outputs of Hugging Face's models are."""


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
    "dataclass": (lambda y: Record(y, [y * 2, y]), True),
    "nested": (lambda y: (y, [y * 2, {"deep": (y, Pair(y, y))}], 3, None, "text"), True),
    "ordered inside": (lambda y: {"a": OrderedDict(c=y, b=(y,))}, True),
    "own dict": (lambda y: Named(a=y), False),
    "own dict inside": (lambda y: [y, {"a": Named(b=y)}], False),
    "own list": (lambda y: type("Own", (list,), {})([y]), False),
}


def same(one: Any, other: Any) -> bool:
    """Compare outputs by class and by value, all the way down."""
    if type(one).__name__ != type(other).__name__:
        return False
    if isinstance(one, Tensor):
        return distance(one, other) < TOLERANCE
    if isinstance(one, dict):
        return list(one) == list(other) and same(list(one.values()), list(other.values()))
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return same(vars(one), vars(other)) if isinstance(one, Record) else bool(one == other)


@pytest.mark.parametrize(("build", "is_graph"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_keep_their_classes(build: Callable[[Tensor], Any], is_graph: bool) -> None:
    model = Returns(build).double()
    made = tdfx.rewrite(model, FULL)
    assert isinstance(made, fx.GraphModule) == is_graph
    assert isinstance(made.get_submodule("layer"), tdfx.Factorized)
    assert same(made(batch()), model(batch()))
    assert not same(tdfx.rewrite(model, LOW)(batch()), model(batch()))
    if not is_graph:
        assert "would become a plain" in tdfx.plan(model, FULL).notes[0]


class HoldsAHandle(nn.Module):
    """Keeps the handle by which it can take a hook of its own off."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.handle = self.block.register_forward_hook(lambda _, __, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)  # type: ignore[no-any-return]


@every_emit
def test_a_handle_takes_the_hook_off_the_model_that_holds_it(emit: tdfx.Emit) -> None:
    model = HoldsAHandle().double()
    made: Any = tdfx.rewrite(model, FULL, emit=emit)
    before = run(model)[0]
    made.handle.remove()
    assert distance(run(model)[0], before) == 0
    assert len(model.block._forward_hooks) == 1
    assert len(made.block._forward_hooks) == 0
    assert distance(2 * run(made)[0], before) < TOLERANCE


class Part(nn.Module):
    """A layer and things that a forward may count in or draw from."""

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


class CountsInABuffer(Part):
    """The count enters no output."""

    def forward(self, x: Tensor) -> Tensor:
        self.counter.add_(1)
        return self.layer(x)  # type: ignore[no-any-return]


class Counts(Part):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.layer(x) * self.steps  # type: ignore[no-any-return]


class Keeps(Part):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.kept.append(y.mean())
        return y


class Makes(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.linspace(0, 1, 8, dtype=torch.float64)  # type: ignore[no-any-return]


class Draws(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (1 + torch.rand(()).item())  # type: ignore[no-any-return]


class DrawsATensor(Part):
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
    """Does nothing of the kind itself, but holds a part that does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Draws()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.inner(x))  # type: ignore[no-any-return]


class Checkpoints(Part):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda one: self.layer(one).tanh(), x, use_reentrant=False)  # type: ignore[no-any-return]


class ChecksReentrantly(Part):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda one: self.layer(one).tanh(), x, use_reentrant=True)  # type: ignore[no-any-return]


class AsksForGradients(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (2 if torch.is_grad_enabled() else 1)  # type: ignore[no-any-return]


class BranchesOnData(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


PARTS: dict[str, tuple[type[Part], str]] = {
    one.__name__: (one, why)
    for one, why in [
        (Averages, "makes tensors that a graph would freeze"),
        (CountsInABuffer, "changes a buffer"),
        (Counts, "changes its own attribute 'steps'"),
        (Keeps, "changes its own attribute 'kept'"),
        (Makes, "makes tensors that a graph would freeze"),
        (Draws, "draws random numbers that a graph would freeze"),
        (DrawsATensor, "makes tensors that a graph would freeze"),
        (NoGradient, "switches autocast, gradients or checkpointing"),
        (Casts, "switches autocast, gradients or checkpointing"),
        (Decorated, "switches autocast, gradients or checkpointing"),
        (Checkpoints, "switches autocast, gradients or checkpointing"),
        (ChecksReentrantly, "applies CheckpointFunction"),
        (AsksForGradients, "uses is_grad_enabled, which leaves no trace"),
        (BranchesOnData, "torch.fx cannot follow its forward at test_attachments.py"),
    ]
}


class Around(nn.Module):
    """A model whose blocks do what no graph can show, and whose root does not."""

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


@pytest.mark.parametrize(
    "name",
    PARTS,
)
def test_a_block_that_no_graph_can_show_is_called_as_it_is(name: str) -> None:
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
    made = tdfx.rewrite(model, FULL)
    assert [(part.steps, len(part.kept), float(part.counter)) for part in cast("Any", model.parts)] == before
    assert isinstance(made, fx.GraphModule)
    called = [str(node.target) for node in made.graph.nodes if node.op == "call_module"]
    assert called == ["stem", "parts.0", "parts.1", "head"]
    assert all(isinstance(made.get_submodule(f"parts.{index}.layer"), tdfx.Factorized) for index in (0, 1))
    # In autocast the factors round each step to bfloat16, whose relative error is 2**-8, a few times over.
    tolerance = 0.1 if build is Casts else TOLERANCE
    same_run(made, model, tolerance)
    assert distance(run(tdfx.rewrite(model, LOW))[0], run(model)[0]) > tolerance / 4 + 1e-3


def test_only_the_part_of_a_block_that_no_graph_can_show_is_called_as_it_is() -> None:
    model = Around(Nested).double()
    made = tdfx.rewrite(model, FULL)
    assert isinstance(made, fx.GraphModule)
    called = [str(node.target) for node in made.graph.nodes if node.op == "call_module"]
    assert called == ["stem", "parts.0.inner", "parts.0.layer", "parts.1.inner", "parts.1.layer", "head"]
    assert len(tdfx.plan(model, FULL).factorized) == 6
    same_run(made, model)


class ChecksABlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False))  # type: ignore[no-any-return]


def test_a_root_that_checkpoints_keeps_its_class() -> None:
    model = ChecksABlock().double()
    made = tdfx.rewrite(model, FULL)
    assert type(made) is ChecksABlock
    assert "switches autocast, gradients or checkpointing" in tdfx.plan(model, FULL).notes[0]
    assert len(tdfx.plan(model, FULL).factorized) == 2
    same_run(made, model)


class OneName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, *, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def test_an_argument_that_is_passed_by_name_only() -> None:
    model = OneName().double()
    made = tdfx.rewrite(model, FULL, example_inputs={"x": batch()})
    assert isinstance(made, fx.GraphModule)
    assert distance(made(x=batch()), model(x=batch())) < TOLERANCE


def test_a_forward_of_ones_own_on_an_instance_is_what_the_graph_shows() -> None:
    model = Around(Block).double()
    plain = run(model)[0]
    part: Any = model.parts[0]
    part.forward = types.MethodType(lambda self, x: x * 2 + self.layer(x), part)
    made = tdfx.rewrite(model, FULL)
    same_run(made, model)
    assert distance(run(made)[0], plain) > 1e-3


def test_what_a_block_counts_goes_on_in_what_comes_back() -> None:
    for build in (Counts, Keeps):
        model = Around(build)
        made: Any = tdfx.rewrite(model, FULL)
        outputs = [made(batch().float()) for _ in range(2)]
        assert (distance(*outputs) > 0.1) == (build is Counts)
        part = made.parts[0]
        assert (part.steps, len(part.kept)) == ((3, 0) if build is Counts else (1, 2))
        merged: Any = tdfx.merge(made)
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
def test_attention_and_encoder_layers_stay_right(emit: tdfx.Emit) -> None:
    model = Attends().double()
    for given in (None, batch()):
        plan = tdfx.plan(model, FULL, example_inputs=given)
        assert [site.name for site in plan.factorized] == ["before", "after"]
        assert {site.reason for site in plan.kept} == {tdfx.Reason.READ_ELSEWHERE}
        assert [site.name for site in plan.kept] == [
            "attention.in_proj_weight",
            "attention.out_proj",
            "encoder.self_attn.in_proj_weight",
            "encoder.self_attn.out_proj",
            "encoder.linear1",
            "encoder.linear2",
        ]
    projection = plan["attention.in_proj_weight"]
    assert (projection.kind, projection.shape, projection.parameter) == (
        "MultiheadAttention",
        (24, 8),
        "attention.in_proj_weight",
    )
    assert projection.note == "MultiheadAttention may read its weight without calling it"
    made = tdfx.rewrite(model, FULL, emit=emit, example_inputs=batch())
    same_run(made, model)
    for one in (made, model):
        one.eval()
    same_run(made, model)
    with torch.no_grad():  # the fast path, which reads every weight itself
        assert distance(made(batch()), model(batch())) < TOLERANCE
        assert distance(made(batch()), made.train()(batch())) < TOLERANCE


def test_a_projection_in_three_is_listed_too() -> None:
    model = nn.Sequential()
    model.add_module("attention", nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    plan = tdfx.plan(model, FULL)
    assert [(site.name, site.shape) for site in plan] == [
        ("attention.q_proj_weight", (8, 8)),
        ("attention.k_proj_weight", (8, 6)),
        ("attention.v_proj_weight", (8, 4)),
        ("attention.out_proj", (8, 8)),
    ]
    assert plan.factorized == ()


class Wrapping(Tensor):
    """A tensor that holds another one, as quantized and distributed ones do."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapping:
        settings: Any = {"dtype": inner.dtype, "device": inner.device, "requires_grad": True}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, **settings)
        made.held = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: Any) -> Wrapping:
        return Wrapping(tensors["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        plain = [one.held if isinstance(one, Wrapping) else one for one in args]
        made = func(*plain, **(kwargs or {}))
        return Wrapping(made) if func is torch.ops.aten.detach.default else made


@pytest.mark.parametrize("given", [False, True], ids=["blind", "with inputs"])
def test_a_weight_that_is_no_plain_tensor_is_kept(given: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    inner = model.get_parameter("0.weight").detach().clone()
    model[0].weight = nn.Parameter(cast("Tensor", Wrapping(inner)))
    plan = tdfx.plan(model, FULL, example_inputs=batch() if given else None)
    assert plan["0"].reason is tdfx.Reason.PARAMETRIZED
    assert plan["0"].note == "its weight is a Wrapping, which is no plain tensor"
    assert plan["1"].factorized
    made = tdfx.rewrite(model, FULL)
    assert made.get_submodule("0") is not model[0]
    assert made.get_parameter("0.weight") is model[0].weight
    assert distance(made(batch()), model(batch())) < TOLERANCE


def test_a_weight_with_attributes_is_warned_of_and_rewritten() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).double()
    cast("Any", model[0].weight).label = "mine"
    with pytest.warns(tdfx.TdfxWarning, match="weight of site '0' has hooks or attributes of its own"):
        made = tdfx.rewrite(model, FULL)
    assert distance(made(batch()), model(batch())) < TOLERANCE
