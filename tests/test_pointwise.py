"""1x1 factors are computed as matrix products where these are faster, with the same results as convolutions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdfx
from tdfx.factors import functions
from tdfx.factors.functions import MOST_ROWS, apply_factor, apply_operation, product_is_faster
from tdfx.factors.operation import Operation
from tdfx.kinds.pointwise import PointwiseConv2d

CHANNELS_LAST = torch.channels_last


def images(*shape: int, **settings: Any) -> Tensor:
    return torch.randn(*shape, **settings).contiguous(memory_format=CHANNELS_LAST)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Record the input of every matrix product in place of a convolution."""
    inputs, real = [], functions.pointwise_product

    def recorded(x: Tensor, *others: Any) -> Tensor:
        inputs.append(x)
        return real(x, *others)

    monkeypatch.setattr(functions, "pointwise_product", recorded)
    monkeypatch.setattr("tdfx.kinds.pointwise.pointwise_product", recorded)
    return inputs


def rewritten(**settings: Any) -> nn.Module:
    layer = nn.Conv2d(16, 24, 3, padding=1, **settings).to(memory_format=CHANNELS_LAST)
    return tdfx.rewrite(nn.Sequential(layer), tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1))


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_a_convolution(bias: bool, products: list[Tensor]) -> None:
    layer = nn.Conv2d(6, 10, 1, bias=bias, dtype=torch.float64)
    pointwise = copy.deepcopy(layer)
    pointwise.__class__ = PointwiseConv2d
    inputs = [images(3, 6, 5, 4, dtype=torch.float64).requires_grad_()]
    inputs.append(inputs[0].detach().clone(memory_format=torch.preserve_format).requires_grad_())
    gradient = torch.randn(3, 10, 5, 4, dtype=torch.float64)
    outputs = [module(x) for module, x in zip((layer, pointwise), inputs, strict=True)]
    assert len(products) == 1
    assert outputs[1].is_contiguous(memory_format=CHANNELS_LAST)
    assert outputs[0].shape == outputs[1].shape
    for output in outputs:
        output.backward(gradient)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-12, atol=1e-12)
    for of_product, of_convolution in zip(pointwise.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(of_product.grad, of_convolution.grad, rtol=1e-12, atol=1e-12)


def test_products_are_for_few_rows_in_channels_last() -> None:
    few, many = images(32, 8, 8, 8), images(32, 8, 16, 16)
    assert few.numel() // 8 <= MOST_ROWS < many.numel() // 8
    assert product_is_faster(few)
    assert not product_is_faster(many)
    assert not product_is_faster(few.contiguous())
    assert not product_is_faster(few.bfloat16())
    assert not product_is_faster(few.to("meta"))
    assert not product_is_faster(few[:, ::2])
    assert not product_is_faster(few[:, :, ::2])
    assert not product_is_faster(torch.randn(8, 16))


def test_small_batches_of_one_thread_are_products_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    large = images(8, 4, 32, 32)
    assert torch.get_num_threads() == 1
    assert product_is_faster(large)
    assert not product_is_faster(images(16, 4, 32, 32))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not product_is_faster(large)


def test_both_ends_of_a_chain_are_products(products: list[Tensor]) -> None:
    model = rewritten()
    assert [type(factor) for factor in model[0].factors] == [PointwiseConv2d, nn.Conv2d, PointwiseConv2d]  # type: ignore[index]
    model(images(2, 16, 6, 6))
    assert len(products) == 2


def test_only_1x1_convolutions_of_one_group_are_products(products: list[Tensor]) -> None:
    x = images(2, 8, 4, 4)
    plain = Operation.pointwise(8, 4, 2)
    strided = Operation(in_channels=8, out_channels=4, kernel=(1, 1), stride=(2, 2), padding=(0, 0), dilation=(1, 1))
    for operation in (plain, strided, Operation.pointwise(8, 4, 2, groups=2)):
        weight = torch.randn(operation.weight_shape)
        expected = apply_operation(operation, x, weight)
        torch.testing.assert_close(apply_factor(operation, x, weight), expected, rtol=1e-5, atol=1e-5)
    assert len(products) == 1
    rows, weight = torch.randn(5, 8), torch.randn(4, 8)
    assert torch.equal(apply_factor(Operation.pointwise(8, 4, 0), rows, weight), F.linear(rows, weight))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_recorded_graphs_do_not_depend_on_the_size(products: list[Tensor]) -> None:
    model = rewritten().eval()
    small, large = images(2, 16, 6, 6), images(200, 16, 6, 6)
    for recorded in (
        torch.jit.trace(model, small),  # type: ignore[no-untyped-call]
        torch.jit.script(model),
        torch.fx.symbolic_trace(model),
        torch.export.export(model, (small,), dynamic_shapes={"input": {0: torch.export.Dim("n", min=1)}}).module(),
        torch.compile(model, backend="eager"),
    ):
        products.clear()
        outputs = recorded(large)
        assert not products
        torch.testing.assert_close(outputs, model(large), rtol=1e-4, atol=1e-5)


def test_layers_are_pickled_merged_and_stacked() -> None:
    model = rewritten()
    x = images(2, 16, 6, 6)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(x), model(x))
    stacked, _ = torch.func.stack_module_state([model, rewritten()])
    call = torch.vmap(lambda parameters: torch.func.functional_call(model, parameters, (x,)))
    torch.testing.assert_close(call(stacked)[0], model(x), rtol=1e-5, atol=1e-5)
    assert type(tdfx.merge(model)[0]) is nn.Conv2d  # type: ignore[index]


def test_factors_of_former_versions_are_merged() -> None:
    model = rewritten()
    for factor in model[0].factors:  # type: ignore[index]
        factor.__class__ = nn.Conv2d  # as they were pickled
    assert type(tdfx.merge(model)[0]) is nn.Conv2d  # type: ignore[index]
