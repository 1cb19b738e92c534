"""Moments: their values, computed here in float64 from all rows, and the paths of the sites."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import pytest
import torch
from moments_runs import (
    LAYERS,
    Functional,
    Rows,
    all_rows,
    assert_moments,
    batches,
    functional,
    functional_moments,
    net,
    reference,
    rows_of,
    sequences,
    train,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tdfx


def test_the_moments_are_those_of_all_rows() -> None:
    model = net(torch.float64)
    data = batches(3, torch.float64)
    moments = tdfx.Moments(model, _share=1.0)
    # An own forward on a layer makes it another's, so the reference watches a copy that takes the same steps.
    other = copy.deepcopy(model)
    train(model.eval(), data)
    with all_rows(other, list(LAYERS)) as record:
        train(other.eval(), data)
    assert moments.units == 3
    assert_moments(moments, record, 1e-13)
    found = moments.of("grouped.weight")
    assert found is not None
    assert found.inputs is not None
    assert found.inputs.dtype == torch.float64
    assert found.inputs.shape == (2, 4, 4)
    assert moments.of("norm.weight") is None
    assert moments.of("nothing") is None


def test_a_wrong_reference_is_seen() -> None:
    model, other = net(torch.float64), net(torch.float64)
    moments = tdfx.Moments(model, _share=1.0)
    train(model.eval(), batches(3, torch.float64))
    with all_rows(other, ["mix"]) as record:
        train(other.eval(), batches(3, torch.float64), lr=0.06)
    with pytest.raises(AssertionError):
        assert_moments(moments, record, 1e-13)


def test_functions_on_parameters_are_sites() -> None:
    model = functional()
    moments = functional_moments(model)
    record: dict[str, Rows] = {"kernel": [], "matrix": [], "scaled.weight": [], "outside.weight": []}
    twice: Rows = []
    for batch in sequences():
        outputs = [F.conv1d(batch, model.kernel, groups=2, padding=1)]
        outputs.append(F.linear(outputs[0].mT, model.matrix))
        outputs.append(F.linear(outputs[1], model.scaled.weight, model.scaled.bias))
        outputs.append(F.linear(outputs[2] * 2, model.outside.weight))
        outputs.append(model.twice(outputs[3]))
        outputs.append(model.twice(torch.tanh(outputs[4])))
        conv, linear, scaled, outside, first, second = torch.autograd.grad(outputs[-1].square().mean(), outputs)
        inputs = [np.moveaxis(batch.numpy(), 1, 2).reshape(-1, 6), *(rows_of(y, model.twice) for y in outputs[1:4])]
        record["kernel"].append((inputs[0], np.moveaxis(conv.numpy(), 1, 2).reshape(-1, 6)))
        record["matrix"].append((rows_of(outputs[0].mT, model.twice), rows_of(linear, model.twice)))
        record["scaled.weight"].append((inputs[1], rows_of(scaled, model.twice)))
        record["outside.weight"].append((rows_of(outputs[2] * 2, model.twice), rows_of(outside, model.twice)))
        rows = (rows_of(outputs[3], model.twice), rows_of(torch.tanh(outputs[4]), model.twice))
        gradients = (rows_of(first, model.twice), rows_of(second, model.twice))
        twice.append((np.concatenate(rows), np.concatenate(gradients)))
    record["twice.weight"] = twice
    for path, calls in record.items():
        found = moments.of(path)
        assert found is not None, path
        assert found.samples == sum(len(rows) for rows, _ in calls)
        for value, expected in zip(
            (found.inputs, found.outputs), reference(calls, 2 if path == "kernel" else 1), strict=True
        ):
            assert value is not None
            np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=1e-13 * np.abs(expected).max())
    assert moments.of("unused.weight") is None


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_factorized_site_keeps_its_path(emit: Literal["graph", "modules"]) -> None:
    model = functional()
    policy = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
    example = torch.randn(4, 6, 9, dtype=torch.float64)
    small = tdfx.rewrite(model, policy, example_inputs=example, emit=emit)
    factorized = {path for path, part in small.named_modules() if isinstance(part, tdfx.Factorized)}
    assert factorized >= {"matrix", "twice"}
    expected, moments = functional_moments(model), functional_moments(small)
    assert moments.state_dict()["sites"].keys() == expected.state_dict()["sites"].keys()
    for path in ("kernel", "matrix", "scaled.weight", "twice.weight"):
        old, new = expected.of(path), moments.of(path)
        assert old is not None
        assert new is not None
        torch.testing.assert_close(new.inputs, old.inputs)
        torch.testing.assert_close(new.outputs, old.outputs)


def test_only_a_model_with_functional_sites_needs_a_mode() -> None:
    modes: list[int] = []
    layer = nn.Linear(5, 5)
    layer.register_forward_hook(lambda *_: modes.append(torch._C._len_torch_function_stack()))
    plain = nn.Sequential(layer)
    with tdfx.Moments(plain):
        for _ in range(2):  # the first shows that all layers are called
            plain(torch.randn(2, 5))
    model = functional().float()
    model.scaled = layer
    with tdfx.Moments(model):
        model(torch.randn(4, 6, 9))
    assert modes == [1, 0, 1]


def test_functions_are_recorded_outside_of_the_forward_of_the_model() -> None:
    class Outer(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.inner = Functional()
            self.reentrant = reentrant

        def encode(self, x: Tensor) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x.mT).mT
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]

    x = torch.randn(4, 6, 9)
    for reentrant in (True, False):
        model = Outer(reentrant)
        for call in (model, model.encode):
            with tdfx.Moments(model, _share=1.0) as moments:
                call(x).square().mean().backward()
            found = moments.of("inner.matrix")
            assert found is not None
            assert (moments.units, found.samples) == (1, 36)
            assert torch._C._len_torch_function_stack() == 0


def test_no_mode_runs_in_validation_nor_for_embeddings() -> None:
    modes: list[int] = []
    model = functional()
    model.unused.register_forward_pre_hook(lambda *_: None)
    model.twice.register_forward_hook(lambda *_: modes.append(torch._C._len_torch_function_stack()))
    with tdfx.Moments(model), torch.no_grad():
        model(sequences()[0])
    assert modes == [0, 0]
    embedded = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    embedded[1].register_forward_hook(lambda *_: modes.append(torch._C._len_torch_function_stack()))
    with tdfx.Moments(embedded) as moments:
        for _ in range(2):
            embedded(torch.zeros(2, dtype=torch.long)).sum().backward()
    assert modes == [0, 0, 1, 0]
    assert moments.of("1.weight") is not None


def test_lazy_layers_and_layers_called_by_name() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.LazyConv2d(4, 3), nn.LazyLinear(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(input=self.conv(input=x).flatten(1))  # type: ignore[no-any-return]

    model = Lazy()
    with tdfx.Moments(model) as moments:
        model(torch.randn(2, 3, 5, 5)).sum().backward()
    found = moments.of("conv.weight")
    assert found is not None
    assert found.inputs is not None
    assert found.inputs.shape == (1, 3, 3)
    assert moments.of("linear.weight") is not None


def test_the_output_of_the_layer_itself_is_watched_where_a_hook_replaces_it() -> None:
    layer, plain = nn.Linear(4, 4), nn.Linear(4, 4)
    plain.load_state_dict(layer.state_dict())
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    layer.register_forward_hook(lambda module, args, output: output * scale)
    x = torch.randn(8, 4)
    with tdfx.Moments(layer) as moments, tdfx.Moments(plain) as expected:
        layer(x).sum().backward()
        (plain(x) * scale).sum().backward()
    found, other = moments.of("weight"), expected.of("weight")
    assert found is not None
    assert other is not None
    torch.testing.assert_close(found.outputs, other.outputs)
    assert found.outputs is not None
    assert float(found.outputs[0, 3, 3]) > 2


def test_a_weight_that_a_layer_shares_is_recorded_at_the_layer_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 4))
            self.layer = nn.Linear(4, 4)
            self.layer.weight = self.matrix

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    model = Tied()
    with tdfx.Moments(model) as moments:
        model(torch.randn(3, 4)).sum().backward()
    assert list(moments.state_dict()["sites"]) == ["layer.weight"]
