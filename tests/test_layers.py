"""A factorized layer computes what the dense one does at full rank, and can become it again."""

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
    """A subclass with the stock forward and an attribute of its own."""

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


def tolerance(made: Factorized, x: Tensor, cotangent: Tensor | None = None) -> float:
    """Return what rounding may change of an output or, for a cotangent, of the input's gradient.

    That is one eps of the dtype for each product that is added up along the chain, relative to what comes out where no
    signs cancel.
    """
    positive = copy.deepcopy(made)
    for parameter in positive.parameters():
        parameter.data.abs_()
    x = x.detach().abs().requires_grad_()
    size = positive(x)
    if cotangent is not None:
        (size,) = torch.autograd.grad(size, x, cotangent.abs())
    terms = 1 + sum(weight[0].numel() + weight[:, 0].numel() for weight in made.weights)
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
    """Return a layer and an input, both anew, in float64."""
    layer, shape = CASES[request.param]
    return copy.deepcopy(layer).double(), torch.randn(shape, dtype=torch.float64)


def test_full_rank_changes_neither_outputs_nor_gradients(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    made = factorize(layer)
    mine, others = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = made(mine), layer(others)
    assert out.shape == expected.shape
    assert largest(out - expected) <= tolerance(made, x)
    cotangent = torch.randn_like(expected)
    out.backward(cotangent)
    expected.backward(cotangent)
    assert mine.grad is not None
    assert others.grad is not None
    assert largest(mine.grad - others.grad) <= tolerance(made, x, cotangent)


def test_a_low_rank_changes_outputs() -> None:
    layer, x = nn.Conv2d(8, 8, 3).double(), torch.randn(2, 8, 7, 7, dtype=torch.float64)
    made = factorize(layer, share=0.5)
    assert largest(made(x) - layer(x)) > 1e6 * tolerance(made, x)


def test_merging_gives_the_weight_back(case: tuple[nn.Module, Tensor]) -> None:
    layer, _ = case
    made = factorize(layer)
    merged = made.merged()
    assert type(merged) is type(layer)
    assert list(merged.state_dict()) == list(layer.state_dict())
    assert repr(merged) == repr(layer)
    # Eigenvectors are orthonormal to some ten eps for each of their entries; each product adds one for each of its terms.
    terms = 10 * sum(weight[0].numel() for weight in made.weights)
    bound = terms * torch.finfo(torch.float64).eps * largest(weight_of(layer))
    assert largest(weight_of(merged) - weight_of(layer)) <= bound


def test_merged_and_factorized_agree_at_a_low_rank(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    made = factorize(layer, share=0.5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert largest(made.merged()(x) - made(x)) <= tolerance(made, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear(16, 16), nn.Conv2d(8, 8, 3)], ids=["linear", "conv2d"])
def test_half_precision_is_kept_and_rounded_once_for_each_factor(dtype: torch.dtype, layer: nn.Module) -> None:
    layer = copy.deepcopy(layer).to(dtype)
    made = factorize(layer)
    merged = made.merged()
    assert {one.dtype for one in made.parameters()} == {one.dtype for one in merged.parameters()} == {dtype}
    exact = made.scheme.join(made.operation, [weight.detach().double() for weight in made.weights])
    assert torch.equal(weight_of(merged), exact.to(dtype))
    # Each factor is off by half an eps, and so is the product; a little is left for eps squared.
    sizes = made.scheme.join(made.operation, [weight.detach().double().abs() for weight in made.weights])
    bound = (len(made.weights) + 1.1) / 2 * torch.finfo(dtype).eps * sizes
    assert bool(((weight_of(merged).double() - weight_of(layer).double()).abs() <= bound).all())
    shape = (2, 16) if isinstance(layer, nn.Linear) else (2, 8, 5, 5)
    x = torch.randn(shape).to(dtype)
    out = made(x)
    assert out.dtype == dtype
    assert largest(out - layer(x)) <= tolerance(made, x)


@pytest.mark.parametrize(
    ("layer", "layout"),
    [(nn.Conv2d(4, 6, 3), torch.channels_last), (nn.Conv3d(4, 6, 3), torch.channels_last_3d)],
    ids=["conv2d", "conv3d"],
)
def test_channels_last_is_kept(layer: nn.Module, layout: torch.memory_format) -> None:
    layer = copy.deepcopy(layer).to(memory_format=layout)
    made = factorize(layer)
    core, merged = made.weights[1], made.merged()
    assert all(one.is_contiguous(memory_format=layout) for one in made.weights)
    assert not core.is_contiguous()
    assert weight_of(merged).stride() == weight_of(layer).stride()
    if isinstance(layer, nn.Conv2d):  # on the CPU torch's own pointwise Conv3d gives the layout up
        x = torch.randn(2, 4, 5, 5).contiguous(memory_format=layout)
        assert made(x).is_contiguous(memory_format=layout)
    plain = factorize(layer.to(memory_format=torch.contiguous_format))
    assert plain.weights[1].is_contiguous()
    assert weight_of(plain.merged()).is_contiguous()


def test_weight_is_the_joined_weight_and_differentiable() -> None:
    layer, x = nn.Linear(6, 5).double(), torch.randn(4, 6, dtype=torch.float64)
    made = factorize(layer, share=0.5)
    torch.testing.assert_close(made.weight, made.weights[1] @ made.weights[0], rtol=0, atol=1e-15)
    by_chain = torch.autograd.grad(made(x).square().sum(), made.weights)
    by_weight = torch.autograd.grad(F.linear(x, made.weight, made.bias).square().sum(), made.weights)
    torch.testing.assert_close(by_weight, by_chain)
    assert by_chain[0].abs().max() > 0


def test_bias_is_the_very_parameter_of_the_original() -> None:
    layer = nn.Conv2d(4, 6, 3)
    made = factorize(layer)
    assert made.bias is layer.bias
    assert made.merged().bias is layer.bias
    assert [name for name, _ in made.named_parameters() if name.endswith("bias")] == ["factors.2.bias"]
    bare = factorize(nn.Conv2d(4, 6, 3, bias=False))
    assert bare.bias is None
    assert bare.merged().bias is None


def test_what_the_original_said_of_itself_can_be_read() -> None:
    made = factorize(Labelled(4, 6, 3, stride=2, padding=1, label="stem"))
    assert (made.in_channels, made.out_channels, made.kernel_size, made.stride) == (4, 6, (3, 3), (2, 2))
    assert made.label == "stem"
    assert factorize(nn.Linear(6, 5)).in_features == 6
    assert made.weight.shape == (6, 4, 3, 3)


@pytest.mark.parametrize("name", ["in_features", "nothing", "_nothing", "__len__"])
def test_an_unknown_attribute_is_an_attribute_error(name: str) -> None:
    made = factorize(nn.Conv2d(4, 6, 3))
    with pytest.raises(AttributeError, match=f"'Factorized' object has no attribute '{name}'"):
        getattr(made, name)
    assert not hasattr(made, name)


def test_a_subclass_comes_back_with_its_attributes() -> None:
    layer = Labelled(4, 6, 3, padding=1, label="stem").double()
    merged = factorize(layer).merged()
    assert type(merged) is Labelled
    assert merged.label == "stem"
    Labelled(4, 6, 3, padding=1, label="other").double().load_state_dict(merged.state_dict(), strict=True)


def test_hooks_move_there_and_back() -> None:
    layer = nn.Linear(6, 5)
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_, **__: calls.append("forward"), with_kwargs=True)
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    made = factorize(layer)
    assert calls == []
    made(torch.ones(1, 6, requires_grad=True)).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    made.register_forward_hook(lambda *_: calls.append("later"))
    calls.clear()
    made.merged()(torch.ones(1, 6, requires_grad=True)).sum().backward()
    assert calls == ["pre", "forward", "later", "backward"]
    calls.clear()
    layer(torch.ones(1, 6))
    assert calls == ["pre", "forward"]


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"]
)
def test_copies_are_equal_and_independent(clone: Any) -> None:
    made = factorize(Labelled(4, 6, 3, label="stem"), share=0.5)
    x = torch.randn(2, 4, 5, 5)
    expected = made(x)
    other = clone(made)
    assert torch.equal(other(x), expected)
    assert torch.equal(weight_of(other.merged()), weight_of(made.merged()))
    assert other.merged().label == "stem"
    with torch.no_grad():
        other.weights[0].zero_()
    assert torch.equal(made(x), expected)
    assert not torch.equal(other(x), expected)


def test_the_state_dict_comes_back() -> None:
    made, other = (factorize(nn.Conv2d(4, 6, 3), share=0.5) for _ in range(2))
    x = torch.randn(2, 4, 5, 5)
    assert not torch.equal(made(x), other(x))
    assert list(made.state_dict()) == [*(f"factors.{index}.weight" for index in range(3)), "factors.2.bias"]
    other.load_state_dict(made.state_dict(), strict=True)
    assert torch.equal(made(x), other(x))


@pytest.mark.parametrize("weight_learns", [True, False])
@pytest.mark.parametrize("bias_learns", [True, False])
def test_what_is_frozen_stays_frozen(weight_learns: bool, bias_learns: bool) -> None:
    layer = nn.Conv2d(4, 6, 3).eval()
    layer.weight.requires_grad_(weight_learns)
    assert layer.bias is not None
    layer.bias.requires_grad_(bias_learns)
    made = factorize(layer)
    merged = made.merged()
    assert [one.requires_grad for one in made.weights] == [weight_learns] * 3
    assert [one.requires_grad for one in merged.parameters()] == [weight_learns, bias_learns]
    assert not made.training
    assert not merged.training
    assert made.train().merged().training
