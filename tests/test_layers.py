"""A factorized layer computes the same as the dense layer at full rank, and can be merged back to it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdfx.factors.registry import get_scheme
from tdfx.kinds.registry import operation_of
from tdfx.layers.factorized import Factorized


class Labelled(nn.Conv2d):
    """A subclass with the inherited forward and an additional attribute."""

    def __init__(self, *args: Any, label: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.label = label


def factorize(layer: nn.Module, share: float = 1.0) -> Factorized:
    """Split a layer at a share of its full ranks."""
    operation = operation_of(layer)
    assert operation is not None
    scheme = get_scheme("svd" if operation.is_pointwise else "tucker2")
    ranks = [max(1, int(share * full)) for full in scheme.full_ranks(operation)]
    weight = weight_of(layer).detach().double()
    return Factorized.of(
        layer, scheme, ranks, scheme.split(operation, weight, ranks, scheme.spectra(operation, weight))
    )


def tolerance(factorized: Factorized, x: Tensor, cotangent: Tensor | None = None) -> float:
    """Return by how much rounding may change an output or, with a cotangent, the gradient of the input.

    The bound is one eps of the dtype for each product in the sums along the chain, relative to the output of the chain
    with absolute values, in which nothing cancels.
    """
    positive = copy.deepcopy(factorized)
    for parameter in positive.parameters():
        parameter.data.abs_()
    x = x.detach().abs().requires_grad_()
    size = positive(x)
    if cotangent is not None:
        (size,) = torch.autograd.grad(size, x, cotangent.abs())
    terms = 1 + sum(weight[0].numel() + weight[:, 0].numel() for weight in factorized.weights)
    return terms * torch.finfo(x.dtype).eps * largest(size)


def weight_of(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight


def largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5), (4, 6)),
    "linear, wide, of a sequence": (nn.Linear(3, 7), (2, 5, 3)),
    "linear without bias": (nn.Linear(6, 5, bias=False), (4, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv1d, one tap": (nn.Conv1d(4, 6, 1, stride=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3), (2, 4, 7, 7)),
    "conv2d without a batch": (nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "conv2d without bias": (nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 7, 7)),
    "conv2d, oblong": (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(2, 1)), (2, 4, 9, 8)),
    "conv2d, same": (nn.Conv2d(4, 6, 4, padding="same", dilation=2), (2, 4, 9, 9)),
    "conv2d, valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 7)),
    "conv2d, one tap": (nn.Conv2d(4, 6, 1, stride=2), (2, 4, 7, 7)),
    "conv2d, one channel": (nn.Conv2d(1, 6, 3, padding=1), (2, 1, 7, 7)),
    "conv3d": (nn.Conv3d(3, 4, 3, stride=2, padding=1), (2, 3, 5, 5, 5)),
    "conv3d, same": (nn.Conv3d(3, 4, (1, 3, 5), padding="same", bias=False), (2, 3, 5, 5, 5)),
    **{
        f"{mode}, {padding}, {taps} taps": (nn.Conv2d(4, 6, taps, padding=padding, padding_mode=mode), (2, 4, 7, 7))
        for mode in ("zeros", "reflect", "replicate", "circular")
        for taps, padding in ((3, 1), (3, "same"), (1, 1))
    },
    "circular conv1d": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """Return a copy of a layer and a new input, in float64."""
    layer, shape = CASES[request.param]
    return copy.deepcopy(layer).double(), torch.randn(shape, dtype=torch.float64)


def test_full_rank_changes_neither_outputs_nor_gradients(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    factorized = factorize(layer)
    x_factorized, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = factorized(x_factorized), layer(x_dense)
    assert out.shape == expected.shape
    assert largest(out - expected) <= tolerance(factorized, x)
    cotangent = torch.randn_like(expected)
    out.backward(cotangent)
    expected.backward(cotangent)
    assert x_factorized.grad is not None
    assert x_dense.grad is not None
    assert largest(x_factorized.grad - x_dense.grad) <= tolerance(factorized, x, cotangent)


def test_a_low_rank_changes_outputs() -> None:
    layer, x = nn.Conv2d(8, 8, 3).double(), torch.randn(2, 8, 7, 7, dtype=torch.float64)
    factorized = factorize(layer, share=0.5)
    assert largest(factorized(x) - layer(x)) > 1e6 * tolerance(factorized, x)


def test_merging_restores_the_weight(case: tuple[nn.Module, Tensor]) -> None:
    layer, _ = case
    factorized = factorize(layer)
    merged = factorized.merged()
    assert type(merged) is type(layer)
    assert list(merged.state_dict()) == list(layer.state_dict())
    assert repr(merged) == repr(layer)
    # Eigenvectors are orthonormal up to about ten eps per entry, and each product adds one eps per term.
    terms = 10 * sum(weight[0].numel() for weight in factorized.weights)
    bound = terms * torch.finfo(torch.float64).eps * largest(weight_of(layer))
    assert largest(weight_of(merged) - weight_of(layer)) <= bound


def test_merged_and_factorized_agree_at_a_low_rank(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    factorized = factorize(layer, share=0.5)
    with torch.no_grad():
        for parameter in factorized.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert largest(factorized.merged()(x) - factorized(x)) <= tolerance(factorized, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear(16, 16), nn.Conv2d(8, 8, 3)], ids=["linear", "conv2d"])
def test_half_precision_is_preserved_and_each_factor_is_rounded_once(dtype: torch.dtype, layer: nn.Module) -> None:
    layer = copy.deepcopy(layer).to(dtype)
    factorized = factorize(layer)
    merged = factorized.merged()
    assert (
        {parameter.dtype for parameter in factorized.parameters()}
        == {parameter.dtype for parameter in merged.parameters()}
        == {dtype}
    )
    exact = factorized.scheme.join(factorized.operation, [weight.detach().double() for weight in factorized.weights])
    assert torch.equal(weight_of(merged), exact.to(dtype))
    # Each factor and the product are rounded by half an eps; the rest of the bound covers eps squared.
    sizes = factorized.scheme.join(
        factorized.operation, [weight.detach().double().abs() for weight in factorized.weights]
    )
    bound = (len(factorized.weights) + 1.1) / 2 * torch.finfo(dtype).eps * sizes
    assert bool(((weight_of(merged).double() - weight_of(layer).double()).abs() <= bound).all())
    shape = (2, 16) if isinstance(layer, nn.Linear) else (2, 8, 5, 5)
    x = torch.randn(shape).to(dtype)
    out = factorized(x)
    assert out.dtype == dtype
    assert largest(out - layer(x)) <= tolerance(factorized, x)


@pytest.mark.parametrize(
    ("layer", "layout"),
    [(nn.Conv2d(4, 6, 3), torch.channels_last), (nn.Conv3d(4, 6, 3), torch.channels_last_3d)],
    ids=["conv2d", "conv3d"],
)
def test_channels_last_is_preserved(layer: nn.Module, layout: torch.memory_format) -> None:
    layer = copy.deepcopy(layer).to(memory_format=layout)
    factorized = factorize(layer)
    core, merged = factorized.weights[1], factorized.merged()
    assert all(weight.is_contiguous(memory_format=layout) for weight in factorized.weights)
    assert not core.is_contiguous()
    assert weight_of(merged).stride() == weight_of(layer).stride()
    if isinstance(layer, nn.Conv2d):  # on the CPU torch's pointwise Conv3d does not keep the layout
        x = torch.randn(2, 4, 5, 5).contiguous(memory_format=layout)
        assert factorized(x).is_contiguous(memory_format=layout)
    plain = factorize(layer.to(memory_format=torch.contiguous_format))
    assert plain.weights[1].is_contiguous()
    assert weight_of(plain.merged()).is_contiguous()


def test_weight_is_the_joined_weight_and_differentiable() -> None:
    layer, x = nn.Linear(6, 5).double(), torch.randn(4, 6, dtype=torch.float64)
    factorized = factorize(layer, share=0.5)
    torch.testing.assert_close(factorized.weight, factorized.weights[1] @ factorized.weights[0], rtol=0, atol=1e-15)
    by_chain = torch.autograd.grad(factorized(x).square().sum(), factorized.weights)
    by_weight = torch.autograd.grad(F.linear(x, factorized.weight, factorized.bias).square().sum(), factorized.weights)
    torch.testing.assert_close(by_weight, by_chain)
    assert by_chain[0].abs().max() > 0


def test_bias_is_the_same_parameter_as_the_originals() -> None:
    layer = nn.Conv2d(4, 6, 3)
    factorized = factorize(layer)
    assert factorized.bias is layer.bias
    assert factorized.merged().bias is layer.bias
    assert [name for name, _ in factorized.named_parameters() if name.endswith("bias")] == ["factors.2.bias"]
    without_bias = factorize(nn.Conv2d(4, 6, 3, bias=False))
    assert without_bias.bias is None
    assert without_bias.merged().bias is None


def test_attributes_of_the_original_can_be_read() -> None:
    factorized = factorize(Labelled(4, 6, 3, stride=2, padding=1, label="stem"))
    assert (factorized.in_channels, factorized.out_channels, factorized.kernel_size, factorized.stride) == (
        4,
        6,
        (3, 3),
        (2, 2),
    )
    assert factorized.label == "stem"
    assert factorize(nn.Linear(6, 5)).in_features == 6
    assert factorized.weight.shape == (6, 4, 3, 3)


@pytest.mark.parametrize("name", ["in_features", "nothing", "_nothing", "__len__"])
def test_an_unknown_attribute_is_an_attribute_error(name: str) -> None:
    factorized = factorize(nn.Conv2d(4, 6, 3))
    with pytest.raises(AttributeError, match=f"'Factorized' object has no attribute '{name}'"):
        getattr(factorized, name)
    assert not hasattr(factorized, name)


def test_a_subclass_is_restored_with_its_attributes() -> None:
    layer = Labelled(4, 6, 3, padding=1, label="stem").double()
    merged = factorize(layer).merged()
    assert type(merged) is Labelled
    assert merged.label == "stem"
    Labelled(4, 6, 3, padding=1, label="other").double().load_state_dict(merged.state_dict(), strict=True)


def test_hooks_move_to_the_factorized_layer_and_back() -> None:
    layer = nn.Linear(6, 5)
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_, **__: calls.append("forward"), with_kwargs=True)
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    factorized = factorize(layer)
    assert calls == []
    factorized(torch.ones(1, 6, requires_grad=True)).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    factorized.register_forward_hook(lambda *_: calls.append("later"))
    calls.clear()
    factorized.merged()(torch.ones(1, 6, requires_grad=True)).sum().backward()
    assert calls == ["pre", "forward", "later", "backward"]
    calls.clear()
    layer(torch.ones(1, 6))
    assert calls == ["pre", "forward"]


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_copies_are_equal_and_independent(clone: Any) -> None:
    factorized = factorize(Labelled(4, 6, 3, label="stem"), share=0.5)
    x = torch.randn(2, 4, 5, 5)
    expected = factorized(x)
    other = clone(factorized)
    assert torch.equal(other(x), expected)
    assert torch.equal(weight_of(other.merged()), weight_of(factorized.merged()))
    assert other.merged().label == "stem"
    with torch.no_grad():
        other.weights[0].zero_()
    assert torch.equal(factorized(x), expected)
    assert not torch.equal(other(x), expected)


def test_a_state_dict_can_be_loaded() -> None:
    factorized, other = (factorize(nn.Conv2d(4, 6, 3), share=0.5) for _ in range(2))
    x = torch.randn(2, 4, 5, 5)
    assert not torch.equal(factorized(x), other(x))
    assert list(factorized.state_dict()) == [*(f"factors.{index}.weight" for index in range(3)), "factors.2.bias"]
    other.load_state_dict(factorized.state_dict(), strict=True)
    assert torch.equal(factorized(x), other(x))


@pytest.mark.parametrize("weight_trains", [True, False])
@pytest.mark.parametrize("bias_trains", [True, False])
def test_requires_grad_is_preserved(weight_trains: bool, bias_trains: bool) -> None:
    layer = nn.Conv2d(4, 6, 3).eval()
    layer.weight.requires_grad_(weight_trains)
    assert layer.bias is not None
    layer.bias.requires_grad_(bias_trains)
    factorized = factorize(layer)
    merged = factorized.merged()
    assert [weight.requires_grad for weight in factorized.weights] == [weight_trains] * 3
    assert [parameter.requires_grad for parameter in merged.parameters()] == [weight_trains, bias_trains]
    assert not factorized.training
    assert not merged.training
    assert factorized.train().merged().training
