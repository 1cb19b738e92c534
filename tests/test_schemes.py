"""The laws of every scheme: what full rank, error, join and project promise, against NumPy, SciPy and TensorLy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, lsmr
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor

from tdfx.errors import PolicyError
from tdfx.factors import alternating
from tdfx.factors.algebra import least_norm
from tdfx.factors.cp import Cp, _from_factors
from tdfx.factors.operation import Operation, from_groups, to_groups
from tdfx.factors.registry import get_scheme, scheme_names
from tdfx.factors.scheme import Scheme
from tdfx.factors.two_factors import TwoFactors

EPS = torch.finfo(torch.float64).eps
grid = settings(max_examples=60, deadline=None, derandomize=True, database=None)
NAMES = [*scheme_names(), "tucker2:refine=2"]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def operation(o: int, i: int, kernel: tuple[int, ...] = (), groups: int = 1, transposed: bool = False) -> Operation:
    """An operation with ``o`` and ``i`` channels in each group, stride 1 and no padding."""
    dense = replace(Operation.pointwise(i * groups, o * groups, len(kernel), groups), kernel=kernel)
    return replace(dense, transposed=transposed and len(kernel) > 0)


@st.composite
def operations(draw: st.DrawFn) -> Operation:
    kernel = draw(st.sampled_from([(), (1,), (3,), (1, 1), (3, 2), (2, 3), (1, 3), (3, 1, 2), (2, 2, 2)]))
    groups = draw(st.sampled_from([1, 1, 2, 3])) if kernel else 1
    return operation(draw(st.integers(1, 6)), draw(st.integers(1, 6)), kernel, groups, draw(st.booleans()))


def fitting(dense: Operation) -> list[Scheme]:
    return [scheme for scheme in map(get_scheme, NAMES) if scheme.fits(dense)]


def split(scheme: Scheme, dense: Operation, weight: Tensor, ranks: tuple[int, ...]) -> tuple[Tensor, ...]:
    return scheme.split(dense, weight, ranks, scheme.spectra(dense, weight))


def measured(scheme: Scheme, dense: Operation, weight: Tensor, ranks: tuple[int, ...]) -> float:
    joined = scheme.join(dense, split(scheme, dense, weight, ranks))
    assert joined.shape == weight.shape
    return float((joined - weight).norm() / weight.norm())


def test_every_scheme_fits_something_and_none_fits_everything() -> None:
    fits = {
        "linear": operation(4, 4),
        "pointwise": operation(4, 4, (1, 1)),
        "kernel": operation(4, 4, (3, 3)),
        "sequence": operation(4, 4, (3,)),
        "depthwise": operation(1, 1, (3, 3), 4),
        "depthwise pointwise": operation(1, 1, (1, 1), 4),
        "one input": operation(4, 1, (3, 3)),
    }
    kernels = ["tucker2", "tucker1_out", "tucker1_in", "cp"]
    assert {
        name: [scheme.name for scheme in fitting(dense) if ":" not in scheme.name] for name, dense in fits.items()
    } == {
        "linear": ["svd"],
        "pointwise": ["svd"],
        "kernel": ["tucker2", "tucker1_out", "tucker1_in", "spatial", "depthwise", "cp"],
        "sequence": ["tucker2", "tucker1_out", "tucker1_in", "depthwise", "cp"],
        "depthwise": ["spatial"],
        "depthwise pointwise": [],
        "one input": [*kernels[:3], "spatial", "cp"],
    }


@grid
@given(operations())
def test_layout_round_trip(dense: Operation) -> None:
    weight = random(*dense.weight_shape)
    w_goik = to_groups(dense, weight)
    sizes = (dense.groups, dense.out_channels // dense.groups, dense.in_channels // dense.groups, *dense.kernel)
    assert tuple(w_goik.shape) == sizes
    assert torch.equal(from_groups(dense, w_goik), weight)


@grid
@given(operations())
def test_full_rank_is_exact(dense: Operation) -> None:
    weight = random(*dense.weight_shape)
    for scheme in fitting(dense):
        full = scheme.full_ranks(dense)
        spectra = scheme.spectra(dense, weight)
        assert full == tuple(spectrum.full_rank for spectrum in spectra)
        bound = 64 * max(dense.weight_shape) * math.prod(dense.kernel) * EPS
        assert measured(scheme, dense, weight, full) <= bound
        assert scheme.error(dense, weight, full, spectra) <= bound
        # The spectra of all groups together have the norm of the weight.
        for spectrum in spectra:
            assert float(spectrum.values.norm()) == pytest.approx(float(weight.norm()), rel=1e-12)


@settings(grid, max_examples=25)
@given(operations(), st.floats(0.0, 0.95))
def test_error_is_what_split_loses(dense: Operation, share: float) -> None:
    weight = random(*dense.weight_shape)
    for scheme in fitting(dense):
        spectra = scheme.spectra(dense, weight)
        ranks = tuple(max(1, int(share * full)) for full in scheme.full_ranks(dense))
        lost = measured(scheme, dense, weight, ranks)
        error = scheme.error(dense, weight, ranks, spectra)
        # A squared singular value is rounded to eps times the largest, and so is its root to the root of that.
        assert error == pytest.approx(lost, abs=1e-7 if lost < 1e-6 else 1e-11)
        tails = [spectrum.values[rank:].square().sum() for spectrum, rank in zip(spectra, ranks, strict=True)]
        tail = float(torch.stack(tails).sum().sqrt() / weight.norm())
        if isinstance(scheme, TwoFactors):
            assert error == pytest.approx(tail, abs=1e-12)
        else:  # the losses of the modes add up at most; a canonical decomposition starts from its slices
            assert error <= tail + 1e-12


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["tucker1_out", "tucker1_in", "spatial", "depthwise"])
def test_two_factors_are_the_best_by_numpys_svd(name: str, groups: int, transposed: bool) -> None:
    dense, scheme = operation(5, 4, (3, 2), groups, transposed), get_scheme(name)
    weight = random(*dense.weight_shape)
    blocks = np.stack(np.split(weight.numpy(), groups))
    w_goihw = blocks.swapaxes(1, 2) if transposed else blocks
    unfold: dict[str, Callable[[Any], list[Any]]] = {
        "tucker1_out": lambda w: [w.reshape(5, -1)],
        "tucker1_in": lambda w: [w.swapaxes(0, 1).reshape(4, -1)],
        "spatial": lambda w: [np.einsum("oihw->owih", w).reshape(10, 12)],
        "depthwise": lambda w: [matrix.reshape(4, 6) for matrix in w],
    }
    values = [np.linalg.svd(matrix, compute_uv=False) for w in w_goihw for matrix in unfold[name](w)]
    (full,) = scheme.full_ranks(dense)
    assert full == len(values[0])
    for rank in range(1, full):
        tail = math.sqrt(sum(float((singular[rank:] ** 2).sum()) for singular in values))
        assert measured(scheme, dense, weight, (rank,)) * float(weight.norm()) == pytest.approx(tail, rel=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_refined_tucker_equals_tensorlys_and_is_not_worse(groups: int) -> None:
    dense = operation(9, 8, (3, 3), groups)
    weight = random(*dense.weight_shape)
    plain, once, often = (get_scheme(name) for name in ("tucker2", "tucker2:refine=1", "tucker2:refine=100"))
    ranks = (3, 2)
    lost = [measured(scheme, dense, weight, ranks) for scheme in (plain, once, often)]
    best = 0.0
    for block in to_groups(dense, weight).numpy():
        with tl.backend_context("numpy"):
            (core, factors), _ = partial_tucker(block, rank=list(ranks), modes=[0, 1], n_iter_max=100, tol=0)
            best += float(np.linalg.norm(tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1]) - block)) ** 2
    best = math.sqrt(best) / float(weight.norm())
    assert lost[2] == pytest.approx(best, rel=1e-9)
    assert lost[2] <= lost[1] < lost[0] <= math.sqrt(2) * best


def test_refinement_leaves_tensorly_and_numpy_as_they_were() -> None:
    backend, state = tl.get_backend(), np.random.get_state()[1].copy()  # type: ignore[index]
    dense = operation(9, 2, (3,))
    measured(
        get_scheme("tucker2:refine=2"), dense, random(*dense.weight_shape), (6, 1)
    )  # more ranks than q taps can fill
    assert tl.get_backend() == backend
    assert np.array_equal(np.random.get_state()[1], state)  # type: ignore[index]


@pytest.mark.parametrize("rank", [1, 4, 12, 30])
def test_cp_is_not_worse_than_its_start_and_near_tensorlys(rank: int) -> None:
    dense, scheme = operation(12, 10, (3, 3)), Cp()
    weight = random(*dense.weight_shape)
    lost = measured(scheme, dense, weight, (rank,))
    (spectrum,) = scheme.spectra(dense, weight)
    assert lost < float(spectrum.values[rank:].norm() / weight.norm())
    with tl.backend_context("numpy"):
        given = parafac(weight.numpy(), rank, n_iter_max=100, init="random", random_state=0)
        reference = np.linalg.norm(tl.cp_to_tensor(given) - weight.numpy()) / float(weight.norm())
    # Both find a local optimum, and not always the same.
    assert lost <= 1.1 * reference


@pytest.mark.parametrize("transposed", [False, True])
def test_cp_finds_what_was_planted(transposed: bool) -> None:
    dense = operation(12, 10, (3, 3), 2, transposed)
    modes = tuple(random(2, size, 4) for size in (12, 10, 3, 3))
    weight = from_groups(dense, torch.einsum("gor,gir,ghr,gwr->goihw", *modes))
    assert measured(Cp(), dense, weight, (4,)) < 0.02
    assert measured(get_scheme("tucker1_out"), dense, weight, (3,)) > 0.02  # it is no smaller problem than that


def test_cp_stays_bounded_where_no_best_approximation_exists() -> None:
    """A tensor of rank 3 that is a limit of tensors of rank 2, whose two opposite terms grow without limit."""
    a, b = torch.eye(2, dtype=torch.float64)
    corners = [(a, a, b), (a, b, a), (b, a, a)]
    weight = sum((torch.einsum("o,i,k->oik", *corner) for corner in corners), torch.zeros(2, 2, 2, dtype=torch.float64))
    dense = operation(2, 2, (2,))
    modes = _from_factors(dense, split(Cp(), dense, weight, (2,)))
    size = alternating._norms(modes)
    assert float(size.square().sum()) <= alternating._LARGEST * float(weight.square().sum()) * (1 + 1e-9)
    assert measured(Cp(), dense, weight, (2,)) < 0.6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (2, True)])
@pytest.mark.parametrize("trained", [False, True])
def test_project_is_the_least_norm_solution(name: str, groups: int, transposed: bool, trained: bool) -> None:
    kernel = (1, 1) if name == "svd" else (3, 2)
    dense, scheme = operation(4, 5, kernel, groups, transposed), get_scheme(name)
    ranks = tuple(max(1, full // 2) for full in scheme.full_ranks(dense)) if name != "cp" else (4,)
    factors = split(scheme, dense, random(*dense.weight_shape), ranks)
    if trained:
        factors = tuple(factor + 0.1 * torch.randn_like(factor) for factor in factors)

    def join(*given: Tensor) -> Tensor:
        return scheme.join(dense, given)

    count = math.prod(dense.weight_shape)
    columns = torch.func.jacrev(join, argnums=tuple(range(len(factors))))(*factors)
    jacobian = torch.cat([column.reshape(count, -1) for column in columns], dim=1).numpy()
    gradient = random(*dense.weight_shape)
    parts = torch.func.vjp(join, *factors)[1](gradient)
    seen = np.concatenate([part.numpy().ravel() for part in parts])
    operator = LinearOperator(jacobian.T.shape, matvec=jacobian.T.dot, rmatvec=jacobian.dot, dtype=np.float64)
    expected = lsmr(operator, seen, atol=0, btol=0, conlim=0, maxiter=20 * count)[0]
    singular = np.linalg.svd(jacobian, compute_uv=False)
    condition = singular[0] / singular[singular > 1e-10 * singular[0]][-1]
    # Where it is solved for, the residual's image is smaller by 1e-12, and the solution by that times the condition squared.
    bound = max(100 * EPS, 1e-12) * condition**2
    for projected in (scheme.project(dense, factors, parts), least_norm(join, factors, parts)):
        assert projected.shape == gradient.shape
        assert np.linalg.norm(projected.numpy().ravel() - expected) <= bound * np.linalg.norm(expected)
        assert float(projected.norm()) < (1 - 1e-6) * float(gradient.norm())  # a projection, not the identity


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["zero", "zero group", "low"])
def test_factors_of_an_empty_weight_are_finite_and_can_learn(name: str, kind: str) -> None:
    dense, scheme = operation(4, 4, (1, 1) if name == "svd" else (3, 3), 2), get_scheme(name)
    weight = random(*dense.weight_shape)
    if kind == "zero":
        weight.zero_()
    elif kind == "zero group":
        weight[:4] = 0
    else:
        weight[1:] = 0
    ranks = tuple(max(1, full // 2) for full in scheme.full_ranks(dense))
    factors = [factor.requires_grad_() for factor in split(scheme, dense, weight, ranks)]
    assert all(bool(torch.isfinite(factor).all()) for factor in factors)
    joined = scheme.join(dense, factors)
    assert scheme.error(dense, weight, ranks, scheme.spectra(dense, weight)) <= 1
    slopes = torch.autograd.grad((joined * torch.randn_like(joined)).sum(), factors)
    assert max(float(slope.norm()) for slope in slopes) > 1e-3


def test_equal_weights_give_equal_factors() -> None:
    dense = operation(6, 5, (3, 3))
    weight = random(*dense.weight_shape)
    for scheme in fitting(dense):
        ranks = tuple(max(1, full // 2) for full in scheme.full_ranks(dense))
        pairs = zip(split(scheme, dense, weight, ranks), split(scheme, dense, weight.clone(), ranks), strict=True)
        assert all(torch.equal(factor, other) for factor, other in pairs)


@pytest.mark.parametrize(
    "name",
    ["tucker2:", "tucker2:refine", "tucker2:refine=0", "tucker2:refine=-1", "tucker2:refine=x", "tucker2:tol=3"],
)
def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(PolicyError, match=rf"scheme='{name}' has the option '.*tucker2 takes tucker2:refine=3\.$"):
        get_scheme(name)


def test_options_and_aliases() -> None:
    with pytest.raises(PolicyError, match="svd takes no options; write 'svd'"):
        get_scheme("svd:refine=3")
    assert get_scheme("channel") is get_scheme("tucker1_out")
    assert get_scheme("tucker2:refine=3") is get_scheme("tucker2:refine=3")
    assert get_scheme("tucker2:refine=3") is not get_scheme("tucker2")
    refined: Any = get_scheme("tucker2:refine=3")
    assert (refined.name, refined.refine) == ("tucker2:refine=3", 3)
