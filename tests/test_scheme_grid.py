"""Every scheme on every kind of layer: full rank equals the dense layer, a low rank the layer with the joined weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tdfx.factors.registry import get_scheme, scheme_names
from tdfx.factors.scheme import Scheme
from tdfx.kinds.registry import operation_of
from tdfx.layers.factorized import Factorized

EPS = torch.finfo(torch.float64).eps
FORWARD: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SIZES = {1: (11,), 2: (9, 8), 3: (6, 5, 7)}
MODES = ("zeros", "reflect", "replicate", "circular")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch says so once a process
grid = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def schemes_for(layer: nn.Module) -> list[Scheme]:
    operation = operation_of(layer)
    assert operation is not None
    return [scheme for scheme in map(get_scheme, scheme_names()) if scheme.fits(operation)]


def factorize(layer: nn.Module, scheme: Scheme, share: float = 1.0) -> Factorized:
    operation = operation_of(layer)
    assert operation is not None
    weight = layer.weight.detach().double()  # type: ignore[operator]
    ranks = [max(1, int(share * full)) for full in scheme.full_ranks(operation)]
    spectra = scheme.spectra(operation, weight)
    assert scheme.full_ranks(operation) == tuple(spectrum.full_rank for spectrum in spectra)
    factorized = Factorized.of(layer, scheme, ranks, scheme.split(operation, weight, ranks, spectra))
    assert [tuple(weight.shape) for weight in factorized.weights] == [
        step.weight_shape for step in scheme.chain(operation, ranks)
    ]
    return factorized


def tolerance(factorized: Factorized, x: Tensor, cotangent: Tensor | None = None) -> float:
    """What rounding may change of an output, or of the input's gradient: see the layers' tests."""
    positive = copy.deepcopy(factorized)
    for parameter in positive.parameters():
        parameter.data.abs_()
    x = x.detach().abs().requires_grad_()
    size = positive(x)
    if cotangent is not None:
        (size,) = torch.autograd.grad(size, x, cotangent.abs())
    terms = 1 + sum(weight[0].numel() + weight[:, 0].numel() for weight in factorized.weights)
    # The bases are orthogonal up to a similar multiple of eps, relative to the largest singular value.
    return 4 * terms * torch.finfo(x.dtype).eps * float(size.detach().abs().max())


def check_equal(rewritten: nn.Module, layer: nn.Module, x: Tensor, bounds: Factorized) -> None:
    """Outputs and the gradients of input and bias agree up to rounding."""
    parameters = [parameter for name, parameter in layer.named_parameters() if name == "bias"]
    mine, others = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = rewritten(mine), layer(others)
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert float((out - expected).detach().abs().max()) <= tolerance(bounds, x)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(out, [mine, *parameters], cotangent)
    wanted = torch.autograd.grad(expected, [others, *parameters], cotangent)
    assert float((gradients[0] - wanted[0]).abs().max()) <= tolerance(bounds, x, cotangent)
    for gradient, other in zip(gradients[1:], wanted[1:], strict=True):
        assert (gradient - other).norm() <= EPS * cotangent.abs().sum()


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    """Any convolution or linear layer of a few channels."""
    dims = draw(st.sampled_from([0, 1, 2, 2, 2, 3]))
    bias = draw(st.booleans())
    if dims == 0:
        return nn.Linear(draw(st.integers(1, 7)), draw(st.integers(1, 7)), bias=bias).double()
    groups = draw(st.sampled_from([1, 1, 2, 3]))

    def each(values: list[int]) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(dims))

    common: dict[str, Any] = {
        "kernel_size": each([1, 2, 3]),
        "stride": each([1, 2, 3]),
        "dilation": each([1, 2]),
        "groups": groups,
        "bias": bias,
    }
    i, o = (groups * draw(st.integers(1, 5)) for _ in range(2))
    if draw(st.booleans()):
        strides, dilations = common["stride"], common["dilation"]
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(strides, dilations, strict=True))
        layer: nn.Module = TRANSPOSED[dims - 1](i, o, padding=each([0, 1]), output_padding=extra, **common)
        return layer.double()
    padding = draw(st.sampled_from(["same", "valid", None]))
    if padding == "same":
        common["stride"] = 1
    mode = draw(st.sampled_from(MODES))
    layer = FORWARD[dims - 1](i, o, padding=padding or each([0, 1, 2]), padding_mode=mode, **common)
    return layer.double()


def input_for(layer: nn.Module) -> Tensor:
    operation = operation_of(layer)
    assert operation is not None
    return torch.randn(2, operation.in_channels, *SIZES.get(operation.dims, ()), dtype=torch.float64)


@grid
@given(layers())
def test_full_rank_is_the_dense_layer(layer: nn.Module) -> None:
    x = input_for(layer)
    for scheme in schemes_for(layer):
        factorized = factorize(layer, scheme)
        check_equal(factorized, layer, x, factorized)


@settings(grid, max_examples=30)
@given(layers(), st.sampled_from([0.0, 0.5, 0.8]))
def test_a_low_rank_is_the_layer_of_the_joined_weight(layer: nn.Module, share: float) -> None:
    """No geometry is lost on the way: the chain computes what the stock layer computes with the weight it stands for."""
    x = input_for(layer)
    for scheme in schemes_for(layer):
        factorized = factorize(layer, scheme, share)
        check_equal(factorized, factorized.merged(), x, factorized)
        by_chain = torch.autograd.grad(factorized(x).square().sum(), factorized.weights)
        merged = factorized.merged()
        by_layer = torch.autograd.grad(merged(x).square().sum(), merged.weight)  # type: ignore[arg-type]
        # The factors' gradients are the vector-Jacobian product of join with that of the dense layer.
        by_join = torch.autograd.grad(factorized.weight, factorized.weights, by_layer[0])
        for gradient, other in zip(by_join, by_chain, strict=True):
            assert (gradient - other).norm() <= 1e-11 * max(1.0, float(other.norm()))
