"""How fast a machine computes and moves data: a few numbers, measured once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from tdfx.cost.count import Flow, count_chain
from tdfx.cost.machine import describe_machine
from tdfx.cost.setting import Setting
from tdfx.cost.store import Store, cache_folder
from tdfx.cost.timing import take_turns
from tdfx.cost.workload import Workload
from tdfx.factors.operation import Operation

_STREAM = {"cpu": 2**24, "cuda": 2**25}
"""Values in each tensor: more than the caches hold, and few compared with what training needs."""


@dataclass(frozen=True, slots=True)
class Rates:
    """The numbers of ``Modelled``, measured."""

    flops_per_second: float
    bytes_per_second: float
    seconds_per_call: float


def _pointwise(channels: int) -> Operation:
    return Operation.pointwise(channels, channels, 2)


_KERNEL = replace(_pointwise(256), kernel=(3, 3), padding=(1, 1))
_SMALL = (_pointwise(8), Flow(1, (2, 2)))
_LAYERS: dict[str, tuple[tuple[Operation, Flow], ...]] = {
    "cpu": ((_KERNEL, Flow(8, (16, 16))), (_pointwise(16), Flow(32, (32, 32))), _SMALL),
    "cuda": ((_KERNEL, Flow(256, (32, 32))), (_pointwise(64), Flow(64, (128, 128))), _SMALL),
}
"""Three layers: arithmetic decides the time of the first, memory that of the second, and start-up that of the third. On a
GPU the first two are so large that launches hide: at 1e15 operations and 5e12 bytes a second they take 0.3 and 0.1 ms."""


def rates(device: str = "cpu", dtype: torch.dtype = torch.float32, *, cache: bool = True) -> Rates:
    """Return the rates at which modelled steps of small layers take the measured times; ``cache`` keeps them on disk."""
    names = [f"rates {dtype} {rate.name}" for rate in fields(Rates)]
    return Rates(*_measure_once(device, names, lambda: _fit(device, dtype), cache))


def stream_rate(device: str = "cpu", *, cache: bool = True) -> float:
    """Return how many bytes per second are read and written when tensors larger than the caches are added."""
    (rate,) = _measure_once(device, ["stream"], lambda: [_stream(device)], cache)
    return rate


_known: dict[str, float] = {}
"""What this process has measured or read, by key."""


def _measure_once(
    device: str, names: Sequence[str], measure: Callable[[], Sequence[float]], cache: bool
) -> list[float]:
    """Return numbers of a machine from memory, from disk, or measured now."""
    keys = [f"{describe_machine(device)} {name}" for name in names]
    if any(key not in _known for key in keys):
        store = Store(cache_folder())
        numbers = store.get(keys) if cache else {}
        if len(numbers) < len(keys):
            numbers = dict(zip(keys, measure(), strict=True))
            if cache:
                store.put(numbers)
        _known.update(numbers)
    return [_known[key] for key in keys]


def _fit(device: str, dtype: torch.dtype) -> tuple[float, float, float]:
    """Measure three layers, and return the rates at which the modelled times are the measured ones."""
    from scipy.optimize import nnls

    layers = _LAYERS.get(torch.device(device).type, _LAYERS["cuda"])
    setting = Setting(device=device, dtype=dtype)
    works = [Workload([operation], replace(flow, setting=setting)) for operation, flow in layers]
    timings = take_turns([work.run for work in works], device=device, rounds=3)
    times = np.array([timing.divided(work.steps).seconds for timing, work in zip(timings, works, strict=True)])
    counts = [next(iter(count_chain([operation], flow))) for operation, flow in layers]
    # The backward counts as two forwards. Each equation is divided by its time, so that all three have the same weight.
    rows = 3 * np.array([[count.flops, 4 * count.values, 1] for count in counts]) / times[:, None]
    scales = rows.max(axis=0)
    per_flop, per_byte, per_call = nnls(rows / scales, np.ones(len(times)))[0] / scales
    # Where a term explains next to nothing, as when launches hide all else, it is at most the whole time of its layer.
    most_flop, most_byte = times[0] / (3 * counts[0].flops), times[1] / (3 * 4 * counts[1].values)
    per_flop = per_flop if per_flop > most_flop / 10 else most_flop
    per_byte = per_byte if per_byte > most_byte / 10 else most_byte
    return float(1 / per_flop), float(1 / per_byte), float(per_call)


@torch.no_grad()
def _stream(device: str) -> float:
    values = _STREAM.get(torch.device(device).type, _STREAM["cuda"])
    first, second = (torch.ones(values, device=device) for _ in range(2))
    (timing,) = take_turns([lambda: torch.add(first, second, out=first)], device=device, rounds=3)
    return 3 * values * first.itemsize / timing.seconds
