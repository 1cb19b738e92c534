"""The metric: what is split in it is the best of its rank there, and at full rank nothing changes, against SciPy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schemes import EPS, fitting, operation, operations, random
from torch import Tensor, nn

from tdfx.factors.metric import DAMPING, Metric
from tdfx.factors.moments import SiteMoments
from tdfx.factors.operation import Operation, to_groups
from tdfx.factors.registry import get_scheme
from tdfx.factors.scheme import Scheme
from tdfx.layers.factorized import Factorized
from tdfx.passes.planning.weights import lowering_of, metric_for

LARGEST_ROOT = (1 + 6 / DAMPING) ** 0.5
"""Bound on the condition of a damped root of up to six channels."""


def moment(groups: int, channels: int, samples: int, dead: int = 0) -> Tensor:
    """The second moments (g, c, c) of random channels, the first of them dead; of low rank for few samples."""
    x = random(groups, samples, channels).cumsum(2)
    x[:, :, :dead] = 0
    return x.mT @ x / samples


def moments(dense: Operation, samples: int = 100, dead: int = 0) -> SiteMoments:
    inputs, outputs = dense.in_channels // dense.groups, dense.out_channels // dense.groups
    return SiteMoments(
        inputs=moment(dense.groups, inputs, samples, dead),
        outputs=moment(dense.groups, outputs, samples, dead),
        samples=samples,
    )


def split(
    scheme: Scheme, dense: Operation, metric: Metric, weight: Tensor, ranks: tuple[int, ...]
) -> tuple[Tensor, ...]:
    metric = metric_for(metric, scheme)
    working = metric.apply(dense, weight)
    factors = scheme.split(dense, working, ranks, scheme.spectra(dense, working))
    return metric.take_back(scheme.chain(dense, ranks), factors)


def _taps(dense: Operation, weight: Tensor) -> Tensor:
    """The weight as (g, o, i, k), with one tap for a linear map."""
    w_goik = to_groups(dense, weight)
    return w_goik.flatten(3) if dense.dims else w_goik[..., None]


def lost(seen: SiteMoments, dense: Operation, change: Tensor) -> float:
    """The trace of G ΔW A ΔWᵀ over all taps, by NumPy, in which neither root nor inverse occurs."""
    assert seen.inputs is not None
    assert seen.outputs is not None
    total = 0.0
    for a, g, w_oik in zip(seen.inputs, seen.outputs, _taps(dense, change), strict=True):
        a_damped, g_damped = a.numpy().copy(), g.numpy().copy()
        a_damped /= np.trace(sum(seen.inputs.numpy())) / (len(seen.inputs) * len(a))
        g_damped /= np.trace(sum(seen.outputs.numpy())) / (len(seen.outputs) * len(g))
        a_damped, g_damped = a_damped + DAMPING * np.eye(len(a)), g_damped + DAMPING * np.eye(len(g))
        total += sum(np.trace(g_damped @ tap @ a_damped @ tap.T) for tap in np.moveaxis(w_oik.numpy(), 2, 0))
    return float(total)


@given(operations(), st.sampled_from([1, 3, 100]), st.integers(0, 2), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_full_rank_changes_nothing_however_few_samples_there_are(
    dense: Operation, samples: int, dead: int, seed: int
) -> None:
    torch.manual_seed(seed)
    metric, weight = Metric.of(moments(dense, samples, dead), "loss"), random(*dense.weight_shape)
    for scheme in fitting(dense):
        factors = split(scheme, dense, metric, weight, scheme.full_ranks(dense))
        bound = 1e3 * EPS * LARGEST_ROOT**2
        assert (scheme.join(dense, factors) - weight).norm() <= bound * weight.norm(), scheme.name


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("svd", operation(12, 9)),
        ("svd", operation(8, 5, (1, 1), groups=3)),
        ("svd", operation(6, 7, (1,), transposed=True)),
        ("tucker1_out", operation(12, 5, (3, 3))),
        ("tucker1_in", operation(6, 9, (3, 3))),
        ("tucker1_in", operation(5, 6, (3,), groups=2, transposed=True)),
        ("spatial", operation(6, 5, (3, 3))),
    ],
)
def test_the_split_is_the_best_of_its_rank_in_the_metric(name: str, dense: Operation) -> None:
    torch.manual_seed(0)
    scheme, seen, weight = get_scheme(name), moments(dense), random(*dense.weight_shape)
    metric = Metric.of(seen, "loss")
    rank = scheme.full_ranks(dense)[0] // 2
    found = lost(seen, dense, scheme.join(dense, split(scheme, dense, metric, weight, (rank,))) - weight)
    plain = scheme.split(dense, weight, (rank,), scheme.spectra(dense, weight))
    assert found < 0.9 * lost(seen, dense, scheme.join(dense, plain) - weight)
    assert found == pytest.approx(_least_loss(seen, dense, scheme, weight, rank), rel=1e-9)
    working = metric.apply(dense, weight)
    error = scheme.error(dense, working, (rank,), scheme.spectra(dense, working))
    assert error**2 * lost(seen, dense, weight) == pytest.approx(found, rel=1e-9)


def _least_loss(seen: SiteMoments, dense: Operation, scheme: Scheme, weight: Tensor, rank: int) -> float:
    """The least loss of a rank by symmetric roots (SciPy) and NumPy's singular values of the scheme's unfolding."""
    roots = []
    for side in (seen.outputs, seen.inputs):
        assert side is not None
        scale = side.diagonal(dim1=1, dim2=2).mean()
        damped = side / scale + DAMPING * torch.eye(side.shape[1], dtype=side.dtype)
        roots.append(torch.stack([torch.from_numpy(np.real(scipy.linalg.sqrtm(group.numpy()))) for group in damped]))
    w_goik = torch.einsum("gpo,goik,gij->gpjk", roots[0], _taps(dense, weight), roots[1])
    w_goik = w_goik.reshape(to_groups(dense, weight).shape)
    rows = {"svd": "go", "tucker1_out": "go", "tucker1_in": "gok", "spatial": "goy"}[scheme.name]
    total = 0.0
    for w_oik in w_goik.numpy():
        if rows == "go":
            matrix = w_oik.reshape(len(w_oik), -1)
        elif rows == "gok":
            matrix = np.moveaxis(w_oik, 1, -1).reshape(-1, w_oik.shape[1])
        else:
            matrix = w_oik.transpose(0, 3, 1, 2).reshape(w_oik.shape[0] * w_oik.shape[3], -1)
        total += float(np.sum(np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2))
    return total


@pytest.mark.parametrize("dense", [operation(6, 6), operation(6, 5, (3, 3)), operation(4, 4, (3,), groups=2)])
def test_dead_channels_and_few_samples_never_amplify_what_was_not_seen(dense: Operation) -> None:
    """Inputs without a signal get the weights that the others leave them, and never larger ones."""
    torch.manual_seed(0)
    seen, weight = moments(dense, samples=2, dead=3), random(*dense.weight_shape)
    for name in ("svd", "tucker2", "tucker1_in", "tucker1_out"):
        if not (scheme := get_scheme(name)).fits(dense):
            continue
        ranks = tuple(max(1, rank // 2) for rank in scheme.full_ranks(dense))
        joined = scheme.join(dense, split(scheme, dense, Metric.of(seen, "loss"), weight, ranks))
        assert joined.norm() <= 2 * weight.norm(), name
        undamped = Metric.of(seen, "loss", damping=1e-12)
        wild = scheme.join(dense, split(scheme, dense, undamped, weight, ranks))
        assert joined.norm() <= wild.norm() * (1 + 1e-9), name


def test_a_long_side_is_weighed_channel_by_channel() -> None:
    torch.manual_seed(0)
    dense, scheme = operation(8, 6), get_scheme("svd")
    seen = moments(dense)
    assert seen.outputs is not None
    diagonal = replace(seen, outputs=seen.outputs.diagonal(dim1=1, dim2=2))
    as_matrix = replace(seen, outputs=torch.diag_embed(seen.outputs.diagonal(dim1=1, dim2=2)))
    weight = random(*dense.weight_shape)
    first, second = (
        scheme.join(dense, split(scheme, dense, Metric.of(each, "loss"), weight, (3,)))
        for each in (diagonal, as_matrix)
    )
    assert torch.allclose(first, second, rtol=1e-10)
    assert Metric.of(diagonal, "loss").is_diagonal
    assert not Metric.of(as_matrix, "loss").is_diagonal


def test_the_scale_of_moments_does_not_matter() -> None:
    torch.manual_seed(0)
    dense, scheme = operation(8, 6), get_scheme("svd")
    seen, weight = moments(dense), random(*dense.weight_shape)
    assert seen.inputs is not None
    assert seen.outputs is not None
    scaled = replace(seen, inputs=1e3 * seen.inputs, outputs=2.0**-40 * seen.outputs)
    first, second = (split(scheme, dense, Metric.of(each, "loss"), weight, (3,)) for each in (seen, scaled))
    assert torch.allclose(scheme.join(dense, first), scheme.join(dense, second), rtol=1e-10)


@pytest.mark.parametrize("name", ["inputs", "weights"])
def test_a_metric_of_fewer_sides_leaves_the_others_out(name: str) -> None:
    torch.manual_seed(0)
    dense = operation(4, 3, (3,))
    metric = Metric.of(moments(dense), name)  # type: ignore[arg-type]
    assert metric.name == name
    assert metric.outputs is None
    weight = random(*dense.weight_shape)
    assert (name == "weights") == torch.equal(metric.apply(dense, weight), weight)


@pytest.mark.parametrize(
    ("layer", "scheme"),
    [
        (nn.Linear(8, 10), "svd"),
        (nn.Conv2d(6, 8, 3), "tucker2"),
        (nn.Conv2d(6, 8, 3), "tucker1_out"),
        (nn.Conv2d(4, 6, 3, groups=2), "tucker2"),
        (nn.ConvTranspose1d(6, 4, 3), "tucker1_in"),
        (nn.Conv2d(4, 6, 3), "depthwise"),
        (nn.Conv2d(4, 6, 3), "spatial"),
    ],
)
def test_lowering_factors_is_splitting_their_product_in_the_same_metric(layer: nn.Module, scheme: str) -> None:
    torch.manual_seed(0)
    chosen = get_scheme(scheme)
    layer = layer.double()
    weight = next(layer.parameters()).detach()
    for dense in _operations_of(layer):
        metric = Metric.of(moments(dense), "loss")
        full = chosen.full_ranks(dense)
        factors = chosen.split(dense, weight, full, chosen.spectra(dense, weight))
        factorized = Factorized.of(layer, chosen, full, factors)
        ranks = tuple(max(1, rank // 2) for rank in full)
        lowering = lowering_of(factorized, metric=metric)
        expected = chosen.join(dense, split(chosen, dense, metric, weight, ranks))
        assert torch.allclose(chosen.join(dense, lowering.split(ranks)), expected, rtol=1e-7, atol=1e-9)
        working = metric_for(metric, chosen).apply(dense, weight)
        error = chosen.error(dense, working, ranks, chosen.spectra(dense, working))
        assert lowering.error(ranks) == pytest.approx(error, rel=1e-6)
        assert lowering.error(ranks) != pytest.approx(lowering_of(factorized).error(ranks), rel=1e-2)


def _operations_of(layer: nn.Module) -> Iterator[Operation]:
    from tdfx.kinds.registry import operation_of

    found = operation_of(layer)
    assert found is not None
    yield found


@given(operations(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_factors_that_are_taken_back_have_equal_norms(dense: Operation, seed: int) -> None:
    torch.manual_seed(seed)
    metric = Metric.of(moments(dense), "loss")
    for scheme in fitting(dense):
        full = scheme.full_ranks(dense)
        for weight in (random(*dense.weight_shape), torch.zeros(dense.weight_shape, dtype=torch.float64)):
            factors = split(scheme, dense, metric, weight, full)
            norms = [float(factor.norm()) for factor in factors]
            assert not weight.any() or norms == pytest.approx([norms[0]] * len(norms), rel=1e-9), scheme.name
            assert torch.allclose(scheme.join(dense, factors), weight, rtol=1e-7, atol=1e-9)
