"""Graphs that follow train and eval mode, submodule by submodule: by an argument, by a constant, or by a second graph."""

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
# A few products of eight terms each, one after the other.
TOLERANCE = 1e4 * torch.finfo(torch.float64).eps


def batch() -> Tensor:
    return torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def seeded(model: nn.Module, x: Tensor | None = None) -> Any:
    torch.manual_seed(7)
    return model(batch() if x is None else x)


def distance(one: Tensor, other: Tensor) -> float:
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def set_modes(model: nn.Module, modes: dict[str, bool]) -> None:
    """Set the mode of each of these submodules and of all that lies in it, outermost first."""
    for path, mode in modes.items():
        model.get_submodule(path).train(mode)


def agree(one: Any, other: Any) -> bool:
    """Return True for the same outputs, whatever their structure."""
    if isinstance(other, Tensor):
        return isinstance(one, Tensor) and one.shape == other.shape and distance(one, other) < TOLERANCE
    return type(one) is type(other) and len(one) == len(other) and all(map(agree, one, other))


def graph_of(model: nn.Module, policy: tdfx.Policy = FULL) -> fx.GraphModule:
    made = tdfx.rewrite(model, policy)
    assert isinstance(made, fx.GraphModule), tdfx.plan(model, policy).notes
    return made


def one_graph(made: fx.GraphModule) -> bool:
    made.train()
    train = made.graph
    made.eval()
    return made.graph is train


class Dropping(nn.Module):
    """Dropout as a function, which takes the mode as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5, training=self.training)


class Depth(nn.Module):
    """Stochastic depth: a function that torch.fx is told not to look into."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.depth = StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.depth(self.layer(x))  # type: ignore[no-any-return]


class Scaling(nn.Module):
    """A constant for each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.layer(x), 0.1 if self.training else 0.5) * (2.0 if self.training else 3.0)


class Clipping(nn.Module):
    """Constants inside lists and keyword arguments, of the same kind in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        low, high = (-0.2, 0.3) if self.training else (-0.5, 0.1)
        y = torch.clamp(self.layer(x), min=low, max=high)
        return F.pad(y, [1, 2], value=1.0 if self.training else 2.0)[:, 1:-2]


BLOCKS: dict[str, Callable[[], nn.Module]] = {one.__name__: one for one in (Dropping, Depth, Scaling, Clipping)}


class Net(nn.Module):
    """Two blocks of one kind and a mode of its own."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.one = block()
        self.other = block()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.one(x).tanh())
        return self.head(x) * (1.5 if self.training else 1.0)  # type: ignore[no-any-return]


MIXED: list[dict[str, bool]] = [
    {"": True},
    {"": False},
    {"": True, "one": False},
    {"": True, "other": False},
    {"": False, "one": True},
    {"": False, "one": True, "other": True},
    {"": True, "one": False, "other": False},
]


@pytest.mark.parametrize("root", [False, True], ids=["alone", "in a model"])
@pytest.mark.parametrize("block", ["Dropping", "Depth"])
def test_an_argument_follows_the_mode_of_its_own_module(block: str, root: bool) -> None:
    dense = (nn.Sequential(BLOCKS[block](), BLOCKS[block]()) if not root else Net(BLOCKS[block])).double()
    for mode in (True, False):
        made = graph_of(dense.train(mode))
        assert one_graph(made)
    names = ("0", "1") if not root else ("one", "other")
    outputs = []
    for modes in MIXED:
        for model in (dense, made):
            set_modes(
                model, {{"one": names[0], "other": names[1]}.get(path, path): mode for path, mode in modes.items()}
            )
        assert agree(seeded(made), seeded(dense)), modes
        outputs.append(seeded(dense).detach())
    # The modes do make a difference; only where the root has none of its own, some of these are the same.
    each = outputs if root else outputs[:4]
    for index, one in enumerate(each):
        assert all(distance(one, other) > 1e-3 for other in each[:index])


def test_the_mode_in_a_graph_is_read_from_the_very_submodule() -> None:
    made = graph_of(Net(Dropping))
    read = [str(node.target) for node in made.graph.nodes if node.op == "get_attr"]
    assert read == ["one.training", "other.training", "training"]
    assert "training" not in dict(made.named_parameters())
    assert "self.one.training" in made.code


@pytest.mark.parametrize("block", [Scaling, Clipping])
def test_constants_of_a_root_become_one_graph(block: Callable[[], nn.Module]) -> None:
    dense = block().double()
    made = graph_of(dense)
    assert one_graph(made)
    assert tdfx.plan(dense, FULL).notes == ()
    outputs = []
    for mode in (True, False):
        assert agree(seeded(made.train(mode)), seeded(dense.train(mode)))
        outputs.append(seeded(dense).detach())
    assert distance(*outputs) > 1e-3


@pytest.mark.parametrize("block", [Scaling, Clipping])
def test_constants_of_children_follow_the_childs_own_mode(block: Callable[[], nn.Module]) -> None:
    dense = nn.Sequential(block(), nn.Tanh(), block()).double()
    made = graph_of(dense)
    assert one_graph(made)
    assert tdfx.plan(dense, FULL).notes == ()
    for modes in ({"": True}, {"": False}, {"": True, "0": False}, {"": False, "2": True}):
        for model in (dense, made):
            set_modes(model, modes)
        assert agree(seeded(made), seeded(dense)), modes


@pytest.mark.parametrize("block", BLOCKS)
def test_where_two_modules_could_decide_a_constant_the_block_is_called_as_it_is(block: str) -> None:
    """The root decides a constant of its own, so in a block it is not known whose mode decides another one."""
    dense = Net(BLOCKS[block]).double()
    made = graph_of(dense)
    assert one_graph(made)
    called = [str(node.target) for node in made.graph.nodes if node.op == "call_module"]
    kept = block in {"Scaling", "Clipping"}
    assert ("one" in called) == ("other" in called) == kept
    notes = tdfx.plan(dense, FULL).notes
    expected = f"the graph calls 2 {block} as it is: its forward is another one in train than in eval mode"
    assert notes == ((expected,) if kept else ())
    for modes in MIXED:
        for model in (dense, made):
            set_modes(model, modes)
        assert agree(seeded(made), seeded(dense)), modes


class Answers(nn.Module):
    """Hands a constant that its own mode decides to whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return self.layer(x), (0.5 if self.training else 2.0)


class Multiplies(nn.Module):
    """Decides a constant by arithmetic with its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return self.layer(x) * (1 + self.training), 1.0


class Asks(nn.Module):
    def __init__(self, inner: nn.Module, decides: bool) -> None:
        super().__init__()
        self.inner = inner
        self.decides = decides

    def forward(self, x: Tensor) -> Tensor:
        y, scale = self.inner(x)
        offset = (1.0 if self.training else 3.0) if self.decides else 0.0
        return y * scale + offset  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "decides",
    [
        False,
        True,
    ],
)
@pytest.mark.parametrize("inner", [Answers, Multiplies])
def test_a_constant_that_leaves_the_module_that_decided_it(inner: Callable[[], nn.Module], decides: bool) -> None:
    dense = Asks(inner(), decides).double()
    made = tdfx.rewrite(dense, FULL)
    for modes in ({"": True}, {"": False}, {"": True, "inner": False}, {"": False, "inner": True}):
        for model in (dense, made):
            set_modes(model, modes)
        assert agree(seeded(made), seeded(dense)), modes


class Outputs(NamedTuple):
    main: Tensor
    auxiliary: Tensor


class TwoHeads(nn.Module):
    """As GoogLeNet: another output in train than in eval mode."""

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


def test_another_structure_of_the_root_gives_a_graph_for_each_mode() -> None:
    dense = TwoHeads().double()
    plan = tdfx.plan(dense, FULL)
    assert plan.notes == ()
    assert {site.name: site.calls for site in plan} == {"body": 1, "auxiliary": 1, "head": 1}
    made = graph_of(dense)
    assert not one_graph(made)
    for mode in (True, False, True):
        assert agree(seeded(made.train(mode)), seeded(dense.train(mode)))
        assert isinstance(seeded(made), Outputs) == mode
        targets = {node.target for node in made.graph.nodes if node.op == "call_module"}
        assert ("auxiliary" in targets) == ("self.auxiliary" in made.code) == mode
    assert isinstance(made, TwoHeads)
    assert made.label == "heads"
    assert list(made.state_dict()) == list(graph_of(TwoHeads().double()).state_dict())
    low = graph_of(dense, LOW)
    assert distance(seeded(low.eval()), seeded(dense.eval())) > 1e-2


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_what_only_train_mode_reaches_is_counted_as_it_is_there(emit: Any) -> None:
    plan = tdfx.plan(TwoHeads(), LOW, example_inputs=(torch.randn(5, 8),), emit=emit)
    for name, width in (("body", 8), ("auxiliary", 3), ("head", 3)):
        assert plan[name].flops_before == 2 * 5 * 8 * width, name
        assert plan[name].factorized, name


def test_what_is_factorized_already_is_counted_so_too() -> None:
    x = (torch.randn(5, 8),)
    small = tdfx.rewrite(TwoHeads(), LOW, example_inputs=x)
    again = tdfx.plan(small, LOW, example_inputs=x)
    for one in tdfx.plan(TwoHeads(), LOW, example_inputs=x):
        assert again[one.name].flops_before == one.flops_after, one.name


class ReadsInEval(nn.Module):
    """Calls a layer in train mode, and takes its weight by itself in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x if float(x.sum()) < 1e9 else x + 1)  # no graph shows this
        out: Tensor = self.second(x) if self.training else x @ self.second.weight.T + self.second.bias
        return out


def test_a_weight_that_is_read_in_eval_mode_is_kept_though_train_mode_calls_it() -> None:
    dense = ReadsInEval().double()
    x = torch.randn(4, 8, dtype=torch.float64)
    plan = tdfx.plan(dense, FULL, example_inputs=(x,))
    assert plan["second"].reason is tdfx.Reason.READ_ELSEWHERE
    made = tdfx.rewrite(dense, plan)
    for mode in (True, False):
        assert agree(made.train(mode)(x), dense.train(mode)(x))


class WantsTargets(nn.Module):
    """Runs on inputs alone in eval mode only; its other head is by far the largest layer."""

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
def test_a_budget_of_time_leaves_alone_what_nobody_knows_the_time_of(emit: Any) -> None:
    cost = tdfx.Modelled(seconds_per_call=0, bytes_per_second=math.inf)
    budget = tdfx.Budget(speedup=1.5, strict=False)
    policy = tdfx.Policy(rank=budget, cost=cost, min_gain=0, round_to=1)
    plan = tdfx.plan(WantsTargets(), policy, example_inputs=(torch.randn(512, 64),), emit=emit)
    assert plan["auxiliary"].reason is tdfx.Reason.NOT_CALLED
    assert "do not reach it" in plan["auxiliary"].note
    assert [one.name for one in plan.factorized] == ["body", "head"]
    # All that is left is arithmetic, of which the sites that are reached have to save a third.
    before, after = plan.flops_before, plan.flops_after
    assert before is not None
    assert after is not None
    assert 1.5 <= before / after < 1.7
    assert any("do not reach 'auxiliary', in train mode neither" in one for one in plan.notes)
    strict = tdfx.Policy(rank=tdfx.Budget(speedup=1.5), cost=cost, min_gain=0, include=("auxiliary",))
    with pytest.raises(tdfx.PolicyError, match="reach none of the 1 sites that it could decide, in train mode neither"):
        tdfx.plan(WantsTargets(), strict, example_inputs=(torch.randn(512, 64),), emit=emit)


def test_what_no_run_reaches_has_no_times_in_other_budgets_either() -> None:
    policy = tdfx.Policy(parameters=0.5, cost=tdfx.Measured(cache=False))
    plan = tdfx.plan(WantsTargets(), policy, example_inputs=(torch.randn(512, 64),))
    assert plan["auxiliary"].factorized
    assert (plan["auxiliary"].seconds_before, plan["auxiliary"].estimated) == (None, False)
    assert not any("not timed" in one for one in plan.notes)


def test_gradients_of_both_graphs_reach_the_same_parameters() -> None:
    dense = TwoHeads().double()
    made = graph_of(dense)
    for mode in (True, False):
        for model in (dense, made):
            model.train(mode).zero_grad()
            output = seeded(model)
            (sum(one.sum() for one in output) if mode else output.sum()).backward()
        bias = dense.get_parameter("body.bias").grad
        assert bias is not None
        assert made.get_parameter("body.factors.1.bias") is dense.get_parameter("body.bias")
        reached = {name for name, one in made.named_parameters() if one.grad is not None}
        assert any(name.startswith("auxiliary") for name in reached) == mode
        assert {name for name in reached if name.startswith("head")} != set()


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_either_mode_when_it_is_rewritten(training: bool) -> None:
    for build in (TwoHeads, Scaling, Dropping):
        dense = build().double().train(training)
        made = graph_of(dense)
        assert made.training is training
        assert all(one.training is training for one in made.modules())
        assert agree(seeded(made), seeded(dense))
        for mode in (not training, training):
            assert agree(seeded(made.train(mode)), seeded(dense.train(mode)))


def test_two_graphs_copy_and_pickle() -> None:
    dense = TwoHeads().double()
    made = graph_of(dense, LOW)
    made.__dict__["label"] = "mine"
    for training in (True, False):
        made.train(training)
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), copy.copy(made)):
            assert twin.training is training
            assert twin.label == "mine"
            for mode in (True, False):
                assert agree(seeded(twin.train(mode)), seeded(made.train(mode)))
            assert not one_graph(twin)
            made.train(training)
    deep = copy.deepcopy(made)
    assert not {id(one) for one in deep.parameters()} & {id(one) for one in made.parameters()}
    assert {id(one) for one in copy.copy(made).parameters()} == {id(one) for one in made.parameters()}
    again = tdfx.rewrite(made, tdfx.plan(dense, LOW))
    assert isinstance(again, fx.GraphModule)
    assert not one_graph(again)
    for mode in (True, False):
        assert agree(seeded(again.train(mode)), seeded(made.train(mode)))


def test_two_graphs_compile_and_export() -> None:
    made = graph_of(TwoHeads().double(), LOW)
    for mode in (True, False, True):
        made.train(mode)
        torch._dynamo.reset()
        compiled: Any = torch.compile(made, fullgraph=True, backend="eager")
        assert agree(seeded(compiled), seeded(made))
    compiled.eval()
    assert agree(seeded(compiled), seeded(made))
    assert isinstance(seeded(compiled), Tensor)
    for mode in (True, False):
        exported = torch.export.export(made.train(mode), (batch(),)).module()
        assert isinstance(seeded(exported), Tensor) != mode
        assert agree(list(seeded(exported)), list(seeded(made)))


@pytest.mark.parametrize("block", BLOCKS)
def test_one_graph_for_both_modes_compiles_and_exports(block: str) -> None:
    made = graph_of(nn.Sequential(BLOCKS[block](), BLOCKS[block]()).double(), LOW)
    torch._dynamo.reset()
    compiled: Any = torch.compile(made, fullgraph=True, backend="eager")
    for modes in ({"": True}, {"": False}, {"": True, "0": False}):
        set_modes(made, modes)
        assert agree(seeded(compiled), seeded(made)), modes
        exported = torch.export.export(made, (batch(),)).module()
        assert agree(seeded(exported), seeded(made)), modes


@pytest.mark.parametrize("block", BLOCKS)
def test_one_graph_for_both_modes_copies_and_pickles(block: str) -> None:
    made = graph_of(nn.Sequential(BLOCKS[block](), BLOCKS[block]()).double(), LOW)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), copy.copy(made)):
        for modes in ({"": True}, {"": False}, {"": True, "0": False}):
            for model in (made, twin):
                set_modes(model, modes)
            assert distance(seeded(twin), seeded(made)) == 0, modes


def test_two_graphs_train_and_merge() -> None:
    dense = TwoHeads().double()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)
    made = tdfx.rewrite(dense, LOW, optimizer=optimizer)
    assert isinstance(made, fx.GraphModule)
    held = {id(one) for one in optimizer.param_groups[0]["params"]}
    assert held == {id(one) for one in made.parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        main, auxiliary = seeded(made)
        (main.square().mean() + auxiliary.square().mean()).backward()
        optimizer.step()
    optimizer.zero_grad()
    merged = tdfx.merge(made, optimizer=optimizer)
    assert type(merged) is TwoHeads
    assert set(vars(merged)) == set(vars(dense))
    assert list(merged.state_dict()) == list(dense.state_dict())
    for mode in (True, False):
        assert agree(seeded(merged.train(mode)), seeded(made.train(mode)))
    whole = nn.Sequential(nn.Linear(8, 8).double(), made.eval())
    inner = tdfx.merge(whole)
    assert isinstance(inner, nn.Sequential)
    assert type(inner[1]) is TwoHeads
    assert distance(inner(batch()), whole(batch())) < TOLERANCE


def test_recompile_and_another_graph() -> None:
    dense = TwoHeads().double()
    made = graph_of(dense)
    for mode in (True, False):
        made.train(mode)
        before = seeded(made)
        for node in made.graph.nodes:
            if node.target == "tanh":
                node.target = "sigmoid"
        assert agree(seeded(made), before), "the code is as old as the graph was"
        made.recompile()
        assert not agree(seeded(made), before)
        assert isinstance(made, TwoHeads)
    changed = seeded(made)
    made.graph = copy.deepcopy(made.graph)
    assert agree(seeded(made), changed)
    made.train()
    assert isinstance(seeded(made), Outputs)
    graph = fx.Graph()
    graph.output(graph.call_module("head", (graph.placeholder("x"),)))
    made.graph = graph
    assert agree(seeded(made), made.get_submodule("head")(batch()))
    assert isinstance(seeded(made.eval()), Tensor)
    assert agree(seeded(made), changed)
    made.graph = graph
    assert agree(seeded(made), made.get_submodule("head")(batch()))


def test_recompile_and_another_graph_of_a_model_with_one() -> None:
    made = graph_of(nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double())
    before = seeded(made)
    assert made.recompile() is not None
    assert agree(seeded(made), before)
    graph = fx.Graph()
    graph.output(graph.call_module("0", (graph.placeholder("input"),)))
    made.graph = graph
    assert agree(seeded(made).tanh(), before)
    assert made.graph is graph
    assert isinstance(made, nn.Sequential)
    assert agree(seeded(copy.deepcopy(made)).tanh(), before)


class Extra(nn.Module):
    """A block that computes something else in train than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.more = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + self.more(x).tanh() if self.training else y


def test_another_structure_of_a_block_keeps_the_block_and_its_own_mode_decides() -> None:
    dense = nn.Sequential(Extra(), nn.Tanh(), Extra()).double()
    plan = tdfx.plan(dense, FULL)
    note = "the graph calls 2 Extra as it is: its forward is another one in train than in eval mode"
    assert plan.notes == (note,)
    assert len(plan.factorized) == 4
    made = graph_of(dense)
    assert one_graph(made)
    assert [str(node.target) for node in made.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    for modes in ({"": True}, {"": False}, {"": True, "0": False}, {"": False, "2": True}):
        for model in (dense, made):
            set_modes(model, modes)
        assert agree(seeded(made), seeded(dense)), modes
    assert distance(seeded(made.train()), seeded(made.eval())) > 1e-2


class Frozen(nn.Module):
    """Keeps its norm in eval mode, whatever it is told."""

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
def test_a_train_of_the_models_own_works_on_what_comes_back(emit: tdfx.Emit) -> None:
    dense = Frozen().double()
    made = tdfx.rewrite(dense, FULL, emit=emit)
    assert isinstance(made, fx.GraphModule) == (emit == "graph")
    for mode in (True, False, True):
        assert made.train(mode) is made
        dense.train(mode)
        assert made.training is mode
        assert not made.get_submodule("norm").training
        assert made.get_submodule("drop").training is mode
        assert agree(seeded(made), seeded(dense))
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
def test_a_mode_that_is_compared_decides_as_it_does(build: Callable[[], nn.Module]) -> None:
    for dense in (build().double(), nn.Sequential(build(), nn.Tanh()).double()):
        made = tdfx.rewrite(dense, FULL)
        outputs = []
        for mode in (True, False):
            assert agree(seeded(made.train(mode)), seeded(dense.train(mode)))
            outputs.append(seeded(made))
        assert distance(*outputs) > 1e-2


def test_a_mode_whose_identity_is_asked_for_keeps_the_class() -> None:
    note = "given back as TrainingIs, not as a graph: TrainingIs uses `training is`, which leaves no trace in a graph"
    assert tdfx.plan(TrainingIs(), FULL).notes == (note,)
    assert type(tdfx.rewrite(TrainingIs(), FULL)) is TrainingIs


def test_slices_and_indices_of_a_rewritten_sequence() -> None:
    dense = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Dropping(), nn.Linear(8, 4)).double()
    made: Any = graph_of(dense)
    assert isinstance(made[0], tdfx.Factorized)
    assert made[0] is made.get_submodule("0")
    assert made[-1] is made.get_submodule("3")
    tail = made[1:]
    assert type(tail) is nn.Sequential
    assert len(tail) == 3
    for mode in (True, False):
        dense.train(mode)
        assert agree(seeded(tail.train(mode)), seeded(dense[1:]))
    assert agree(seeded(made.eval()[:1]), seeded(dense[:1]))
    with pytest.raises(IndexError):
        made[4]
    twin = copy.deepcopy(made)
    assert twin[0] is not made[0]
    assert isinstance(twin[0], tdfx.Factorized)
    modules: Any = tdfx.rewrite(dense, FULL, emit="modules")
    assert type(modules[1:]) is nn.Sequential


def test_by_mode() -> None:
    assert by_mode(True, 1, 2) == 1
    assert by_mode(False, 1, 2) == 2


def test_a_mode_is_the_number_that_it_stands_for_and_tells_when_it_decides() -> None:
    asked: list[str] = []
    on, off = Mode(True, "a.b", asked.append), Mode(False, "", asked.append)
    assert [1 if one else 0 for one in (on, off)] == [1, 0]
    assert asked == ["a.b", ""]
    asked.clear()
    numbers: Any = on, off
    assert (int(numbers[0]), float(numbers[1]), [5, 6][numbers[0]], numbers[0] >= 1) == (1, 0.0, 6, True)
    assert asked == ["a.b", "", "a.b", "a.b"]
    asked.clear()
    tracer = fx.Tracer()
    tracer.graph = fx.Graph()
    nodes: list[Any] = [tracer.create_arg(one) for one in (on, off)]
    assert [(one.op, one.target) for one in nodes] == [("get_attr", "a.b.training"), ("get_attr", "training")]


def graph(*constants: Any, function: Callable[..., Any] = torch.add, stack: str = "", **named: Any) -> fx.Graph:
    """Return the graph of a call of its input with these arguments, made in the module at ``stack``."""
    made = fx.Graph()
    x = made.placeholder("x")
    node = made.call_function(function, (x, *constants), named)
    node.meta["nn_module_stack"] = {"": ("", nn.Module), stack: (stack, nn.Module)}
    made.output(node)
    return made


def run(made: fx.Graph | None, training: dict[str, bool], x: Tensor) -> Any:
    assert made is not None
    root = nn.Module()
    root.add_module("a", nn.Module())
    for path, mode in training.items():
        root.get_submodule(path).training = mode
    return fx.GraphModule(root, made)(x)


def test_graphs_that_differ_in_a_constant_become_one() -> None:
    x = torch.ones(3)
    for path, other in (("", "a"), ("a", "")):
        made = unify(graph(1.0, stack="a"), graph(2.0, stack="a"), {path})
        for mode in (True, False):
            assert torch.equal(run(made, {path: mode, other: not mode}, x), x + (1 if mode else 2))
    made = unify(graph(1.0, alpha=3), graph(1.0, alpha=4), {""})
    assert torch.equal(run(made, {"": False}, x), x + 4)
    assert torch.equal(run(made, {"": True}, x), x + 3)
    made = unify(graph([2, 3], function=Tensor.new_zeros), graph([2, 4], function=Tensor.new_zeros), {""})
    assert run(made, {"": True}, x).shape == (2, 3)
    assert run(made, {"": False}, x).shape == (2, 4)
    assert made is not None
    made.lint()


def test_the_graphs_given_are_left_as_they_were() -> None:
    train, evaluation = graph(1.0), graph(2.0)
    before = [str(one) for one in (train, evaluation)]
    assert unify(train, evaluation, {""}) is not None
    assert [str(one) for one in (train, evaluation)] == before


@pytest.mark.parametrize(
    ("one", "other", "deciders"),
    [
        pytest.param(graph(1.0), graph(1.0, function=torch.mul), {""}, id="another function"),
        pytest.param(graph(1.0), graph(2.0), set(), id="nobody decided"),
        pytest.param(graph(1.0, stack="a"), graph(2.0, stack="a"), {"", "a"}, id="two could have"),
        pytest.param(graph(1.0, stack="b"), graph(2.0, stack="b"), {"a"}, id="another module decided"),
        pytest.param(graph(1.0), graph(1.0, alpha=2), {""}, id="another argument"),
        pytest.param(graph(1.0, alpha=2), graph(1.0, out=None), {""}, id="other names"),
        pytest.param(graph(), graph(0.1), {""}, id="one more"),
    ],
)
def test_graphs_that_differ_in_more_do_not(one: fx.Graph, other: fx.Graph, deciders: set[str]) -> None:
    assert unify(one, other, deciders) is None


def test_graphs_of_another_structure_do_not() -> None:
    def chain(*functions: Callable[..., Any], swap: bool = False) -> fx.Graph:
        made = fx.Graph()
        x = made.placeholder("x")
        found = [made.call_function(function, (x,)) for function in functions]
        made.output(tuple(reversed(found)) if swap else tuple(found))
        return made

    base = (torch.sin, torch.cos)
    assert unify(chain(*base), chain(*base), {""}) is not None
    assert unify(chain(*base), chain(torch.sin), {""}) is None
    assert unify(chain(torch.sin), chain(*base), {""}) is None
    # The same nodes, but another one is given back.
    assert unify(chain(*base), chain(*base, swap=True), {""}) is None
    assert unify(chain(torch.sin, torch.sin), chain(torch.sin, torch.sin, swap=True), {""}) is None


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)


class OneMoreName(Named):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.add(y, 1.0, alpha=2) if self.training else torch.add(y, 1.0)


class OneMoreArgument(Named):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.clamp(y, 0.0) if self.training else torch.clamp(y, 0.0, 0.1)


class OneMoreTensor(Named):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.cat([y, x] if self.training else [y], 1)


class SlicesToo(Named):
    """The slice is the same in both modes, and its end is computed."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * (2.0 if self.training else 1.0)
        return y[:, : x.size(1) - 2]  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [OneMoreName, OneMoreArgument, OneMoreTensor, SlicesToo])
def test_calls_with_other_arguments_in_each_mode(build: Callable[[], nn.Module]) -> None:
    dense = build().double()
    made = graph_of(dense)
    for mode in (True, False):
        assert agree(seeded(made.train(mode)), seeded(dense.train(mode)))
