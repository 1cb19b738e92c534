"""Schemes: splitting and joining against NumPy, SciPy and TensorLy, and chains against the dense operation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tensorly as tl
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, lsmr
from tensorly.decomposition import partial_tucker
from torch import Tensor

from tdfx.errors import PolicyError
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme, scheme_for, scheme_names
from tdfx.factors.scheme import Scheme

EPS = torch.finfo(torch.float64).eps
MATRICES = [(9, 14), (14, 9), (8, 8), (9, 14, 1), (14, 9, 1, 1), (5, 6, 1, 1, 1)]
KERNELS = [(20, 2, 3), (6, 7, 5), (8, 6, 3, 3), (3, 16, 3, 3), (30, 2, 1, 3), (2, 30, 3, 1), (5, 4, 2, 3, 2)]
SHAPES = [*MATRICES, *KERNELS]


def operation(shape: tuple[int, ...]) -> Operation:
    """The operation of a weight (o, i, k...), with stride 1 and no padding."""
    return replace(Operation.pointwise(shape[1], shape[0], len(shape) - 2), kernel=shape[2:])


def scheme_of(shape: tuple[int, ...]) -> Scheme:
    return get_scheme("svd" if math.prod(shape[2:]) == 1 else "tucker2")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def split(weight: Tensor, ranks: tuple[int, ...]) -> tuple[Tensor, ...]:
    scheme = scheme_of(weight.shape)
    return scheme.split(operation(weight.shape), weight, ranks, scheme.spectra(operation(weight.shape), weight))


def half(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, rank // 2) for rank in scheme_of(shape).full_ranks(operation(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact_and_low_rank_is_not(shape: tuple[int, ...]) -> None:
    weight, scheme = random(*shape), scheme_of(shape)
    full = scheme.full_ranks(operation(shape))
    assert full == tuple(spectrum.full_rank for spectrum in scheme.spectra(operation(shape), weight))
    # Each product sums at most max(shape) * taps terms, and the basis is orthogonal to a like multiple of eps.
    bound = 16 * math.prod(shape[2:]) * max(shape) * EPS
    assert (scheme.join(operation(shape), split(weight, full)) - weight).norm() <= bound * weight.norm()
    assert scheme.error(operation(shape), weight, full, scheme.spectra(operation(shape), weight)) <= bound
    assert (scheme.join(operation(shape), split(weight, half(shape))) - weight).norm() > 0.1 * weight.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_what_split_loses(shape: tuple[int, ...]) -> None:
    weight, scheme = random(*shape), scheme_of(shape)
    spectra = scheme.spectra(operation(shape), weight)
    for cut in range(4):
        ranks = tuple(max(1, rank - cut) for rank in scheme.full_ranks(operation(shape)))
        lost = float((scheme.join(operation(shape), split(weight, ranks)) - weight).norm() / weight.norm())
        # 1 - |core|**2 is rounded to eps, and is used where its square root is above 1e-3.
        assert scheme.error(operation(shape), weight, ranks, spectra) == pytest.approx(
            lost, abs=1e3 * 16 * EPS * max(shape)
        )


@pytest.mark.parametrize("shape", MATRICES)
def test_svd_error_is_the_tail_of_the_spectrum(shape: tuple[int, ...]) -> None:
    weight, scheme = random(*shape), get_scheme("svd")
    values = np.linalg.svd(weight.flatten(1).numpy(), compute_uv=False)
    for rank in range(1, values.size + 1):
        tail = float(np.linalg.norm(values[rank:]))
        assert float((weight - scheme.join(operation(shape), split(weight, (rank,)))).norm()) == pytest.approx(
            tail, abs=1e-12
        )
    assert tail == 0.0
    assert np.linalg.norm(values[1:]) > 1


@pytest.mark.parametrize("shape", KERNELS)
def test_tucker2_is_the_truncated_hosvd(shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    p, q = half(shape)
    array = weight.numpy()
    outer = np.linalg.svd(array.reshape(shape[0], -1), full_matrices=False)[0][:, :p]
    inner = np.linalg.svd(array.swapaxes(0, 1).reshape(shape[1], -1), full_matrices=False)[0][:, :q]
    hosvd = np.einsum("oa,ib,ab...->oi...", outer @ outer.T, inner @ inner.T, array)
    joined = scheme_of(shape).join(operation(shape), split(weight, (p, q)))
    assert np.linalg.norm(joined.numpy() - hosvd) <= 1e-11 * np.linalg.norm(array)

    with tl.backend_context("numpy"):
        (core, factors), _ = partial_tucker(array, rank=[p, q], modes=[0, 1], n_iter_max=200, tol=1e-12)
        best = np.linalg.norm(tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1]) - array)
    # HOOI starts from the HOSVD and only gets better; the HOSVD is within sqrt(2) of the best.
    lost = float((joined - weight).norm())
    assert best * (1 - 1e-12) <= lost <= math.sqrt(2) * best
    assert float((scheme_of(shape).join(operation(shape), split(weight, (1, 1))) - weight).norm()) > lost


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trained", [False, True])
def test_project_is_the_least_norm_solution(shape: tuple[int, ...], trained: bool) -> None:
    scheme = scheme_of(shape)
    factors = split(random(*shape), half(shape))
    if trained:
        factors = tuple(factor + 0.1 * torch.randn_like(factor) for factor in factors)
    count = math.prod(shape)

    def join(*given: Tensor) -> Tensor:
        return scheme.join(operation(shape), given)

    columns = torch.func.jacrev(join, argnums=tuple(range(len(factors))))(*factors)
    jacobian = torch.cat([column.reshape(count, -1) for column in columns], dim=1).numpy()
    gradient = random(*shape)
    parts = [torch.tensordot(gradient, column, dims=gradient.dim()) for column in columns]
    seen = np.concatenate([part.numpy().ravel() for part in parts])
    operator = LinearOperator(jacobian.T.shape, matvec=jacobian.T.dot, rmatvec=jacobian.dot, dtype=np.float64)
    expected = lsmr(operator, seen, atol=0, btol=0, conlim=0, maxiter=20 * count)[0]

    projected = scheme.project(operation(shape), factors, parts).flatten().numpy()
    singular = np.linalg.svd(jacobian, compute_uv=False)
    condition = singular[0] / singular[singular > 1e-10 * singular[0]][-1]
    # Both sides solve with the square of the Jacobian.
    assert np.linalg.norm(projected - expected) <= 100 * EPS * condition**2 * np.linalg.norm(expected)
    assert scheme.project(operation(shape), factors, parts).shape == shape
    assert np.linalg.norm(projected) < (1 - 1e-6) * float(gradient.norm())  # a projection, not the identity


@pytest.mark.parametrize("shape", MATRICES)
def test_svd_factors_are_balanced(shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    (rank,) = get_scheme("svd").full_ranks(operation(shape))
    first, last = (factor.flatten(1) for factor in split(weight, (rank,)))
    values = torch.linalg.svdvals(weight.flatten(1))
    for norms in (first.norm(dim=1), last.norm(dim=0)):
        assert torch.allclose(norms**2, values, rtol=0, atol=1e-12)
    assert (first @ first.mT - torch.diag(values)).norm() <= 1e-12 * values[0] * rank


@pytest.mark.parametrize("shape", KERNELS)
def test_tucker2_outer_factors_hold_the_root_of_their_spectrum(shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    first, _, last = split(weight, get_scheme("tucker2").full_ranks(operation(shape)))
    for norms, unfolding in (
        (last.flatten(1).norm(dim=0), weight.flatten(1)),
        (first.flatten(1).norm(dim=1), weight.transpose(0, 1).flatten(1)),
    ):
        assert torch.allclose(norms**2, torch.linalg.svdvals(unfolding), rtol=0, atol=1e-11)


def component_gradients(weight: Tensor, rank: int) -> Tensor:
    """The gradient that each of the output components gets from a random gradient of the weight, shape (rank,)."""
    scheme = scheme_of(weight.shape)
    ranks = (rank,) if scheme.name == "svd" else (rank, scheme.full_ranks(operation(weight.shape))[1])
    factors = [factor.requires_grad_() for factor in split(weight, ranks)]
    assert all(bool(torch.isfinite(factor).all()) for factor in factors)
    joined = scheme.join(operation(weight.shape), factors)
    assert (joined - weight).norm() <= 1e-12 * max(1.0, float(weight.norm()))
    inner, outer = torch.autograd.grad((joined * torch.randn_like(joined)).sum(), factors[-2:])
    return torch.maximum(inner.flatten(1).norm(dim=1), outer.flatten(1).norm(dim=0))


@pytest.mark.parametrize("shape", [(8, 8), (6, 9), (9, 6), (9, 6, 1, 1), (8, 6, 3, 3), (6, 8, 3)])
@pytest.mark.parametrize("kind", ["zero", "zero_rows", "product"])
def test_empty_components_can_still_learn(shape: tuple[int, ...], kind: str) -> None:
    weight = random(*shape)
    if kind == "zero":
        weight.zero_()
    elif kind == "zero_rows":
        weight[2:] = 0
    else:
        weight = torch.einsum("op,pi...->oi...", random(shape[0], 2), weight[:2])
    # A component with two zero sides has no gradient and stays zero for ever. With one unit side its gradient is about |G|.
    assert component_gradients(weight, rank=5).min() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_chain_shapes_are_those_of_the_factors(shape: tuple[int, ...]) -> None:
    scheme, dense = scheme_of(shape), operation(shape)
    for ranks in (half(shape), scheme.full_ranks(dense)):
        chain = scheme.chain(dense, ranks)
        assert [step.weight_shape for step in chain] == [tuple(f.shape) for f in split(random(*shape), ranks)]
        assert chain[0].in_channels == dense.in_channels
        assert chain[-1].out_channels == dense.out_channels


def run(x: Tensor, step: Operation, weight: Tensor) -> Tensor:
    """Compute an operation with torch's functions only."""
    if step.dims == 0:
        return F.linear(x, weight)
    padding = step.padding
    if step.padding_mode != "zeros" and not isinstance(padding, str):
        ends = [end for pad in reversed(padding) for end in (pad, pad)]
        x, padding = F.pad(x, ends, step.padding_mode), (0,) * step.dims
    convolve = (F.conv1d, F.conv2d, F.conv3d)[step.dims - 1]
    return convolve(x, weight, None, step.stride, padding, step.dilation)


GEOMETRIES: list[dict[str, object]] = [
    {},
    {"stride": 2},
    {"padding": 2},
    {"padding": "same"},
    {"padding": "valid"},
    {"dilation": 2, "padding": "same"},
    {"stride": 3, "padding": 1, "dilation": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "stride": 2, "padding_mode": "circular"},
]


@pytest.mark.parametrize("shape", [(9, 14, 1), (14, 9, 1, 1), (20, 2, 3), (8, 6, 3, 3), (6, 8, 1, 3), (5, 4, 1, 3, 3)])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_chain_computes_what_the_dense_operation_does(shape: tuple[int, ...], geometry: dict[str, object]) -> None:
    dims = len(shape) - 2
    if geometry.get("padding_mode") == "reflect" and dims == 3:
        geometry = {**geometry, "padding_mode": "replicate"}
    settings = {key: (value,) * dims if isinstance(value, int) else value for key, value in geometry.items()}
    dense = replace(operation(shape), **settings)  # type: ignore[arg-type]
    scheme, weight = scheme_of(shape), random(*shape)
    x = random(2, shape[1], *(9, 8, 7)[:dims])
    expected = run(x, dense, weight)
    assert tuple(expected.shape[2:]) == dense.out_size(tuple(x.shape[2:]))

    def through(ranks: tuple[int, ...]) -> Tensor:
        y, size = x, tuple(x.shape[2:])
        for step, factor in zip(scheme.chain(dense, ranks), split(weight, ranks), strict=True):
            y, size = run(y, step, factor), step.out_size(size)
            assert tuple(y.shape[2:]) == size
        return y

    bound = 64 * math.prod(shape) * EPS
    assert (through(scheme.full_ranks(dense)) - expected).norm() <= bound * expected.norm()
    assert (through(half(shape)) - expected).norm() > 0.05 * expected.norm()


def test_pointwise_chain_strides_first() -> None:
    """Where stride can be taken early, the second factor has less to do."""
    first, last = get_scheme("svd").chain(replace(operation((8, 8, 1, 1)), stride=(2, 2)), (4,))
    assert (first.stride, last.stride) == ((2, 2), (1, 1))


def test_scheme_for() -> None:
    names = {shape: scheme.name if (scheme := scheme_for(operation(shape))) else None for shape in SHAPES}
    assert all(names[shape] == "svd" for shape in MATRICES)
    assert all(names[shape] == "tucker2" for shape in KERNELS)
    kernel, point = operation((8, 8, 3, 3)), operation((8, 8, 1, 1))
    assert scheme_for(kernel, "svd") is None
    assert scheme_for(point, "tucker2") is None
    for transposed in (False, True):
        assert scheme_for(replace(kernel, transposed=transposed, groups=2)) is get_scheme("tucker2")
        assert scheme_for(replace(point, transposed=transposed, groups=2)) is get_scheme("svd")
        for each in (kernel, point):  # a depthwise convolution: nothing to gain, and nothing is chosen by itself
            assert scheme_for(replace(each, transposed=transposed, groups=8)) is None
    assert scheme_for(replace(kernel, groups=8), "spatial") is get_scheme("spatial")
    assert [get_scheme(name).name for name in scheme_names()] == list(scheme_names())


@pytest.mark.parametrize("name", ["tuker2", "Tucker2", "SVD", "auto"])
def test_unknown_scheme(name: str) -> None:
    with pytest.raises(
        PolicyError, match=rf"scheme='{name}' is not known: the schemes are tucker2, svd, tucker1_out, .*, or 'auto'"
    ):
        get_scheme(name)
    if name != "auto":
        with pytest.raises(PolicyError, match=r"Nearest: '(tucker2|svd)'\. If it is one of your own"):
            scheme_for(operation((8, 8)), name)
