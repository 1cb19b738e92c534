"""Devices other than the CPU: fake tensors that have a device and no values, and fake modules in place of torch's own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tdfx import devices
from tdfx.cost.machine import describe_machine
from tdfx.factors.metric import Metric
from tdfx.factors.moments import SiteMoments
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme
from tdfx.layers.placement import full_precise
from tdfx.ranks.spectrum import _SMALL, spectrum, symmetric_eigen

CONV = Operation(in_channels=16, out_channels=24, kernel=(3, 3))


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
    with pytest.raises(KeyError), devices.random_streams_kept(kinds):
        torch.rand(1)
        for state in fake_module.states:
            fake_module.states[state] = torch.ones(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), cpu)
    assert set(fake_module.states) == {"cuda:1", "xpu:0", "mps"}
    assert not any(map(bool, fake_module.states.values()))


def test_streams_of_all_devices_in_use_are_put_back(
    fake_module: FakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
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


class Operations(TorchDispatchMode):
    """Records on which kinds of devices operations ran."""

    def __init__(self) -> None:
        super().__init__()
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
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
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
