"""Counts against torch's own FLOP counter and by hand, and the modelled time."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tdfx
from tdfx import Factorized, Modelled, PolicyError
from tdfx.cost.count import Flow, count_chain, flops, parameters
from tdfx.factors.operation import Operation
from tdfx.factors.registry import scheme_for
from tdfx.kinds.registry import operation_of

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(24, 40), (8, 24)),
    "linear_3d": (nn.Linear(24, 40, bias=False), (4, 7, 24)),
    "conv1d": (nn.Conv1d(8, 12, 5, stride=2, padding=1), (4, 8, 33)),
    "conv2d": (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 11)),
    "strided": (nn.Conv2d(16, 24, (3, 5), stride=(2, 3), padding=(0, 2), dilation=(2, 1)), (2, 16, 19, 21)),
    "same": (nn.Conv2d(16, 24, 3, padding="same", dilation=2), (2, 16, 9, 11)),
    "valid": (nn.Conv2d(16, 24, 3, padding="valid"), (2, 16, 9, 11)),
    "pointwise": (nn.Conv2d(16, 24, 1, stride=2), (2, 16, 9, 11)),
    "conv3d": (nn.Conv3d(4, 6, 3, stride=(1, 2, 1), padding=1), (2, 4, 5, 6, 7)),
}
GROUPED = {"grouped": (nn.Conv2d(16, 24, 3, groups=4), (2, 16, 9, 11))}


def counted(module: nn.Module, shape: tuple[int, ...]) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(torch.randn(shape))
    return int(counter.get_total_flops())


def operation(layer: nn.Module) -> Operation:
    computed = operation_of(layer)
    assert computed is not None
    return computed


def flow(layer: nn.Module, shape: tuple[int, ...]) -> Flow:
    if isinstance(layer, nn.Linear):
        return Flow(torch.Size(shape[:-1]).numel())
    return Flow(shape[0], shape[2:])


@pytest.mark.parametrize(("layer", "shape"), [*LAYERS.values(), *GROUPED.values()], ids=[*LAYERS, *GROUPED])
def test_dense_counts_equal_torchs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    dense = operation(layer)
    assert flops([dense], flow(layer, shape)) == counted(layer, shape)
    assert parameters([dense]) == cast("nn.Parameter", layer.weight).numel()
    assert dense.weight_shape == tuple(cast("nn.Parameter", layer.weight).shape)


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_factorized_counts_equal_torchs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    dense = operation(layer)
    scheme = scheme_for(dense)
    assert scheme is not None
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
    small = tdfx.rewrite(nn.Sequential(layer), policy).get_submodule("0")
    assert isinstance(small, Factorized)
    chain = scheme.chain(dense, small.origin.ranks)
    assert flops(chain, flow(layer, shape)) == counted(small, shape)
    assert parameters(chain) == sum(weight.numel() for weight in small.weights)
    assert flops(chain, flow(layer, shape)) != flops([dense], flow(layer, shape))


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_a_plan_has_the_same_counts(layer: nn.Module, shape: tuple[int, ...]) -> None:
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1, cost=Modelled())
    model = nn.Sequential(layer)
    (site,) = tdfx.plan(model, policy, example_inputs=torch.randn(shape)).sites
    assert (site.flops_before, site.flops_after) == (counted(model, shape), counted(tdfx.rewrite(model, policy), shape))


def test_counts_by_hand() -> None:
    dense = operation(nn.Conv2d(3, 5, 3, stride=2, padding=1))
    (step,) = count_chain([dense], Flow(2, (8, 6)))
    assert step.flops == 2 * (2 * 5 * 4 * 3) * 27
    assert step.values == 2 * 3 * 8 * 6 + 2 * 5 * 4 * 3 + 5 * 27
    linear = operation(nn.Linear(7, 4))
    (step,) = count_chain([linear], Flow(10))
    assert (step.flops, step.values) == (2 * 10 * 7 * 4, 70 + 40 + 28)
    assert [step.flops for step in count_chain([linear, Operation.pointwise(4, 2, 0)], Flow(10))] == [560, 160]


def test_modelled_by_hand() -> None:
    cost = Modelled(flops_per_second=1000.0, bytes_per_second=100.0, seconds_per_call=0.5)
    linear = operation(nn.Linear(7, 4))
    # 560 operations take 0.56 s, 138 values of 4 bytes take 5.52 s; forward once, backward twice.
    assert cost.seconds([linear], Flow(10)) == pytest.approx(3 * (0.56 + 5.52 + 0.5))
    assert cost.seconds([linear, linear], Flow(10)) > 1.9 * cost.seconds([linear], Flow(10))


def test_without_a_flow_a_nominal_flow_is_used() -> None:
    cost = Modelled()
    linear, conv = operation(nn.Linear(64, 32)), operation(nn.Conv2d(8, 8, 3, dilation=2))
    assert cost.seconds([linear], None) == cost.seconds([linear], Flow(32))
    assert cost.seconds([conv], None) == cost.seconds([conv], Flow(32, (36, 36)))
    assert cost.seconds([conv], None) != cost.seconds([conv], Flow(32, (32, 32)))
    scheme = scheme_for(conv)
    assert scheme is not None
    chain = scheme.chain(conv, (4, 4))
    assert cost.seconds(chain, None) == cost.seconds(chain, Flow(32, (36, 36)))


def gain(layer: nn.Module, share: float, given: Flow | None) -> float:
    dense = operation(layer)
    scheme = scheme_for(dense)
    assert scheme is not None
    chain = scheme.chain(dense, [int(share * rank) for rank in scheme.full_ranks(dense)])
    return Modelled().seconds([dense], given) / Modelled().seconds(chain, given)


@pytest.mark.parametrize("given", [Flow(32, (32, 32)), None], ids=str)
def test_big_layers_gain_and_small_ones_lose(given: Flow | None) -> None:
    big = nn.Conv2d(256, 256, 3, padding=1)
    assert gain(big, 0.25, given) > 2
    assert gain(big, 0.25, given) > gain(big, 0.5, given) > 1 > gain(big, 1.0, given)
    assert gain(nn.Conv2d(8, 8, 1), 0.5, given) < 1  # bound by memory: two small products read and write more than one


def test_calls_with_little_work_lose() -> None:
    tiny = nn.Conv2d(8, 8, 3, padding=1)
    assert gain(tiny, 0.5, Flow(1, (4, 4))) < 0.5
    assert gain(tiny, 0.5, Flow(1, (4, 4))) < gain(tiny, 0.5, Flow(64, (64, 64)))


def test_groups_of_few_channels_gain_nothing() -> None:
    """Measured on ResNeXt's groups of 4 to 16 channels, a quarter of the ranks is not faster than dense."""
    where = Flow(8, (28, 28))
    assert gain(nn.Conv2d(256, 256, 3, padding=1, groups=4), 0.25, where) > 2
    assert gain(nn.Conv2d(128, 128, 3, padding=1, groups=32), 0.25, where) < 1
    assert gain(nn.Conv2d(512, 512, 3, padding=1, groups=32), 0.25, where) < 1
    dense, depthwise = (operation(nn.Conv2d(64, 64, 3, groups=groups)) for groups in (1, 64))
    assert Modelled().seconds([depthwise], where) < Modelled().seconds([dense], where)


@pytest.mark.parametrize(
    "given",
    [
        {"flops_per_second": 0.0},
        {"flops_per_second": -1.0},
        {"bytes_per_second": 0.0},
        {"seconds_per_call": -1e-9},
        {"bytes_per_second": float("nan")},
    ],
)
def test_rates_must_be_positive(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(
        PolicyError, match=rf"Modelled\(.*{name}=.*\) has a rate that is not positive or a negative time"
    ):
        Modelled(**given)


def test_free_calls_are_allowed() -> None:
    assert Modelled(seconds_per_call=0.0).seconds([operation(nn.Linear(4, 4))], Flow(1)) > 0
