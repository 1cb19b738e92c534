"""What flows between factors can be computed again in the backward pass: the same gradients, and only inputs are kept."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import tdfx
from tdfx.cost.count import Flow
from tdfx.cost.workload import Workload
from tdfx.factors.operation import Operation
from tdfx.plans.plan import Plan

CHAIN = [Operation.pointwise(64, 16, 2), Operation.pointwise(16, 64, 2)]


def policy(recompute: bool, **settings: Any) -> tdfx.Policy:
    return tdfx.Policy(
        **{"rank": tdfx.Ratio(of=0.25), "min_gain": 0, "round_to": 1, "recompute": recompute, **settings}
    )


class Upsample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(16, 24, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x, output_size=[14, 15])
        return out


class Functional(nn.Module):
    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.use = use
        self.weight = nn.Parameter(torch.randn(shape) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x.flip(1), x.roll(1, 1), need_weights=False)[0]
        return out


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 6, 7)),
    "1x1": (lambda: nn.Conv2d(16, 24, 1), (2, 16, 6, 7)),
    "grouped": (lambda: nn.Conv1d(16, 24, 3, groups=2, padding="same"), (2, 16, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(16, 24, 3, stride=2), (2, 16, 6, 7)),
    "output_size": (Upsample, (2, 16, 6, 7)),
    "linear": (lambda: nn.Linear(16, 24), (2, 5, 16)),
    "F.linear": (lambda: Functional(F.linear, 24, 16), (2, 5, 16)),
    "F.conv2d": (lambda: Functional(F.conv2d, 24, 16, 3, 3), (2, 16, 6, 7)),
    "matmul": (lambda: Functional(torch.matmul, 16, 24), (2, 5, 16)),
    "bmm": (lambda: Functional(torch.bmm, 3, 16, 24), (3, 5, 16)),
    "einsum": (lambda: Functional(lambda x, w: torch.einsum("btd,dhk->bhtk", x, w), 16, 4, 6), (2, 5, 16)),
    "self-attention": (lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), (2, 5, 16)),
    "cross-attention": (Cross, (2, 5, 16)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = CASES[name]
    return nn.Sequential(make(), nn.Tanh()).double(), torch.randn(shape, dtype=torch.float64)


def both(model: nn.Module, x: Tensor, emit: Any = "graph") -> tuple[nn.Module, nn.Module]:
    """Return the model factorized without and with recomputation."""
    made = [tdfx.plan(model, policy(again), example_inputs=(x,), emit=emit) for again in (False, True)]
    assert made[0].factorized
    assert all(site.recompute for site in made[1].factorized)
    kept, again = (tdfx.rewrite(model, plan) for plan in made)
    return kept, again


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@contextmanager
def saved(*models: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Collect what autograd keeps besides parameters, by storage."""
    own = {parameter.untyped_storage().data_ptr() for model in models for parameter in model.parameters()}
    tensors: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield tensors


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    with saved(model) as tensors:
        out = model(x)  # holds what is kept
    del out
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


FORMS = [*((name, "modules") for name in CASES), ("conv2d", "graph"), ("F.linear", "graph"), ("matmul", "graph")]


@pytest.mark.parametrize(("name", "emit"), FORMS)
def test_gradients_are_the_same_and_less_is_kept(name: str, emit: str) -> None:
    model, x = build(name)
    kept, again = both(model, x, emit)
    assert_same(gradients(kept, x), gradients(again, x))
    assert saved_bytes(again, x) < saved_bytes(kept, x)


SIMPLE = [name for name in CASES if "attention" not in name and name != "output_size"]
"""Sites of which the plan knows the size of the output, and which are all that keeps anything."""


@pytest.mark.parametrize("name", SIMPLE)
def test_the_plan_counts_what_autograd_keeps(name: str) -> None:
    torch.manual_seed(0)
    make, shape = CASES[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    for recomputes in (False, True):
        plan = tdfx.plan(layer, policy(recomputes), example_inputs=(x,))
        (site,) = plan
        assert site.activations_before == x.numel() * 8
        assert (site.activations_after == site.activations_before) == recomputes
        assert saved_bytes(tdfx.rewrite(layer, plan), x) == site.activations_after == plan.activations_after


def test_what_attention_keeps_is_counted() -> None:
    model, x = build("cross-attention")
    plans = [tdfx.plan(model, policy(again), example_inputs=(x,), emit="modules") for again in (False, True)]
    counted = [plan.activations_after or 0 for plan in plans]
    measured = [saved_bytes(tdfx.rewrite(model, plan), x) for plan in plans]
    assert counted[0] - counted[1] == measured[0] - measured[1] > 0


@pytest.mark.parametrize("name", ["conv2d", "F.linear", "einsum"])
def test_autocast(name: str) -> None:
    model, x = build(name)
    layer, x = model.get_submodule("0").float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        plan = tdfx.plan(layer, policy(True), example_inputs=(x,))
        kept, again = tdfx.rewrite(layer, policy(False)), tdfx.rewrite(layer, plan)
        for a, b in zip(gradients(kept, x), gradients(again, x), strict=True):
            assert torch.equal(a, b)
        assert saved_bytes(again, x) == plan.activations_after == 2 * x.numel()


def test_compiled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), Functional(torch.matmul, 16, 24)).double()
    x = torch.randn(50, 16, dtype=torch.float64)
    kept, again = both(model, x, "modules")
    torch.compiler.reset()
    compiled: Any = torch.compile(again, backend="aot_eager_decomp_partition", fullgraph=True)
    assert_same(gradients(kept, x), gradients(compiled, x))
    assert saved_bytes(compiled, x) == saved_bytes(again, x)


@pytest.mark.parametrize("name", ["conv2d", "linear", "F.linear", "matmul"])
def test_transforms_of_torch_func_and_second_derivatives(name: str) -> None:
    model, x = build(name)
    kept, again = both(model, x)
    other = {name: (2 * value.detach()).requires_grad_() for name, value in kept.named_parameters()}

    def loss(model: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, values, (x,))
        return out.square().sum()

    def derivatives(model: nn.Module) -> list[Tensor]:
        # The weights of the call are no longer in the model when the backward pass comes.
        first = torch.autograd.grad(loss(model, other, x), list(other.values()), create_graph=True)
        second = torch.stack([each.square().sum() for each in first]).sum()
        return [*first, *torch.autograd.grad(second, list(other.values()))]

    expected = derivatives(kept)
    assert_same(expected, derivatives(again))
    by_func = torch.func.grad(lambda values: loss(again, values, x))({k: v.detach() for k, v in other.items()})
    assert_same(expected[: len(by_func)], list(by_func.values()))
    per_sample = torch.vmap(lambda sample: again(sample[None])[0])(x)
    torch.testing.assert_close(per_sample, kept(x))


def test_nothing_shows_where_nothing_trains() -> None:
    model, x = build("conv2d")
    kept, again = both(model, x, "modules")
    graphs = [torch.export.export(each.eval(), (x,)).graph for each in (kept, again)]
    assert len({str([node.target for node in graph.nodes if node.op == "call_function"]) for graph in graphs}) == 1
    with pytest.warns(FutureWarning, match="deprecated"):
        traced = torch.jit.trace(again, (x,))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(x), kept(x))
    with torch.no_grad():
        assert torch.equal(again(x), kept(x))


def test_an_input_that_was_changed_since_is_an_error_as_ever() -> None:
    model, x = build("linear")
    for each in both(model.get_submodule("0"), x):
        changed = x.clone()
        out = each(changed)
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_random_numbers_of_an_adapter_are_drawn_again() -> None:
    model, x = build("linear")
    kept, again = both(model, x)
    results = []
    for each in (kept, again):
        layer: Any = each.get_submodule("0")
        layer.factors[0] = nn.Sequential(layer.factors[0], nn.Dropout(0.5))
        torch.manual_seed(1)
        results.append(gradients(each, x))
        results.append([torch.rand(1, dtype=torch.float64)])
    assert_same(results[0], results[2])
    assert_same(results[1], results[3])


def factorized(model: nn.Module) -> list[tdfx.Factorized]:
    return [layer for layer in model.modules() if isinstance(layer, tdfx.Factorized)]


def test_copies_files_and_lower_ranks_keep_it(tmp_path: Path) -> None:
    model, x = build("conv2d")
    _, again = both(model, x)
    tdfx.save(again, tmp_path / "run.tdfx")
    loaded = tdfx.load(tmp_path / "run.tdfx", lambda: build("conv2d")[0])
    pickled = pickle.loads(pickle.dumps(again.get_submodule("0")))
    for each in (copy.deepcopy(again), loaded, pickled):
        (layer,) = factorized(each)
        assert layer.recompute
        assert "recompute=True" in repr(layer)
    assert_same(gradients(again, x), gradients(loaded, x))
    lower = policy(False, rank=tdfx.Ratio(of=0.125))
    (layer,) = factorized(tdfx.rewrite(again, lower))
    assert not layer.recompute
    (layer,) = factorized(tdfx.rewrite(again, replace(lower, recompute=True)))
    assert layer.recompute


def test_a_layer_that_an_earlier_version_pickled_keeps_what_flows() -> None:
    model, x = build("linear")
    kept, _ = both(model, x)
    layer = kept.get_submodule("0")
    del layer.__dict__["recompute"]
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_overrides_plan_files_and_tables() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(8, 64)
    wish = policy(False, overrides={"2": tdfx.Policy(recompute=True)})
    plan = tdfx.plan(model, wish, example_inputs=(x,))
    assert [site.recompute for site in plan] == [False, True]
    assert [layer.recompute for layer in factorized(tdfx.rewrite(model, plan))] == [False, True]
    assert Plan.from_json(plan.to_json()) == plan
    first, second = str(plan).splitlines()[1:3]
    assert "svd  " in first
    assert "2.05k → 2.56k" in first
    assert "svd, recomputed" in second
    assert "bytes that the sites keep for the backward pass 4.1k → 4.61k (112%)" in str(plan)
    data = json.loads(plan.to_json())
    for site in data["sites"]:
        for name in ("recompute", "activations_before", "activations_after"):
            del site[name]
    former = Plan.from_json(json.dumps(data))
    assert not any(site.recompute for site in former)
    assert [layer.recompute for layer in factorized(tdfx.rewrite(model, former))] == [False, False]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(tdfx.PolicyError, match=r"recompute='yes' is neither True nor False"):
        tdfx.Policy(recompute="yes")  # type: ignore[arg-type]
    (site,) = tdfx.plan(nn.Linear(8, 8), tdfx.Policy(exclude=("*",)))
    with pytest.raises(tdfx.PlanError, match=r"is kept and has recompute=True"):
        replace(site, recompute=True)


def test_a_budget_of_memory_counts_it() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(256, 64)
    settings = {"rank": None, "memory": 0.6, "cost": tdfx.Modelled()}
    kept, again = (tdfx.plan(model, policy(each, **settings), example_inputs=(x,)) for each in (False, True))
    limit = 0.6 * kept.memory_before  # type: ignore[operator]
    for plan, rows in ((kept, 256), (again, 0)):
        expected = sum(4 * (4 * site.parameters_after + (rows * site.ranks[0] if site.ranks else 0)) for site in plan)
        assert plan.memory_after == expected <= limit
    assert again.total_error < kept.total_error


def test_times_count_the_second_computation() -> None:
    model = tdfx.Modelled(flops_per_second=1e9, bytes_per_second=float("inf"), seconds_per_call=0.0)
    flow, again = Flow(8, (10, 10)), Flow(8, (10, 10), recomputes=True)
    first = 2 * 8 * 100 * 64 * 16 / 1e9  # both factors take this long
    assert model.seconds(CHAIN, flow) == pytest.approx(6 * first)
    assert model.seconds(CHAIN, again) == pytest.approx(7 * first)
    assert model.seconds(CHAIN[:1], again) == model.seconds(CHAIN[:1], flow)
    measured = tdfx.Measured()
    assert measured._key(tuple(CHAIN), flow) != measured._key(tuple(CHAIN), again)
    with saved() as tensors:
        work = Workload(CHAIN, again)
        out = work._forward(work.inputs[0])
        assert len(tensors) == 1
    del out


def test_a_file_of_a_policy_and_a_printed_policy() -> None:
    table = {"rank": "ratio:0.25", "overrides": {"fc": {"recompute": True}}}
    made = tdfx.read_policy(table)
    assert [made.for_site(name).recompute for name in ("fc", "conv")] == [True, False]  # type: ignore[union-attr]
    with pytest.raises(tdfx.PolicyError, match=r"key recompute: recompute=1 is neither"):
        tdfx.read_policy({"recompute": 1})
    assert repr(made).count("recompute=True") == 1
