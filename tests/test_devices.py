"""Devices other than the CPU: fake tensors that have a device and no values, and fake modules in place of torch's own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tdfx
from tdfx import devices
from tdfx.cost import measured, rates
from tdfx.cost.accelerators import ACCELERATORS
from tdfx.cost.count import Flow
from tdfx.cost.machine import describe_machine
from tdfx.cost.setting import Setting
from tdfx.cost.timing import Timing, take_turns
from tdfx.factors.metric import Metric
from tdfx.factors.moments import SiteMoments
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme
from tdfx.layers.placement import full_precise
from tdfx.passes.analysis.observe import Entered
from tdfx.ranks.spectrum import _SMALL, spectrum, symmetric_eigen

CONV = replace(Operation.pointwise(16, 24, 2), kernel=(3, 3), padding=(1, 1))


class FakeModule:
    """Stands for ``torch.cuda``, ``torch.xpu`` or ``torch.mps``, and records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.states: dict[str, Tensor] = {}

    def synchronize(self, *arguments: Any) -> None:
        self.calls.append(("synchronize", *arguments))

    def get_rng_state(self, device: Any) -> Tensor:
        return self.states.setdefault(str(device), torch.zeros(1)).clone()

    def set_rng_state(self, state: Tensor, device: Any) -> None:
        self.states[str(device)] = state

    def current_device(self) -> int:
        return 0


@pytest.fixture
def fake_module(monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    module = FakeModule()
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    return module


def test_waiting_passes_the_device_but_not_on_mps(fake_module: FakeModule) -> None:
    for name in ("cpu", "meta", "cuda:1", "xpu", "mps"):
        devices.synchronize(name)
    assert fake_module.calls == [
        ("synchronize", torch.device("cuda:1")),
        ("synchronize", torch.device("xpu")),
        ("synchronize",),
    ]


def test_the_random_streams_of_every_kind_are_put_back(fake_module: FakeModule) -> None:
    kinds = [torch.device(name) for name in ("cuda:1", "xpu:0", "mps", "cpu", "meta")]
    cpu = torch.get_rng_state()
    with devices.random_streams_kept(kinds):
        torch.rand(1)
        for state in fake_module.states:
            fake_module.states[state] = torch.ones(1)
    assert torch.equal(torch.get_rng_state(), cpu)
    assert set(fake_module.states) == {"cuda:1", "xpu:0", "mps"}
    assert not any(map(bool, fake_module.states.values()))


def test_streams_of_all_devices_in_use_are_put_back(fake_module: FakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = fake_module
    fake.device_count, fake.is_initialized = (lambda: 2), (lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with devices.random_streams_kept([]):
        pass
    assert set(fake_module.states) == {"cuda:0", "cuda:1"}
    fake.is_initialized = lambda: False
    fake_module.states.clear()
    with devices.random_streams_kept([]):
        pass
    assert not fake_module.states


def test_an_index_is_named_unless_it_is_the_current_one(fake_module: FakeModule) -> None:
    names = [devices.short_name(torch.device(name)) for name in ("cuda:0", "cuda:1", "cuda", "cpu")]
    assert names == ["cuda", "cuda:1", "cuda", "cpu"]


def test_decompositions_move_to_the_cpu_where_a_device_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=device.index == 0))
    with FakeTensorMode():
        where = {name: full_precise(torch.ones(2, device=name)) for name in ("cpu", "cuda:0", "mps", "xpu:0", "xpu:1")}
    assert {tensor.dtype for tensor in where.values()} == {torch.float64}
    kinds = {name: tensor.device.type for name, tensor in where.items()}
    assert kinds == {"cpu": "cpu", "cuda:0": "cuda", "mps": "cpu", "xpu:0": "xpu", "xpu:1": "cpu"}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records on which kinds of devices operations ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ran: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        name = func.overloadpacket.__name__
        # NumPy and the CPU-only parts read a few values; a read of a fake one would raise.
        self.ran.update((name, tensor.device.type) for tensor in tensors)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["tucker2", "tucker1_in", "svd", "spatial"])
def test_no_sum_whose_order_a_gpu_chooses_is_taken_on_it(name: str) -> None:
    """With ``use_deterministic_algorithms`` torch raises for ``cumsum`` of floats on CUDA."""
    scheme, ran = get_scheme(name), Operations()
    operation = CONV if scheme.fits(CONV) else Operation(in_channels=16, out_channels=24)
    with FakeTensorMode(), ran:
        w = torch.randn(operation.weight_shape, dtype=torch.float64, device="cuda")
        spectra = scheme.spectra(operation, w)
        assert all(each.values.device.type == "cpu" and each.basis.device.type == "cuda" for each in spectra)
        ranks = tuple(4 for _ in scheme.full_ranks(operation))
        for rule in (lambda: spectra[0].energy(), lambda: scheme.errors(operation, w, [ranks], spectra)):
            with pytest.raises(Exception, match=r"aten\._local_scalar_dense|Unsupported|data-dependent"):
                rule()  # it comes as far as reading a number
        factors = scheme.split(operation, w, ranks, spectra)
        assert {factor.device.type for factor in factors} == {"cuda"}
    assert ("cumsum", "cuda") not in ran.ran
    assert ("mm", "cuda") in ran.ran or ("bmm", "cuda") in ran.ran


def test_a_metric_is_decomposed_where_the_weight_is() -> None:
    with FakeTensorMode():
        moment = torch.ones(1, 16, 16, device="mps")
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense"):
            Metric.of(SiteMoments(inputs=moment, outputs=None, samples=9), "inputs")


def solver(fails_on: str, seen: list[str], result: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def solve(gram: Tensor) -> Any:
        seen.append(gram.device.type)
        if gram.device.type == fails_on:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")  # type: ignore[attr-defined]
        return result(gram)

    return solve


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((_SMALL + 1,) * 2, ["cuda", "cpu"]), ((8, 8), ["cpu"]), ((3, 600, 600), ["cpu"])],
    ids=["large: tried there", "small", "batch"],
)
def test_eigenproblems_are_solved_on_the_cpu_where_the_device_fails(
    shape: tuple[int, ...], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.linalg, "eigh", solver("cuda", seen, torch.linalg.eigh))
    monkeypatch.setattr(torch.linalg, "eigvalsh", solver("cuda", seen, torch.linalg.eigvalsh))
    with FakeTensorMode():
        gram = torch.zeros(shape, device="cuda")
        values, vectors = symmetric_eigen(gram)
        assert seen == expected
        assert (values.device.type, vectors.device.type) == ("cuda", "cuda")
        assert (values.shape, vectors.shape) == (shape[:-1], shape)
        seen.clear()
        spectrum(gram, with_basis=False)
        assert seen == expected


def test_the_key_of_a_gpu_has_its_name_and_not_the_threads_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"cuda": "H200", "cuda:1": "L4"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])

    def keys() -> list[str]:
        return [describe_machine(name) for name in ("cuda", "cuda:1", "cpu")]

    first, other, cpu = keys()
    assert "H200" in first
    assert "L4" in other
    assert devices.processor() in first
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert keys()[:2] == [first, other]
        assert keys()[2] != cpu
    finally:
        torch.set_num_threads(threads)
    with torch.backends.cudnn.flags(deterministic=True):
        assert keys()[0] != first
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)
    assert keys()[0] != first


def test_a_broken_device_is_said_and_a_full_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> Callable[..., Any]:
        def apply(*_: Any, **__: Any) -> Any:
            raise error

        return apply

    cost = tdfx.Measured(update_bytes=0, cache=False)
    group = [[((CONV,), Flow(2, (8, 8)))]]
    for harmless in (torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error: out of memory")):
        monkeypatch.setattr("tdfx.cost.workload.apply_operation", fails(harmless))
        assert cost.measure(group) == {}
    sticky = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr("tdfx.cost.workload.apply_operation", fails(sticky))
    with pytest.raises(tdfx.TdfxError, match=r"computes nothing more in this process: CUDA error: an illegal .* Start"):
        cost.measure(group)


def test_memory_is_freed_before_cases_are_timed_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """All together they do not fit; one by one they do."""
    alive: list[int] = []
    works: list[weakref.ref[Any]] = []

    def turns(runs: Any, **_: Any) -> list[Timing]:
        works.extend(weakref.ref(run.__self__) for run in runs)
        gc.collect()
        alive.append(sum(work() is not None for work in works))
        if len(runs) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [Timing((4.0,))]

    monkeypatch.setattr(measured, "take_turns", turns)
    other = replace(CONV, out_channels=8)
    cases = [((CONV,), Flow(2, (8, 8))), ((other,), Flow(2, (8, 8)))]
    assert len(tdfx.Measured(update_bytes=0, cache=False).measure([cases])) == 2
    assert alive == [2, 1, 1]


def test_sites_on_another_gpu_are_timed_on_it_and_share_times_with_equal_ones(
    fake_module: FakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"cuda": "H200", "cuda:1": "H200", "cuda:2": "L4"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    fake: Any = SimpleNamespace(device=torch.device("cuda:1"), dtype=torch.float32, shape=(2, 3), dim=lambda: 2)
    monkeypatch.setattr("tdfx.passes.analysis.observe.storage_address", id)
    entered = Entered.of(fake, ())
    assert entered.setting.device == "cuda:1"
    keys = [tdfx.Measured()._key((CONV,), Flow(2, setting=Setting(device=name))) for name in names]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_the_time_on_a_gpu_is_the_largest_of_launch_arithmetic_and_traffic(device: str) -> None:
    model, numbers = tdfx.Measured().modelled, ACCELERATORS[device]
    half = Setting(device=device, autocast=torch.bfloat16)
    tiny, large = Operation(in_channels=4, out_channels=4), Operation(in_channels=8192, out_channels=8192)
    assert model.seconds([tiny], Flow(1, setting=half)) == pytest.approx(3 * numbers.launch)
    by_arithmetic = 3 * 2 * 2**16 * 8192**2 / numbers.flops[2]
    assert model.seconds([large], Flow(2**16, setting=half)) == pytest.approx(by_arithmetic)
    by_traffic = 3 * 2 * (2**22 * 8 + 16) / numbers.bytes
    assert model.seconds([tiny], Flow(2**22, setting=half)) == pytest.approx(by_traffic)
    assert model.seconds([tiny], Flow(2**22, setting=Setting(device=device))) == pytest.approx(2 * by_traffic)
    assert tdfx.Modelled().seconds([tiny], Flow(1, setting=half)) == tdfx.Modelled().seconds([tiny], Flow(1))


def test_rates_are_finite_where_launches_hide_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    class Work:
        steps = 1

        def run(self) -> None: ...

    monkeypatch.setattr(rates, "Workload", lambda *_: Work())
    monkeypatch.setattr(rates, "take_turns", lambda runs, **_: [Timing((3e-5,)) for _ in runs])
    found = rates._fit("cuda", torch.float32)
    assert found[0] < 1e17
    assert found[1] < 1e15
    assert found[2] > 0


def test_auto_rounds_by_the_dtype_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdfx.passes.planning.proposals.device_multiple", lambda dtype, device: 128 // dtype.itemsize)
    model = torch.nn.Sequential(torch.nn.Linear(512, 512))
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.2), min_gain=0, round_to="auto")

    def rank() -> Any:
        return tdfx.plan(model, policy, example_inputs=(torch.ones(2, 512),)).sites[0].ranks

    assert rank() == (128,)
    with torch.autocast("cpu", torch.bfloat16):
        assert rank() == (128,)
    policy = replace(policy, rank=tdfx.Ratio(of=0.3))
    assert rank() == (160,)
    with torch.autocast("cpu", torch.bfloat16):
        assert rank() == (192,)


def test_a_single_slow_call_is_no_sample_of_a_short_function() -> None:
    """Its library was loaded, or its kernel chosen, in the first call."""
    now, left = [0.0], [1.0]

    def run() -> None:
        now[0] += left.pop() if left else 1e-5

    (timing,) = take_turns([run], rounds=3, clock=lambda: now[0])
    assert timing.seconds == pytest.approx(1e-5)
    assert now[0] > 1.0 + 2 * 1e-3 * 0.99  # two samples agree


def test_the_step_times_of_a_loop_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []
    monkeypatch.setattr("tdfx.training.switch.switch.synchronize", waits.append)
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(8, 8))
    switch = tdfx.Switch(when=tdfx.AtStep(150), total_steps=200)
    for _ in range(60):
        model = switch.step(model)
    assert 0 < len(waits) < 60
    assert set(waits) == {torch.device("cpu")}
