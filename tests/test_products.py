"""Parameters in matrix products, in einsum, in grouped products and in slices of a stack: sites, or listed with why not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdfx
from tdfx.kinds.layouts import Layout, layout_named
from tdfx.layers.parameter import FactorizedParameter

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0)
LOW = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
TOLERANCE = 1e5 * torch.finfo(torch.float64).eps  # a chain of d layers rounds about d times


def rand(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Uses(nn.Module):
    """Uses one parameter in one way."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(rand(*shape, seed=9))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


def one_by_one(x: Tensor, w: Any) -> Tensor:
    return torch.stack([F.linear(x[index], w[index]) for index in range(3)])


def by_tensors(x: Tensor, w: Any) -> Tensor:
    return torch.stack([x[index] @ w[torch.tensor(index)] for index in range(3)])


CASES: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Any], Tensor], str, tuple[int, int, int]]] = {
    "x @ w": ((8, 6), lambda x, w: x @ w, "matmul[io]", (6, 8, 1)),
    "vector @ w": ((8, 6), lambda x, w: x[0, 0] @ w, "matmul[io]", (6, 8, 1)),
    "x @ w.T": ((6, 8), lambda x, w: x @ w.T, "matmul[oi]", (6, 8, 1)),
    "x @ w.mT": ((3, 6, 8), lambda x, w: x @ w.mT, "matmul[goi]", (18, 8, 3)),
    "matmul, shared input": ((3, 8, 6), lambda x, w: torch.matmul(x[0], w), "matmul[oio]", (18, 8, 1)),
    "matmul, more dimensions": ((3, 8, 6), lambda x, w: torch.stack([x, x]).matmul(w), "matmul[gio]", (18, 8, 3)),
    "mm": ((8, 6), lambda x, w: torch.mm(x[0], mat2=w), "mm[io]", (6, 8, 1)),
    "addmm": ((8, 6), lambda x, w: torch.addmm(x[1, :1, :6], x[0], w), "addmm[io]", (6, 8, 1)),
    "bmm": ((3, 8, 6), lambda x, w: torch.bmm(x, w), "bmm[gio]", (18, 8, 3)),
    "bmm, transposed": ((3, 6, 8), lambda x, w: x.bmm(w.transpose(1, 2)), "bmm[goi]", (18, 8, 3)),
    "einsum": ((6, 8), lambda x, w: torch.einsum("bni,oi->bno", x, w), "einsum[oi]", (6, 8, 1)),
    "einsum, weight first": ((8, 6), lambda x, w: torch.einsum("io,...i->...o", w, x), "einsum[io]", (6, 8, 1)),
    "einsum, heads": ((8, 2, 3), lambda x, w: torch.einsum("bnd,dhk->bhnk", x, w), "einsum[ioo]", (6, 8, 1)),
    "einsum, from heads": (
        (2, 4, 6),
        lambda x, w: torch.einsum("bnhk,hko->bno", x.reshape(3, 5, 2, 4), w),
        "einsum[iio]",
        (6, 8, 1),
    ),
    "einsum, slices last": ((8, 6, 3), lambda x, w: torch.einsum("bni,iob->bno", x, w), "einsum[iog]", (18, 8, 3)),
    "slice by slice": ((3, 6, 8), one_by_one, "F.linear[goi]", (18, 8, 3)),
    "slices by tensors": ((3, 8, 6), by_tensors, "matmul[gio]", (18, 8, 3)),
}
every_case = pytest.mark.parametrize("case", CASES)


def build(case: str) -> Uses:
    shape, use, _, _ = CASES[case]
    return Uses(shape, use)


@every_case
@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_full_rank_changes_nothing_and_merges_to_the_same(case: str, emit: tdfx.Emit) -> None:
    dense, x = build(case), rand(3, 5, 8)
    out, into, groups = CASES[case][3]
    plan = tdfx.plan(dense, FULL, example_inputs=x, emit=emit)
    (site,) = plan
    assert (site.kind, site.shape, site.groups, site.parameter) == (CASES[case][2], (out, into), groups, "weight")
    full = tdfx.rewrite(dense, tdfx.Plan.from_json(plan.to_json()))
    for mode in (True, False):
        results = []
        for model in (full, dense):
            given = x.clone().requires_grad_()
            output = model.train(mode)(given)
            results.append((output, *torch.autograd.grad(output.square().sum(), given)))
        for value, expected in zip(*results, strict=True):
            assert torch.allclose(value, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.allclose(tdfx.merge(full).weight, dense.weight, rtol=TOLERANCE, atol=TOLERANCE)  # type: ignore[arg-type]


@every_case
def test_the_chain_computes_what_the_joined_weight_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, x = build(case), rand(3, 5, 8)
    low = tdfx.rewrite(dense, LOW, example_inputs=x)
    expected = tdfx.merge(low)(x)

    def joined(self: object, *factors: Tensor) -> Tensor:
        raise AssertionError("the dense weight was joined")

    monkeypatch.setattr(FactorizedParameter, "join", joined)
    assert torch.allclose(low(x), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert not torch.allclose(low(x), dense(x), rtol=1e-3)


@every_case
def test_a_split_is_the_best_one_of_every_slice(case: str) -> None:
    dense, x = build(case), rand(3, 5, 8)
    low: Any = tdfx.rewrite(dense, LOW, example_inputs=x)
    roles = CASES[case][2].rpartition("[")[2].rstrip("]")
    order = sorted(range(len(roles)), key=lambda axis: "goi".index(roles[axis]))
    count = [roles.count(role) for role in "goi"]

    def matrices(weight: Tensor) -> Tensor:
        moved = weight.detach().permute(order)
        shape = moved.shape
        parts = shape[: count[0]], shape[count[0] : -count[2]], shape[-count[2] :]
        sizes = [math.prod(part) for part in parts]
        return moved.reshape(sizes)

    values = torch.linalg.svdvals(matrices(dense.weight))
    (rank,) = low.weight.origin.ranks
    lost = (matrices(low.weight.dense_weight()) - matrices(dense.weight)).norm(dim=(1, 2))
    assert torch.allclose(lost, values[:, rank:].norm(dim=1))


def grouped(x: Tensor, w: Tensor) -> Tensor:
    offsets = torch.tensor([2, 2, 7, 12], dtype=torch.int32)
    return torch._grouped_mm(x.flatten(0, 1)[:12], w, offs=offsets)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped products")
@pytest.mark.parametrize("policy", [FULL, tdfx.Policy(rank=tdfx.Fixed({"weight": 3}), min_gain=0)])
def test_grouped_products_of_experts(policy: tdfx.Policy) -> None:
    """They take no float64, and sides of whole 16 bytes only: a rank of 3 is padded."""
    dense = Uses((4, 8, 12), grouped).float()
    x = rand(3, 5, 8).float().requires_grad_()
    (site,) = tdfx.plan(dense, policy, example_inputs=x)
    assert (site.kind, site.shape, site.groups) == ("grouped_mm[gio]", (48, 8), 4)
    low: Any = tdfx.rewrite(dense, policy, example_inputs=x)
    expected: Any = tdfx.merge(low)
    gradient, other = (torch.autograd.grad(model(x).square().sum(), x)[0] for model in (low, expected))
    assert torch.allclose(low(x), expected(x), atol=1e-4)
    assert torch.allclose(gradient, other, atol=1e-3)


def two_ways(x: Tensor, w: Tensor) -> Tensor:
    return x @ w + x @ w.T


LISTED: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Any], Tensor], str]] = {
    "from the left": ((5, 5), lambda x, w: w @ x, "no linear map for each slice"),
    "picked rows": ((4, 8, 8), lambda x, w: torch.bmm(x, w[torch.tensor([0, 2, 3])]), "no linear map for each slice"),
    "a part": ((8, 16), lambda x, w: x @ w[:, :8], "no linear map for each slice"),
    "baddbmm": ((3, 8, 8), lambda x, w: torch.baddbmm(x[..., :1], x, w), "no linear map for each slice"),
    "two ways": ((8, 8), two_ways, "in two ways"),
    "read besides": ((8, 6), lambda x, w: x @ w + w.sum(), "reads its weight"),
}


@pytest.mark.parametrize("case", LISTED)
def test_what_is_no_site_is_listed_with_its_reason(case: str) -> None:
    shape, use, note = LISTED[case]
    (site,) = tdfx.plan(Uses(shape, use), FULL, example_inputs=rand(3, 5, 8))
    assert site.reason is tdfx.Reason.READ_ELSEWHERE
    assert note in site.note


def test_a_parameter_that_is_added_is_not_listed() -> None:
    model = Uses((1, 5, 8), lambda x, w: (x + w) @ (x + w).mT)
    assert not tdfx.plan(model, FULL, example_inputs=rand(3, 5, 8)).sites


@pytest.mark.parametrize("case", ["bmm", "x @ w.T"])
def test_moments_optimizers_copies_and_compiled_code(case: str) -> None:
    dense, x = build(case), rand(3, 5, 8)
    optimizer = torch.optim.Adam(dense.parameters())
    with tdfx.Moments(dense) as moments:
        dense(x).square().sum().backward()
    optimizer.step()
    site = moments.of("weight")
    assert site is not None
    groups = CASES[case][3][2]
    rows = x if groups == 3 else x.reshape(1, -1, 8)
    assert torch.allclose(site.inputs, rows.mT @ rows / rows.shape[1])  # type: ignore[arg-type]
    before = optimizer.state[dense.weight]["exp_avg"].clone()
    full = tdfx.rewrite(dense, FULL, example_inputs=x, optimizer=optimizer, moments=moments, carry_state=True)
    for other in (copy.deepcopy(full), torch.compile(full, backend="eager", fullgraph=True)):
        assert torch.equal(other(x), full(x))
    merged: Any = tdfx.merge(full, optimizer=optimizer)
    assert torch.allclose(optimizer.state[merged.weight]["exp_avg"], before, atol=1e-10 * float(before.abs().max()))


def test_layouts_are_named_by_their_roles() -> None:
    layout = layout_named("einsum[iog]", (8, 6, 3))
    assert layout == Layout("einsum", "iog", (8, 6, 3))
    weight = rand(8, 6, 3)
    dense = layout.to_dense(weight)
    assert torch.equal(dense[6:12], weight[..., 1].mT)
    assert torch.equal(layout.from_dense(dense), weight)
    assert layout_named("F.linear", (8, 6)) is None
