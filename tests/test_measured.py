"""Measured times: what is timed, in which setting, how often, and what happens where nothing was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx import Measured, Modelled, PolicyError
from tdfx.cost import measured
from tdfx.cost.count import Flow, intermediate_values, parameters, training_bytes
from tdfx.cost.rates import rates, stream_rate
from tdfx.cost.setting import Setting
from tdfx.cost.timing import Timing
from tdfx.cost.workload import Workload
from tdfx.factors.functions import apply_operation
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme
from tdfx.kinds.registry import operation_of
from tdfx.passes.analysis.find import Find
from tdfx.passes.analysis.shapes import ObserveInputs
from tdfx.passes.analysis.trace import Trace
from tdfx.passes.program import Program

CONV = Operation(in_channels=16, out_channels=24, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
FLOW = Flow(2, (8, 8))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDFX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.setattr(measured, "_measured_at", {})
    monkeypatch.setattr(measured, "_loads", {})
    monkeypatch.setattr(measured, "_load_now", [])
    monkeypatch.setattr(measured, "_provisional", set())


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[Operation, ...]]]:
    """Time nothing: what is timed takes as many seconds as it has operations; return what was timed together."""
    seen: list[list[tuple[Operation, ...]]] = []

    def turns(runs: Sequence[Any], **_: Any) -> list[Timing]:
        seen.append([run.__self__.chain for run in runs])
        return [Timing((float(len(run.__self__.chain) * run.__self__.steps),) * 3) for run in runs]

    monkeypatch.setattr(measured, "take_turns", turns)
    return seen


LAYERS = {
    "linear": (nn.Linear(6, 4, bias=False), (5, 6)),
    "conv1d": (nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2, bias=False), (2, 4, 21)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=(1, 0), groups=2, bias=False), (2, 4, 7, 8)),
    "conv3d": (nn.Conv3d(4, 6, 3, padding=1, bias=False), (2, 4, 5, 4, 5)),
    "same": (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=2, bias=False), (2, 4, 9, 9)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid", padding_mode="reflect", bias=False), (2, 4, 9, 9)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect", bias=False), (2, 4, 9, 9)),
    "circular_same": (nn.Conv2d(4, 6, (4, 3), padding="same", padding_mode="circular", bias=False), (2, 4, 9, 9)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False), (2, 4, 5, 6)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2, bias=False), (2, 4, 5)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_a_workload_computes_what_the_layer_does(layer: nn.Module, shape: tuple[int, ...]) -> None:
    operation = operation_of(layer)
    assert operation is not None
    x, weight = torch.randn(shape), layer.get_parameter("weight")
    assert torch.equal(apply_operation(operation, x, weight), layer(x))
    assert not torch.equal(apply_operation(operation, x, 2 * weight), layer(x))


def test_a_workload_computes_every_gradient_in_its_setting() -> None:
    chain = get_scheme("tucker2").chain(CONV, (8, 8))
    setting = Setting(channels_last=True, dtype=torch.float64)
    work = Workload(chain, Flow(2, (8, 8), setting=setting))
    assert work.inputs[0].shape == (2, 16, 8, 8)
    assert work.inputs[0].is_contiguous(memory_format=torch.channels_last)
    assert all(tensor.dtype == torch.float64 for tensor in (work.inputs[0], *work.weights))
    assert [tuple(tensor.shape) for tensor in work.wanted(work.inputs[0])] == [
        (2, 16, 8, 8),
        (8, 16, 1, 1),
        (8, 8, 3, 3),
        (24, 8, 1, 1),
    ]
    work.run()
    assert all(tensor.grad is None for tensor in work.wanted(work.inputs[0]))
    first = Workload(chain, Flow(2, (8, 8), setting=Setting(wants_input_gradient=False)))
    assert not first.inputs[0].requires_grad
    assert len(first.wanted(first.inputs[0])) == 3


def test_a_workload_under_autocast_computes_in_its_dtype() -> None:
    work = Workload([CONV], Flow(2, (8, 8), setting=Setting(autocast=torch.bfloat16)))
    assert (work.weights[0].dtype, work.inputs[0].dtype, work.gradient.dtype) == (torch.float32, *[torch.bfloat16] * 2)
    work.run()


def test_competing_workloads_share_their_input() -> None:
    dense = Workload([CONV], FLOW)
    other = Workload(get_scheme("tucker2").chain(CONV, (8, 8)), FLOW, shares=(dense,))
    assert other.inputs is dense.inputs
    assert other.gradient is dense.gradient
    wider = Workload([CONV], Flow(4, (8, 8)), shares=(dense,))
    assert wider.inputs is not dense.inputs


def test_measuring_leaves_the_stream_of_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Measured(rounds=1, cache=False).seconds([CONV], FLOW)
    assert torch.equal(torch.rand(2), expected)


def test_measured_times_grow_with_the_work() -> None:
    cost = Measured(rounds=3, cache=False, update_bytes=0)
    small, large = Flow(1, (8, 8)), Flow(64, (32, 32))
    times = cost.measure([[((CONV,), small)], [((CONV,), large)]])
    assert 1e-6 < times[(CONV,), small] < 0.3
    # A thousand times the work; even on a disturbed machine it takes longer.
    assert times[(CONV,), large] > 5 * times[(CONV,), small]


def test_equal_work_is_timed_once(timed: list[list[tuple[Operation, ...]]]) -> None:
    chain = get_scheme("tucker2").chain(CONV, (8, 8))
    cost = Measured(update_bytes=0)
    times = cost.measure([[((CONV,), FLOW), (chain, FLOW)], [((CONV,), FLOW), (chain, FLOW)]])
    assert timed == [[(CONV,), chain]]
    assert times == {((CONV,), FLOW): 1.0, (chain, FLOW): 3.0}
    assert cost.seconds(chain, FLOW) == 3.0
    assert len(timed) == 1


def test_times_come_from_disk_in_the_next_process(
    timed: list[list[tuple[Operation, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    Measured(update_bytes=0).seconds([CONV], FLOW)
    monkeypatch.setattr(measured, "_known", {})
    assert Measured(update_bytes=0).seconds([CONV], FLOW) == 1.0
    assert len(timed) == 1
    monkeypatch.setattr(measured, "_known", {})
    Measured(update_bytes=0, cache=False).seconds([CONV], FLOW)
    assert len(timed) == 2


@pytest.mark.parametrize(
    "other",
    [
        Flow(3, (8, 8)),
        Flow(2, (8, 9)),
        Flow(2, (8, 8), setting=Setting(channels_last=True)),
        Flow(2, (8, 8), setting=Setting(dtype=torch.float64)),
        Flow(2, (8, 8), setting=Setting(autocast=torch.bfloat16)),
        Flow(2, (8, 8), setting=Setting(wants_input_gradient=False)),
    ],
    ids=["samples", "size", "layout", "dtype", "autocast", "gradient"],
)
def test_work_that_differs_in_any_setting_is_timed_separately(timed: list[Any], other: Flow) -> None:
    cost = Measured()
    cost.measure([[((CONV,), FLOW)], [((CONV,), other)]])
    assert len(timed) == 2


def test_threads_and_settings_of_torch_count(timed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cost = Measured()
    cost.seconds([CONV], FLOW)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    cost.seconds([CONV], FLOW)
    assert len(timed) == 2


def test_new_times_are_scaled_by_an_old_time_measured_again(
    timed: list[list[tuple[Operation, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = get_scheme("tucker2").chain(CONV, (8, 8))
    cost = Measured(update_bytes=0)
    cost.seconds([CONV], FLOW)
    # A moment later it need not be timed again.
    monkeypatch.setattr(measured, "take_turns", lambda runs, **_: [Timing((4 * 2.0,))])
    other = get_scheme("tucker2").chain(CONV, (8, 16))
    assert cost.measure([[((CONV,), FLOW), (other, FLOW)]]) == {((CONV,), FLOW): 1.0, (other, FLOW): 2.0}
    # Long after that the machine is twice as slow.
    monkeypatch.setattr(measured, "_FRESH", 0.0)
    monkeypatch.setattr(measured, "take_turns", lambda runs, **_: [Timing((4 * 2.0,)), Timing((4 * 6.0,))])
    times = cost.measure([[((CONV,), FLOW), (chain, FLOW)]])
    assert times == {((CONV,), FLOW): 1.0, (chain, FLOW): 3.0}


def test_nothing_is_measured_beyond_the_budget(timed: list[Any]) -> None:
    chain = get_scheme("tucker2").chain(CONV, (8, 8))
    model, cost = Modelled(), Measured(update_bytes=0)
    cost.seconds([CONV], FLOW)
    assert cost.measure([[((CONV,), FLOW), (chain, FLOW)]], spent=cost.budget) == {((CONV,), FLOW): 1.0}
    assert len(timed) == 1
    hurried = Measured(update_bytes=0, budget=1e-9)
    assert hurried.seconds(chain, FLOW) == model.seconds(chain, FLOW)


def test_a_time_of_too_few_samples_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "take_turns", lambda runs, **_: [Timing((8.0, 36.0, 36.0))])
    assert Measured(update_bytes=0).seconds([CONV], FLOW) == 2.0
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.setattr(measured, "take_turns", lambda runs, **_: [Timing((4.0, 4.0, 4.0))])
    assert Measured(update_bytes=0).seconds([CONV], FLOW) == 1.0


def test_on_a_busy_machine_few_samples_have_to_do_until_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = Measured(update_bytes=0)
    monkeypatch.setattr(measured, "take_turns", lambda runs, **_: [Timing((8.0,), load=6.0)])
    assert cost.seconds([CONV], FLOW) == 2.0
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.setattr(measured, "_loads", {})
    monkeypatch.setattr(measured, "take_turns", lambda runs, **_: [Timing((4.0, 4.0, 4.0))])
    cost.record({}, 2.0)
    assert cost.seconds([CONV], FLOW) == 2.0
    cost.record({}, 1.0)
    assert cost.seconds([CONV], FLOW) == 1.0
    assert cost.seconds([CONV], FLOW) == 1.0


def test_without_inputs_and_on_the_meta_device_times_are_modelled(timed: list[Any]) -> None:
    cost, model = Measured(), Modelled()
    assert cost.seconds([CONV], None) == model.seconds([CONV], None)
    on_meta = Flow(2, (8, 8), setting=Setting(device="meta"))
    assert cost.seconds([CONV], on_meta) == model.seconds([CONV], on_meta)
    assert cost.measure([[((CONV,), None)]]) == {}
    assert timed == []


def test_a_chain_that_cannot_be_run_is_modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("tdfx.cost.workload.apply_operation", fails)
    cost = Measured(update_bytes=0, cache=False)
    assert cost.seconds([CONV], FLOW) == Modelled().seconds([CONV], FLOW)


def test_the_optimizers_share_is_the_memory_traffic_of_its_update(timed: list[Any]) -> None:
    speed = stream_rate(cache=False)
    with_update = Measured(update_bytes=28, cache=False).seconds([CONV], FLOW)
    assert with_update == pytest.approx(1.0 + 28 * parameters([CONV]) / speed, rel=0.5)
    assert with_update > 1.0


@pytest.mark.parametrize("wrong", [{"budget": 0}, {"rounds": 0}, {"rounds": 1.5}, {"update_bytes": -1}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="has a number out of range: budget is a positive time in seconds"):
        Measured(**wrong)


def test_the_machine_has_rates() -> None:
    measured_rates = rates(cache=False)
    assert measured_rates.flops_per_second > 1e8
    assert measured_rates.bytes_per_second > 1e8
    assert 0 < measured_rates.seconds_per_call < 0.1
    model = Modelled.of_machine()
    assert model == Modelled(**dataclasses.asdict(measured_rates))
    assert stream_rate(cache=False) > 1e8


def test_at_the_measured_rates_modelled_times_equal_measured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = Modelled(flops_per_second=7e10, bytes_per_second=3e9, seconds_per_call=2e-5)

    def exact(runs: Any, **_: Any) -> list[Timing]:
        works = [run.__self__ for run in runs]
        flows = [Flow(work.inputs[0].shape[0], tuple(work.inputs[0].shape[2:])) for work in works]
        pairs = zip(works, flows, strict=True)
        return [Timing((work.steps * truth.seconds(work.chain, flow),)) for work, flow in pairs]

    monkeypatch.setattr("tdfx.cost.rates.take_turns", exact)
    monkeypatch.setattr("tdfx.cost.rates._known", {})
    fitted = Modelled(**dataclasses.asdict(rates(cache=False)))
    for name in ("flops_per_second", "bytes_per_second", "seconds_per_call"):
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=1e-6)


def test_intermediate_values_and_memory_by_hand() -> None:
    chain = get_scheme("tucker2").chain(CONV, (8, 4))
    assert intermediate_values(chain, FLOW) == 2 * 64 * (4 + 8)
    assert intermediate_values([CONV], FLOW) == 0
    half = Flow(2, (8, 8), setting=Setting(autocast=torch.bfloat16))
    assert training_bytes(chain, [half, half]) == 4 * 4 * parameters(chain) + 2 * (2 * 2 * 64 * (4 + 8))


def settings_of(model: nn.Module, x: Any) -> dict[str, Setting]:
    program = Find()(Trace()(Program(module=model)).program).program
    sites = ObserveInputs((x,))(program).program.sites
    return {site.name: site.flows[0].setting for site in sites if site.flows}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.free = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(self.a(x)).mean((2, 3))
        return nn.functional.linear(y.float(), self.free)


def test_each_site_has_its_setting() -> None:
    x = torch.randn(2, 3, 6, 6)
    settings = settings_of(Net(), x)
    assert settings["a"] == Setting(autocast=torch.bfloat16, wants_input_gradient=False)
    assert settings["b"] == Setting(autocast=torch.bfloat16)
    assert settings["free"] == Setting()
    layout = {"memory_format": torch.channels_last}
    last = settings_of(Net().to(**layout), x.contiguous(**layout))
    assert (last["a"].channels_last, last["b"].channels_last, last["free"].channels_last) == (True, True, False)
    assert settings_of(nn.Sequential(nn.Conv2d(3, 8, 3)).double(), x.double())["0"].dtype == torch.float64
    assert tdfx.Policy().cost == Measured()


def test_autocast_around_a_plan_does_not_affect_what_is_timed() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        work = Workload([CONV], FLOW)
        assert work.gradient.dtype == torch.float32
        with torch.no_grad():
            assert work._forward(work.inputs[0]).dtype == torch.float32


def test_both_interfaces_for_the_precision_can_be_described(monkeypatch: pytest.MonkeyPatch) -> None:
    from tdfx.cost.machine import describe_machine

    def refuses() -> str:
        raise RuntimeError("you have used the new way")

    before = describe_machine("cpu")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuses)
    assert describe_machine("cpu") != before


@pytest.mark.parametrize("stream", [None, object()])
def test_measuring_works_without_a_terminal(stream: Any, monkeypatch: pytest.MonkeyPatch, timed: list[Any]) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    Measured(update_bytes=0).seconds([CONV], FLOW)
    assert timed


def test_a_run_has_more_activations_than_the_caches_hold() -> None:
    assert Workload([CONV], FLOW).steps == 4
    assert Workload([CONV], Flow(64, (64, 64))).steps == 1
    work = Workload([CONV], Flow(2, (96, 96)))
    assert 1 < work.steps <= 4
    assert len({x.data_ptr() for x in work.inputs}) == work.steps


def test_a_small_chain_adds_inputs_to_those_of_a_large_competitor() -> None:
    pointwise = Operation.pointwise(64, 64, 2)
    flow = Flow(4, (64, 64))
    dense = Workload([dataclasses.replace(pointwise, kernel=(3, 3), padding=(1, 1))], flow)
    small = Workload([Operation.pointwise(64, 8, 2), Operation.pointwise(8, 64, 2)], flow, shares=(dense,))
    assert (dense.steps, small.steps) == (1, 4)
    assert small.inputs[0] is dense.inputs[0]
    assert small.gradient is dense.gradient
    dense.run()
    small.run()
