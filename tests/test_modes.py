"""Graphs that follow the mode of each submodule: by an argument, by a selected constant, or by a second graph."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

import tdfx
from tdfx.passes.analysis.modes import Mode, by_mode, unify

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0)
LOW = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)
# Rounding of a few products of eight terms each, in sequence.
TOLERANCE = 1e4 * torch.finfo(torch.float64).eps


def batch() -> Tensor:
    return torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def seeded(model: nn.Module, x: Tensor | None = None) -> Any:
    torch.manual_seed(7)
    return model(batch() if x is None else x)


def distance(output: Tensor, other: Tensor) -> float:
    output, other = output.detach(), other.detach()
    return float((output - other).abs().max() / other.abs().max().clamp_min(1e-30))


def set_modes(model: nn.Module, modes: dict[str, bool]) -> None:
    """Set the mode of each of these submodules and of the modules inside it, outermost first."""
    for path, mode in modes.items():
        model.get_submodule(path).train(mode)


def agree(output: Any, other: Any) -> bool:
    """Return True if two outputs have the same structure and the same values."""
    if isinstance(other, Tensor):
        return isinstance(output, Tensor) and output.shape == other.shape and distance(output, other) < TOLERANCE
    return type(output) is type(other) and len(output) == len(other) and all(map(agree, output, other))


def graph_of(model: nn.Module, policy: tdfx.Policy = FULL) -> fx.GraphModule:
    rewritten = tdfx.rewrite(model, policy)
    assert isinstance(rewritten, fx.GraphModule), tdfx.plan(model, policy).notes
    return rewritten


def has_one_graph(model: fx.GraphModule) -> bool:
    model.train()
    train = model.graph
    model.eval()
    return model.graph is train


class Dropping(nn.Module):
    """Calls dropout as a function, which takes the mode as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5, training=self.training)


class Depth(nn.Module):
    """Calls stochastic depth, a function that torch.fx does not trace into."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.depth = StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.depth(self.layer(x))  # type: ignore[no-any-return]


class Scaling(nn.Module):
    """Has a constant for each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.layer(x), 0.1 if self.training else 0.5) * (2.0 if self.training else 3.0)


class Clipping(nn.Module):
    """Has constants inside lists and keyword arguments, of the same type in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        low, high = (-0.2, 0.3) if self.training else (-0.5, 0.1)
        y = torch.clamp(self.layer(x), min=low, max=high)
        return F.pad(y, [1, 2], value=1.0 if self.training else 2.0)[:, 1:-2]


BLOCKS: dict[str, Callable[[], nn.Module]] = {block.__name__: block for block in (Dropping, Depth, Scaling, Clipping)}


class Net(nn.Module):
    """Has two blocks of the same class, and code that reads its own mode."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = block()
        self.second = block()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).tanh())
        return self.head(x) * (1.5 if self.training else 1.0)  # type: ignore[no-any-return]


MIXED: list[dict[str, bool]] = [
    {"": True},
    {"": False},
    {"": True, "first": False},
    {"": True, "second": False},
    {"": False, "first": True},
    {"": False, "first": True, "second": True},
    {"": True, "first": False, "second": False},
]


@pytest.mark.parametrize("root", [False, True], ids=["alone", "in a model"])
@pytest.mark.parametrize("block", ["Dropping", "Depth"])
def test_an_argument_follows_the_mode_of_its_own_module(block: str, root: bool) -> None:
    dense = (nn.Sequential(BLOCKS[block](), BLOCKS[block]()) if not root else Net(BLOCKS[block])).double()
    for mode in (True, False):
        rewritten = graph_of(dense.train(mode))
        assert has_one_graph(rewritten)
    names = ("0", "1") if not root else ("first", "second")
    outputs = []
    for modes in MIXED:
        for model in (dense, rewritten):
            set_modes(
                model, {{"first": names[0], "second": names[1]}.get(path, path): mode for path, mode in modes.items()}
            )
        assert agree(seeded(rewritten), seeded(dense)), modes
        outputs.append(seeded(dense).detach())
    # Each combination of modes gives another output; if the root does not read its mode, only the first four differ.
    different = outputs if root else outputs[:4]
    for index, output in enumerate(different):
        assert all(distance(output, other) > 1e-3 for other in different[:index])


def test_a_graph_reads_the_mode_of_the_submodule_itself() -> None:
    rewritten = graph_of(Net(Dropping))
    read = [str(node.target) for node in rewritten.graph.nodes if node.op == "get_attr"]
    assert read == ["first.training", "second.training", "training"]
    assert "training" not in dict(rewritten.named_parameters())
    assert "self.first.training" in rewritten.code


@pytest.mark.parametrize("block", [Scaling, Clipping])
def test_constants_of_a_root_are_selected_in_one_graph(block: Callable[[], nn.Module]) -> None:
    dense = block().double()
    rewritten = graph_of(dense)
    assert has_one_graph(rewritten)
    assert tdfx.plan(dense, FULL).notes == ()
    outputs = []
    for mode in (True, False):
        assert agree(seeded(rewritten.train(mode)), seeded(dense.train(mode)))
        outputs.append(seeded(dense).detach())
    assert distance(*outputs) > 1e-3


@pytest.mark.parametrize("block", [Scaling, Clipping])
def test_constants_of_children_follow_the_childs_own_mode(block: Callable[[], nn.Module]) -> None:
    dense = nn.Sequential(block(), nn.Tanh(), block()).double()
    rewritten = graph_of(dense)
    assert has_one_graph(rewritten)
    assert tdfx.plan(dense, FULL).notes == ()
    for modes in ({"": True}, {"": False}, {"": True, "0": False}, {"": False, "2": True}):
        for model in (dense, rewritten):
            set_modes(model, modes)
        assert agree(seeded(rewritten), seeded(dense)), modes


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_called_if_two_modules_could_decide_its_constant(block: str) -> None:
    """The root also reads its mode, so that a constant in a block may depend on the root's mode or on the block's."""
    dense = Net(BLOCKS[block]).double()
    rewritten = graph_of(dense)
    assert has_one_graph(rewritten)
    called = [str(node.target) for node in rewritten.graph.nodes if node.op == "call_module"]
    kept = block in {"Scaling", "Clipping"}
    assert ("first" in called) == ("second" in called) == kept
    notes = tdfx.plan(dense, FULL).notes
    expected = f"the graph calls 2 {block} as it is: its forward differs between train and eval mode"
    assert notes == ((expected,) if kept else ())
    for modes in MIXED:
        for model in (dense, rewritten):
            set_modes(model, modes)
        assert agree(seeded(rewritten), seeded(dense)), modes


class ReturnsConstant(nn.Module):
    """Returns a constant that depends on its own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return self.layer(x), (0.5 if self.training else 2.0)


class Multiplies(nn.Module):
    """Calculates a constant from its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return self.layer(x) * (1 + self.training), 1.0


class CallsInner(nn.Module):
    def __init__(self, inner: nn.Module, decides: bool) -> None:
        super().__init__()
        self.inner = inner
        self.decides = decides

    def forward(self, x: Tensor) -> Tensor:
        y, scale = self.inner(x)
        offset = (1.0 if self.training else 3.0) if self.decides else 0.0
        return y * scale + offset  # type: ignore[no-any-return]


@pytest.mark.parametrize("decides", [False, True])
@pytest.mark.parametrize("inner", [ReturnsConstant, Multiplies])
def test_a_constant_may_leave_the_module_that_decided_it(inner: Callable[[], nn.Module], decides: bool) -> None:
    dense = CallsInner(inner(), decides).double()
    rewritten = tdfx.rewrite(dense, FULL)
    for modes in ({"": True}, {"": False}, {"": True, "inner": False}, {"": False, "inner": True}):
        for model in (dense, rewritten):
            set_modes(model, modes)
        assert agree(seeded(rewritten), seeded(dense)), modes


class Outputs(NamedTuple):
    main: Tensor
    auxiliary: Tensor


class TwoHeads(nn.Module):
    """Returns another structure in train mode than in eval mode, as GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.auxiliary = nn.Linear(8, 3)
        self.head = nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)
        self.label = "heads"

    def forward(self, x: Tensor) -> Tensor | Outputs:
        x = self.drop(self.body(x)).tanh()
        y: Tensor = self.head(x)
        if self.training:
            return Outputs(y, self.auxiliary(x))
        return y


def test_a_root_with_another_structure_in_each_mode_has_two_graphs() -> None:
    dense = TwoHeads().double()
    plan = tdfx.plan(dense, FULL)
    assert plan.notes == ()
    assert {site.name: site.calls for site in plan} == {"body": 1, "auxiliary": 1, "head": 1}
    rewritten = graph_of(dense)
    assert not has_one_graph(rewritten)
    for mode in (True, False, True):
        assert agree(seeded(rewritten.train(mode)), seeded(dense.train(mode)))
        assert isinstance(seeded(rewritten), Outputs) == mode
        targets = {node.target for node in rewritten.graph.nodes if node.op == "call_module"}
        assert ("auxiliary" in targets) == ("self.auxiliary" in rewritten.code) == mode
    assert isinstance(rewritten, TwoHeads)
    assert rewritten.label == "heads"
    assert list(rewritten.state_dict()) == list(graph_of(TwoHeads().double()).state_dict())
    low = graph_of(dense, LOW)
    assert distance(seeded(low.eval()), seeded(dense.eval())) > 1e-2


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_sites_that_only_train_mode_reaches_are_counted_in_train_mode(emit: Any) -> None:
    plan = tdfx.plan(TwoHeads(), LOW, example_inputs=(torch.randn(5, 8),), emit=emit)
    for name, width in (("body", 8), ("auxiliary", 3), ("head", 3)):
        assert plan[name].flops_before == 2 * 5 * 8 * width, name
        assert plan[name].factorized, name


def test_factorized_sites_of_both_modes_are_counted() -> None:
    x = (torch.randn(5, 8),)
    small = tdfx.rewrite(TwoHeads(), LOW, example_inputs=x)
    again = tdfx.plan(small, LOW, example_inputs=x)
    for site in tdfx.plan(TwoHeads(), LOW, example_inputs=x):
        assert again[site.name].flops_before == site.flops_after, site.name


class ReadsInEval(nn.Module):
    """Calls a layer in train mode, and reads its weight in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x if float(x.sum()) < 1e9 else x + 1)  # torch.fx cannot trace this
        out: Tensor = self.second(x) if self.training else x * self.second.weight.sum(0) + self.second.bias
        return out


def test_a_weight_that_is_read_in_eval_mode_is_kept_though_train_mode_calls_it() -> None:
    dense = ReadsInEval().double()
    x = torch.randn(4, 8, dtype=torch.float64)
    plan = tdfx.plan(dense, FULL, example_inputs=(x,))
    assert plan["second"].reason is tdfx.Reason.READ_ELSEWHERE
    rewritten = tdfx.rewrite(dense, plan)
    for mode in (True, False):
        assert agree(rewritten.train(mode)(x), dense.train(mode)(x))


class WantsTargets(nn.Module):
    """Needs targets in train mode; the layer that only train mode calls is by far the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 64)
        self.auxiliary = nn.Linear(64, 4096)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.body(x)
        if not self.training:
            out: Tensor = self.head(x)
            return out
        if targets is None:
            raise ValueError("no targets")
        loss: Tensor = (self.head(x) - targets).square().mean() + self.auxiliary(x).square().mean()
        return loss


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_budget_of_time_leaves_out_sites_without_times(emit: Any) -> None:
    cost = tdfx.Modelled(seconds_per_call=0, bytes_per_second=math.inf)
    budget = tdfx.Budget(speedup=1.5, strict=False)
    policy = tdfx.Policy(rank=budget, cost=cost, min_gain=0, round_to=1)
    plan = tdfx.plan(WantsTargets(), policy, example_inputs=(torch.randn(512, 64),), emit=emit)
    assert plan["auxiliary"].reason is tdfx.Reason.NOT_CALLED
    assert "do not reach it" in plan["auxiliary"].note
    assert [site.name for site in plan.factorized] == ["body", "head"]
    # The modelled time is arithmetic alone, and the sites that are reached must save a third of it.
    before, after = plan.flops_before, plan.flops_after
    assert before is not None
    assert after is not None
    assert 1.5 <= before / after < 1.7
    assert any("do not reach 'auxiliary', in train mode neither" in note for note in plan.notes)
    strict = tdfx.Policy(rank=tdfx.Budget(speedup=1.5), cost=cost, min_gain=0, include=("auxiliary",))
    with pytest.raises(tdfx.PolicyError, match="reach none of the 1 sites that it could decide, in train mode neither"):
        tdfx.plan(WantsTargets(), strict, example_inputs=(torch.randn(512, 64),), emit=emit)


def test_a_site_that_no_run_reaches_has_no_times_in_other_budgets() -> None:
    policy = tdfx.Policy(parameters=0.5, cost=tdfx.Measured(cache=False))
    plan = tdfx.plan(WantsTargets(), policy, example_inputs=(torch.randn(512, 64),))
    assert plan["auxiliary"].factorized
    assert (plan["auxiliary"].seconds_before, plan["auxiliary"].estimated) == (None, False)
    assert not any("not timed" in note for note in plan.notes)


def test_gradients_of_both_graphs_reach_the_same_parameters() -> None:
    dense = TwoHeads().double()
    rewritten = graph_of(dense)
    for mode in (True, False):
        for model in (dense, rewritten):
            model.train(mode).zero_grad()
            output = seeded(model)
            (sum(part.sum() for part in output) if mode else output.sum()).backward()
        bias = dense.get_parameter("body.bias").grad
        assert bias is not None
        assert rewritten.get_parameter("body.factors.1.bias") is dense.get_parameter("body.bias")
        reached = {name for name, parameter in rewritten.named_parameters() if parameter.grad is not None}
        assert any(name.startswith("auxiliary") for name in reached) == mode
        assert {name for name in reached if name.startswith("head")} != set()


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_either_mode_when_it_is_rewritten(training: bool) -> None:
    for build in (TwoHeads, Scaling, Dropping):
        dense = build().double().train(training)
        rewritten = graph_of(dense)
        assert rewritten.training is training
        assert all(module.training is training for module in rewritten.modules())
        assert agree(seeded(rewritten), seeded(dense))
        for mode in (not training, training):
            assert agree(seeded(rewritten.train(mode)), seeded(dense.train(mode)))


def test_two_graphs_copy_and_pickle() -> None:
    dense = TwoHeads().double()
    rewritten = graph_of(dense, LOW)
    rewritten.__dict__["label"] = "mine"
    for training in (True, False):
        rewritten.train(training)
        for twin in (copy.deepcopy(rewritten), pickle.loads(pickle.dumps(rewritten)), copy.copy(rewritten)):
            assert twin.training is training
            assert twin.label == "mine"
            for mode in (True, False):
                assert agree(seeded(twin.train(mode)), seeded(rewritten.train(mode)))
            assert not has_one_graph(twin)
            rewritten.train(training)
    deep = copy.deepcopy(rewritten)
    assert not {id(parameter) for parameter in deep.parameters()} & {
        id(parameter) for parameter in rewritten.parameters()
    }
    assert {id(parameter) for parameter in copy.copy(rewritten).parameters()} == {
        id(parameter) for parameter in rewritten.parameters()
    }
    again = tdfx.rewrite(rewritten, tdfx.plan(dense, LOW))
    assert isinstance(again, fx.GraphModule)
    assert not has_one_graph(again)
    for mode in (True, False):
        assert agree(seeded(again.train(mode)), seeded(rewritten.train(mode)))


def test_two_graphs_compile_and_export() -> None:
    rewritten = graph_of(TwoHeads().double(), LOW)
    for mode in (True, False, True):
        rewritten.train(mode)
        torch._dynamo.reset()
        compiled: Any = torch.compile(rewritten, fullgraph=True, backend="eager")
        assert agree(seeded(compiled), seeded(rewritten))
    compiled.eval()
    assert agree(seeded(compiled), seeded(rewritten))
    assert isinstance(seeded(compiled), Tensor)
    for mode in (True, False):
        exported = torch.export.export(rewritten.train(mode), (batch(),)).module()
        assert isinstance(seeded(exported), Tensor) != mode
        assert agree(list(seeded(exported)), list(seeded(rewritten)))


@pytest.mark.parametrize("block", BLOCKS)
def test_one_graph_for_both_modes_compiles_and_exports(block: str) -> None:
    rewritten = graph_of(nn.Sequential(BLOCKS[block](), BLOCKS[block]()).double(), LOW)
    torch._dynamo.reset()
    compiled: Any = torch.compile(rewritten, fullgraph=True, backend="eager")
    for modes in ({"": True}, {"": False}, {"": True, "0": False}):
        set_modes(rewritten, modes)
        assert agree(seeded(compiled), seeded(rewritten)), modes
        exported = torch.export.export(rewritten, (batch(),)).module()
        assert agree(seeded(exported), seeded(rewritten)), modes


@pytest.mark.parametrize("block", BLOCKS)
def test_one_graph_for_both_modes_copies_and_pickles(block: str) -> None:
    rewritten = graph_of(nn.Sequential(BLOCKS[block](), BLOCKS[block]()).double(), LOW)
    for twin in (copy.deepcopy(rewritten), pickle.loads(pickle.dumps(rewritten)), copy.copy(rewritten)):
        for modes in ({"": True}, {"": False}, {"": True, "0": False}):
            for model in (rewritten, twin):
                set_modes(model, modes)
            assert distance(seeded(twin), seeded(rewritten)) == 0, modes


def test_two_graphs_train_and_merge() -> None:
    dense = TwoHeads().double()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)
    rewritten = tdfx.rewrite(dense, LOW, optimizer=optimizer)
    assert isinstance(rewritten, fx.GraphModule)
    held = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert held == {id(parameter) for parameter in rewritten.parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        main, auxiliary = seeded(rewritten)
        (main.square().mean() + auxiliary.square().mean()).backward()
        optimizer.step()
    optimizer.zero_grad()
    merged = tdfx.merge(rewritten, optimizer=optimizer)
    assert type(merged) is TwoHeads
    assert set(vars(merged)) == set(vars(dense))
    assert list(merged.state_dict()) == list(dense.state_dict())
    for mode in (True, False):
        assert agree(seeded(merged.train(mode)), seeded(rewritten.train(mode)))
    whole = nn.Sequential(nn.Linear(8, 8).double(), rewritten.eval())
    inner = tdfx.merge(whole)
    assert isinstance(inner, nn.Sequential)
    assert type(inner[1]) is TwoHeads
    assert distance(inner(batch()), whole(batch())) < TOLERANCE


def test_recompile_and_another_graph() -> None:
    dense = TwoHeads().double()
    rewritten = graph_of(dense)
    for mode in (True, False):
        rewritten.train(mode)
        before = seeded(rewritten)
        for node in rewritten.graph.nodes:
            if node.target == "tanh":
                node.target = "sigmoid"
        assert agree(seeded(rewritten), before), "the code changed before recompile()"
        rewritten.recompile()
        assert not agree(seeded(rewritten), before)
        assert isinstance(rewritten, TwoHeads)
    changed = seeded(rewritten)
    rewritten.graph = copy.deepcopy(rewritten.graph)
    assert agree(seeded(rewritten), changed)
    rewritten.train()
    assert isinstance(seeded(rewritten), Outputs)
    graph = fx.Graph()
    graph.output(graph.call_module("head", (graph.placeholder("x"),)))
    rewritten.graph = graph
    assert agree(seeded(rewritten), rewritten.get_submodule("head")(batch()))
    assert isinstance(seeded(rewritten.eval()), Tensor)
    assert agree(seeded(rewritten), changed)
    rewritten.graph = graph
    assert agree(seeded(rewritten), rewritten.get_submodule("head")(batch()))


def test_recompile_and_another_graph_of_a_model_with_one_graph() -> None:
    rewritten = graph_of(nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double())
    before = seeded(rewritten)
    assert rewritten.recompile() is not None
    assert agree(seeded(rewritten), before)
    graph = fx.Graph()
    graph.output(graph.call_module("0", (graph.placeholder("input"),)))
    rewritten.graph = graph
    assert agree(seeded(rewritten).tanh(), before)
    assert rewritten.graph is graph
    assert isinstance(rewritten, nn.Sequential)
    assert agree(seeded(copy.deepcopy(rewritten)).tanh(), before)


class Extra(nn.Module):
    """Calls a second layer in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.more = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + self.more(x).tanh() if self.training else y


def test_a_block_with_another_structure_in_each_mode_is_called_and_follows_its_mode() -> None:
    dense = nn.Sequential(Extra(), nn.Tanh(), Extra()).double()
    plan = tdfx.plan(dense, FULL)
    note = "the graph calls 2 Extra as it is: its forward differs between train and eval mode"
    assert plan.notes == (note,)
    assert len(plan.factorized) == 4
    rewritten = graph_of(dense)
    assert has_one_graph(rewritten)
    assert [str(node.target) for node in rewritten.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    for modes in ({"": True}, {"": False}, {"": True, "0": False}, {"": False, "2": True}):
        for model in (dense, rewritten):
            set_modes(model, modes)
        assert agree(seeded(rewritten), seeded(dense)), modes
    assert distance(seeded(rewritten.train()), seeded(rewritten.eval())) > 1e-2


class Frozen(nn.Module):
    """Keeps its norm in eval mode, whatever mode is set."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = Dropping()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.layer(x)))  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_the_models_own_train_method_works_after_a_rewrite(emit: tdfx.Emit) -> None:
    dense = Frozen().double()
    rewritten = tdfx.rewrite(dense, FULL, emit=emit)
    assert isinstance(rewritten, fx.GraphModule) == (emit == "graph")
    for mode in (True, False, True):
        assert rewritten.train(mode) is rewritten
        dense.train(mode)
        assert rewritten.training is mode
        assert not rewritten.get_submodule("norm").training
        assert rewritten.get_submodule("drop").training is mode
        assert agree(seeded(rewritten), seeded(dense))
    dense.eval()
    again = tdfx.rewrite(dense.train(), FULL)
    assert again.training
    assert not again.get_submodule("norm").training


class TrainingIs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (2.0 if self.training is True else 1.0)  # type: ignore[no-any-return]


class TrainingEquals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (2.0 if self.training == 1 else 1.0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [TrainingIs, TrainingEquals])
def test_a_mode_that_is_compared_decides_as_in_the_dense_model(build: Callable[[], nn.Module]) -> None:
    for dense in (build().double(), nn.Sequential(build(), nn.Tanh()).double()):
        rewritten = tdfx.rewrite(dense, FULL)
        outputs = []
        for mode in (True, False):
            assert agree(seeded(rewritten.train(mode)), seeded(dense.train(mode)))
            outputs.append(seeded(rewritten))
        assert distance(*outputs) > 1e-2


def test_a_mode_that_is_compared_by_identity_keeps_the_class() -> None:
    (note,) = tdfx.plan(TrainingIs(), FULL).notes
    assert "not as a graph: its forward asks whether self.training is True (test_modes.py:" in note
    assert type(tdfx.rewrite(TrainingIs(), FULL)) is TrainingIs


def test_slices_and_indices_of_a_rewritten_sequence() -> None:
    dense = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Dropping(), nn.Linear(8, 4)).double()
    rewritten: Any = graph_of(dense)
    assert isinstance(rewritten[0], tdfx.Factorized)
    assert rewritten[0] is rewritten.get_submodule("0")
    assert rewritten[-1] is rewritten.get_submodule("3")
    tail = rewritten[1:]
    assert type(tail) is nn.Sequential
    assert len(tail) == 3
    for mode in (True, False):
        dense.train(mode)
        assert agree(seeded(tail.train(mode)), seeded(dense[1:]))
    assert agree(seeded(rewritten.eval()[:1]), seeded(dense[:1]))
    with pytest.raises(IndexError):
        rewritten[4]
    twin = copy.deepcopy(rewritten)
    assert twin[0] is not rewritten[0]
    assert isinstance(twin[0], tdfx.Factorized)
    modules: Any = tdfx.rewrite(dense, FULL, emit="modules")
    assert type(modules[1:]) is nn.Sequential


def test_by_mode() -> None:
    assert by_mode(True, 1, 2) == 1
    assert by_mode(False, 1, 2) == 2


def test_a_mode_behaves_as_its_number_and_reports_its_use() -> None:
    reported: list[str] = []
    on, off = Mode(True, "a.b", reported.append), Mode(False, "", reported.append)
    assert [1 if mode else 0 for mode in (on, off)] == [1, 0]
    assert reported == ["a.b", ""]
    reported.clear()
    numbers: Any = on, off
    assert (int(numbers[0]), float(numbers[1]), [5, 6][numbers[0]], numbers[0] >= 1) == (1, 0.0, 6, True)
    assert reported == ["a.b", "", "a.b", "a.b"]
    reported.clear()
    tracer = fx.Tracer()
    tracer.graph = fx.Graph()
    nodes: list[Any] = [tracer.create_arg(mode) for mode in (on, off)]
    assert [(node.op, node.target) for node in nodes] == [("get_attr", "a.b.training"), ("get_attr", "training")]


def graph(*constants: Any, function: Callable[..., Any] = torch.add, stack: str = "", **named: Any) -> fx.Graph:
    """Return a graph that calls a function on its input and these arguments, in the module at ``stack``."""
    result = fx.Graph()
    x = result.placeholder("x")
    node = result.call_function(function, (x, *constants), named)
    node.meta["nn_module_stack"] = {"": ("", nn.Module), stack: (stack, nn.Module)}
    result.output(node)
    return result


def run(graph: fx.Graph | None, training: dict[str, bool], x: Tensor) -> Any:
    assert graph is not None
    root = nn.Module()
    root.add_module("a", nn.Module())
    for path, mode in training.items():
        root.get_submodule(path).training = mode
    return fx.GraphModule(root, graph)(x)


def test_graphs_that_differ_in_a_constant_are_unified() -> None:
    x = torch.ones(3)
    for path, other in (("", "a"), ("a", "")):
        unified = unify(graph(1.0, stack="a"), graph(2.0, stack="a"), {path})
        for mode in (True, False):
            assert torch.equal(run(unified, {path: mode, other: not mode}, x), x + (1 if mode else 2))
    unified = unify(graph(1.0, alpha=3), graph(1.0, alpha=4), {""})
    assert torch.equal(run(unified, {"": False}, x), x + 4)
    assert torch.equal(run(unified, {"": True}, x), x + 3)
    unified = unify(graph([2, 3], function=Tensor.new_zeros), graph([2, 4], function=Tensor.new_zeros), {""})
    assert run(unified, {"": True}, x).shape == (2, 3)
    assert run(unified, {"": False}, x).shape == (2, 4)
    assert unified is not None
    unified.lint()


def test_unify_does_not_change_the_given_graphs() -> None:
    train, evaluation = graph(1.0), graph(2.0)
    before = [str(graph) for graph in (train, evaluation)]
    assert unify(train, evaluation, {""}) is not None
    assert [str(graph) for graph in (train, evaluation)] == before


@pytest.mark.parametrize(
    ("train", "evaluation", "deciders"),
    [
        pytest.param(graph(1.0), graph(1.0, function=torch.mul), {""}, id="another function"),
        pytest.param(graph(1.0), graph(2.0), set(), id="no module decided"),
        pytest.param(graph(1.0, stack="a"), graph(2.0, stack="a"), {"", "a"}, id="two modules could decide"),
        pytest.param(graph(1.0, stack="b"), graph(2.0, stack="b"), {"a"}, id="another module decided"),
        pytest.param(graph(1.0), graph(1.0, alpha=2), {""}, id="another argument"),
        pytest.param(graph(1.0, alpha=2), graph(1.0, out=None), {""}, id="other names"),
        pytest.param(graph(), graph(0.1), {""}, id="an additional argument"),
    ],
)
def test_graphs_with_other_differences_are_not_unified(
    train: fx.Graph, evaluation: fx.Graph, deciders: set[str]
) -> None:
    assert unify(train, evaluation, deciders) is None


def test_graphs_of_another_structure_are_not_unified() -> None:
    def chain(*functions: Callable[..., Any], swap: bool = False) -> fx.Graph:
        result = fx.Graph()
        x = result.placeholder("x")
        nodes = [result.call_function(function, (x,)) for function in functions]
        result.output(tuple(reversed(nodes)) if swap else tuple(nodes))
        return result

    base = (torch.sin, torch.cos)
    assert unify(chain(*base), chain(*base), {""}) is not None
    assert unify(chain(*base), chain(torch.sin), {""}) is None
    assert unify(chain(torch.sin), chain(*base), {""}) is None
    # The same nodes, returned in another order.
    assert unify(chain(*base), chain(*base, swap=True), {""}) is None
    assert unify(chain(torch.sin, torch.sin), chain(torch.sin, torch.sin, swap=True), {""}) is None


class WithLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)


class AdditionalKeyword(WithLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.add(y, 1.0, alpha=2) if self.training else torch.add(y, 1.0)


class AdditionalArgument(WithLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.clamp(y, 0.0) if self.training else torch.clamp(y, 0.0, 0.1)


class AdditionalTensor(WithLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.cat([y, x] if self.training else [y], 1)


class ComputedSlice(WithLayer):
    """Has a slice whose end is computed, the same in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * (2.0 if self.training else 1.0)
        return y[:, : x.size(1) - 2]  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [AdditionalKeyword, AdditionalArgument, AdditionalTensor, ComputedSlice])
def test_calls_with_other_arguments_in_each_mode(build: Callable[[], nn.Module]) -> None:
    dense = build().double()
    rewritten = graph_of(dense)
    for mode in (True, False):
        assert agree(seeded(rewritten.train(mode)), seeded(dense.train(mode)))
