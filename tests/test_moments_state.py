"""Moments: which rows are sampled, what they cost, and saving, loading and averaging."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from moments_runs import (
    LAYERS,
    batches,
    net,
    train,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tdfx
import tdfx.passes.analysis.moments
from tdfx.distributed.processes import Solo
from tdfx.factors.moments import LARGEST_SIDE, sample_rows, second_moment
from tdfx.passes.analysis.sandbox import random_states


@pytest.mark.parametrize("shape", [(150,), (2, 75), (3, 10, 5), (2, 5, 3, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_sampled_rows_are_rows(shape: tuple[int, ...], channels_last: bool) -> None:
    rows, channels = math.prod(shape), 7
    x = torch.arange(rows * channels).view(*shape, channels)
    dim = -1 if channels_last else -len(shape)
    x = x.movedim(-1, dim).contiguous() if len(shape) > 1 else x
    dim = dim if len(shape) > 1 else -1
    assert torch.equal(sample_rows(x, dim, 1.0, 3).sort(0).values, torch.arange(rows * channels).view(rows, channels))
    sampled = sample_rows(x, dim, 0.01, 0)
    assert torch.equal(sampled[:, 0] % channels, torch.zeros(len(sampled), dtype=torch.long))
    assert torch.equal(sampled - sampled[:, :1], torch.arange(channels).expand(len(sampled), channels))
    assert len(set(sampled[:, 0].tolist())) == len(sampled) == rows


def test_about_a_sixteenth_of_the_rows_is_sampled_from_all_columns() -> None:
    x = torch.arange(64 * 32 * 32, dtype=torch.float32).view(64, 1, 32, 32)
    samples = [sample_rows(x, -3, 1 / 16, turn)[:, 0].long() for turn in range(8)]
    for sample in samples:
        assert len(x.flatten()) / 16 <= len(sample) < len(x.flatten()) / 14
        assert len(set((sample % 32).tolist())) == 32
        assert len(set((sample // 32 % 32).tolist())) == 32
    assert len(set(torch.cat(samples).tolist())) == sum(map(len, samples))


@pytest.mark.parametrize(("rows", "sampled"), [(0, 0), (1, 1), (255, 255), (256, 256), (1000, 334), (64 * 256, 1093)])
def test_few_rows_are_all_sampled(rows: int, sampled: int) -> None:
    assert len(sample_rows(torch.zeros(rows, 3), -1, 1 / 16, 0)) == sampled
    assert sample_rows(torch.zeros(3), -1, 1 / 16, 0).shape == (1, 3)


def test_a_sample_copies_only_its_rows() -> None:
    sizes: list[int] = []
    address = 0

    class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != address:
                sizes.append(result.untyped_storage().nbytes() // result.element_size())
            return result

    x = torch.zeros(64, 8, 32, 32)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        address = y.untyped_storage().data_ptr()
        with Sizes():  # type: ignore[no-untyped-call]
            sample_rows(y, -3, 1 / 16, 1)
        assert x.numel() / 17 < max(sizes) < x.numel() / 14
        sizes.clear()


def test_sampled_moments_are_near_those_of_all_rows() -> None:
    torch.manual_seed(3)
    mixing = torch.randn(6, 6)
    errors = []
    for share in (1 / 16, 1.0):
        model = nn.Conv2d(6, 6, 1)
        moments = tdfx.Moments(model, _share=share)
        x = torch.einsum("ij,njhw->nihw", mixing, torch.randn(32, 6, 32, 32))
        (model(x) * torch.randn(32, 6, 32, 32)).sum().backward()
        found = moments.of("weight")
        assert found is not None
        assert found.inputs is not None
        errors.append(float((found.inputs[0] - mixing @ mixing.mT).norm() / (mixing @ mixing.mT).norm()))
    # The error of a second moment of n normal rows is about sqrt(channels / n): of 2,100 rows 0.05, of 32,768 rows 0.014.
    assert errors[1] < 0.03
    assert errors[0] < 0.12


def test_a_long_side_has_a_diagonal_only() -> None:
    rows = torch.randn(5, LARGEST_SIDE + 1, dtype=torch.float64)
    torch.testing.assert_close(second_moment(rows, 1), rows.square().sum(0, keepdim=True))
    assert second_moment(torch.randn(5, 2 * LARGEST_SIDE), 2).shape == (2, LARGEST_SIDE, LARGEST_SIDE)
    model = nn.Linear(4, LARGEST_SIDE + 1)
    moments = tdfx.Moments(model)
    model(torch.randn(3, 4)).square().mean().backward()
    found = moments.of("weight")
    assert found is not None
    assert found.inputs is not None
    assert found.outputs is not None
    assert (found.inputs.shape, found.outputs.shape) == ((1, 4, 4), (1, LARGEST_SIDE + 1))
    assert float(found.outputs.mean()) == pytest.approx(1.0, rel=1e-5)


def test_other_rows_are_sampled_in_each_unit_and_no_random_numbers_are_drawn() -> None:
    model = nn.Linear(1, 1)
    moments = tdfx.Moments(model)
    x = torch.arange(64 * 256.0).unsqueeze(1)
    sums = []
    for _ in range(2):
        before = random_states()
        model(x).sum().backward()
        found = moments.of("weight")
        assert found is not None
        assert found.inputs is not None
        sums.append(found.inputs.item())
        assert random_states() == before
    assert sums[0] != sums[1]


def test_a_resumed_collection_goes_on() -> None:
    data = batches(4)
    whole, model = net().eval(), net().eval()
    expected = tdfx.Moments(whole, _share=1.0)
    train(whole, data, lr=0.0)
    first = tdfx.Moments(model, _share=1.0)
    train(model, data[:2], lr=0.0)
    first.remove()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = tdfx.Moments(model, _share=1.0)
    second.load_state_dict(torch.load(file))
    assert second.units == 2
    train(model, data[2:], lr=0.0)
    assert second.units == 4
    for name in LAYERS:
        old, new = expected.of(f"{name}.weight"), second.of(f"{name}.weight")
        assert old is not None
        assert new is not None
        torch.testing.assert_close(new.inputs, old.inputs)
        torch.testing.assert_close(new.outputs, old.outputs)
        assert new.samples == old.samples


def test_a_saved_state_does_not_change_later() -> None:
    model = net()
    moments = tdfx.Moments(model)
    train(model, batches(1))
    state = moments.state_dict()
    before = copy.deepcopy(state)
    train(model, batches(1))
    assert moments.units == 2
    assert state["units"] == before["units"]
    for path, site in state["sites"].items():
        assert torch.equal(site["inputs"], before["sites"][path]["inputs"])


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = net()
    moments = tdfx.Moments(model)
    train(model, batches(1))
    other = nn.Sequential(nn.Linear(4, 4))
    foreign = tdfx.Moments(other)
    other(torch.randn(2, 4)).sum().backward()
    message = (
        r"moments of '0.weight', and the model has no such weight. Nearest: .*weight'.* Load it for the model that"
    )
    with pytest.raises(tdfx.CheckpointError, match=message):
        moments.load_state_dict(foreign.state_dict())
    for state in ({}, {"units": 1}, {"units": 1, "sites": {"first.weight": {}}}, [1]):
        with pytest.raises(tdfx.CheckpointError, match=r"This is no state of tdfx.Moments .* Pass what state_dict"):
            moments.load_state_dict(state)  # type: ignore[arg-type]
    assert moments.units == 1
    assert moments.of("first.weight") is not None


def test_arguments_are_checked() -> None:
    with pytest.raises(
        tdfx.ModelError, match=r"model is a list, not a torch.nn.Module. Pass the module that you train"
    ):
        tdfx.Moments([])  # type: ignore[arg-type]
    with pytest.raises(
        tdfx.PolicyError, match="steps=0 is not a whole number of at least 1: it is about how many training"
    ):
        tdfx.Moments(net(), steps=0)


def test_the_only_process_averages_with_nobody() -> None:
    model = net()
    moments = tdfx.Moments(model)
    train(model, batches(2))
    before = moments.state_dict()
    moments.average(Solo())
    after = moments.state_dict()
    assert after["units"] == before["units"] == 2
    assert list(after["sites"]) == list(before["sites"])
    for path, site in after["sites"].items():
        assert torch.equal(site["inputs"], before["sites"][path]["inputs"])
        assert site["rows"] == before["sites"][path]["rows"]


def test_a_state_of_other_widths_is_refused() -> None:
    narrow, wide = nn.Linear(4, 4), nn.Linear(4, 6)
    moments = tdfx.Moments(narrow)
    narrow(torch.randn(2, 4)).sum().backward()
    with pytest.raises(
        tdfx.CheckpointError,
        match=r"of shapes \(1, 4, 4\) and \(1, 4, 4\) for 'weight', which has 4 input and 6 output channels. Load it for",
    ):
        tdfx.Moments(wide).load_state_dict(moments.state_dict())


def test_eight_steps_are_recorded_with_less_arithmetic_than_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    recorded = 0

    def counted(rows: Tensor, groups: int) -> Tensor:
        nonlocal recorded
        recorded += 2 * rows.shape[0] * rows.shape[1] ** 2 // groups
        return second_moment(rows, groups)

    monkeypatch.setattr(tdfx.passes.analysis.moments, "second_moment", counted)
    model = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128), nn.Linear(128, 128))
    x = torch.randn(4096, 128)
    with tdfx.Moments(model) as moments, FlopCounterMode(display=False) as counter:
        for _ in range(8):
            model(x).square().mean().backward()
    assert moments.units == 8
    assert 0 < recorded < counter.get_total_flops() / 8
