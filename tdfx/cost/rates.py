"""How fast a machine computes and moves data: a few numbers, each measured once and kept on disk."""

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
"""Values in each tensor: more than the caches hold, and little beside what training takes."""
_LEAST = 1e-18
"""Seconds that an operation or a byte takes at least, where the measurement leaves nothing for it."""


@dataclass(frozen=True, slots=True)
class Rates:
    """By which ``Modelled`` counts: what the training steps of layers take, told apart."""

    flops_per_second: float
    """Floating-point operations per second."""
    bytes_per_second: float
    """Bytes per second read and written, values counted as 4 bytes."""
    seconds_per_call: float
    """What an operation takes before it computes anything, in seconds."""


def _pointwise(channels: int) -> Operation:
    return Operation.pointwise(channels, channels, 2)


def _three(channels: int) -> Operation:
    return replace(_pointwise(channels), kernel=(3, 3), padding=(1, 1))


_LAYERS: dict[str, tuple[tuple[Operation, Flow], ...]] = {
    "cpu": ((_three(256), Flow(8, (16, 16))), (_pointwise(16), Flow(32, (32, 32))), (_pointwise(8), Flow(1, (2, 2)))),
    "cuda": ((_three(256), Flow(64, (32, 32))), (_pointwise(64), Flow(64, (64, 64))), (_pointwise(8), Flow(1, (2, 2)))),
}
"""One layer that arithmetic decides, one that memory does, and one that takes next to nothing but its start."""


def rates(device: str = "cpu", dtype: torch.dtype = torch.float32, *, cache: bool = True) -> Rates:
    """Return by what numbers the training steps of layers are counted, from those of three small ones.

    Args:
        device: As torch writes it.
        dtype: In which they compute.
        cache: Whether what was measured by an earlier process is read from disk, and what is measured now written.
    """
    names = [one.name for one in fields(Rates)]
    return Rates(*_once(device, [f"rates {dtype} {one}" for one in names], lambda: _solved(device, dtype), cache))


def stream_rate(device: str = "cpu", *, cache: bool = True) -> float:
    """Return how many bytes per second are read and written in a sum of tensors larger than the caches.

    Args:
        device: As torch writes it.
        cache: As for ``rates``.
    """
    (found,) = _once(device, ["stream"], lambda: [_stream(device)], cache)
    return found


_known: dict[str, float] = {}
"""What this process has measured or read, by key."""


def _once(device: str, names: Sequence[str], measure: Callable[[], Sequence[float]], cache: bool) -> list[float]:
    """Return numbers of a machine that are known, or measured now."""
    keys = [f"{describe_machine(device)} {one}" for one in names]
    if any(key not in _known for key in keys):
        store = Store(cache_folder())
        found = store.get(keys) if cache else {}
        if len(found) < len(keys):
            found = dict(zip(keys, measure(), strict=True))
            if cache:
                store.put(found)
        _known.update(found)
    return [_known[key] for key in keys]


def _solved(device: str, dtype: torch.dtype) -> tuple[float, float, float]:
    """Return the numbers at which the model's times of three layers are the measured ones."""
    from scipy.optimize import nnls

    layers = _LAYERS.get(torch.device(device).type, _LAYERS["cuda"])
    setting = Setting(device=device, dtype=dtype)
    works = [Workload([operation], replace(flow, setting=setting)) for operation, flow in layers]
    timed = take_turns([one.run for one in works], device=device, rounds=3)
    times = np.array([one.divided(work.steps).seconds for one, work in zip(timed, works, strict=True)])
    counts = [next(iter(count_chain([operation], flow))) for operation, flow in layers]
    # Forward, and twice as much backward; each equation in units of its own time, so that all three weigh the same.
    rows = 3 * np.array([[one.flops, 4 * one.values, 1] for one in counts]) / times[:, None]
    scales = rows.max(axis=0)
    per_flop, per_byte, per_call = nnls(rows / scales, np.ones(len(times)))[0] / scales
    return float(1 / max(per_flop, _LEAST)), float(1 / max(per_byte, _LEAST)), float(per_call)


@torch.no_grad()
def _stream(device: str) -> float:
    values = _STREAM.get(torch.device(device).type, _STREAM["cuda"])
    long, other = (torch.ones(values, device=device) for _ in range(2))
    (timing,) = take_turns([lambda: torch.add(long, other, out=long)], device=device, rounds=3)
    return 3 * values * long.itemsize / timing.seconds
