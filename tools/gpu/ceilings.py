"""Section ceilings: what the device does at most, beside the numbers by which tdfx estimates times on it."""

from __future__ import annotations

import torch

from gpu.clock import host_seconds, interleaved
from gpu.rows import Bench, Cases, Outcome
from tdfx.cost.accelerators import ACCELERATORS
from tdfx.cost.modelled import Modelled

_BOUND = "off by more than 1.5x from what tdfx assumes"


def _compare(name: str, measured: float, assumed: float | None, bench: Bench) -> Outcome:
    """Return a rate beside the assumed one; only the numbers of a GPU in full size can be falsified."""
    if assumed is None:
        return Outcome({name: measured})
    ratio = measured / assumed
    holds = bench.small or 1 / 1.5 <= ratio <= 1.5
    return Outcome({name: measured, "assumed": assumed, "ratio": ratio}, holds, _BOUND)


def _assumed(bench: Bench) -> tuple[float, float, float]:
    device = ACCELERATORS.get(torch.device(bench.device).type)
    if device is None:
        cpu = Modelled()
        return cpu.bytes_per_second, cpu.flops_per_second, cpu.seconds_per_call
    return device.bytes, device.flops[2], device.launch


def copy_bandwidth(bench: Bench) -> Outcome:
    """Copy a tensor that is longer than the caches."""
    source = torch.ones(2**22 if bench.small else 2**30, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    (seconds,) = interleaved([lambda: target.copy_(source)], bench)
    return _compare("bytes a second", 2 * source.numel() / seconds, _assumed(bench)[0], bench)


def products(bench: Bench) -> Outcome:
    """Multiply two large matrices in bfloat16."""
    side = 256 if bench.small else 8192
    x = torch.randn(side, side, device=bench.device).to(torch.bfloat16)
    (seconds,) = interleaved([lambda: x @ x], bench)
    return _compare("operations a second", 2 * side**3 / seconds, _assumed(bench)[1], bench)


def launches(bench: Bench) -> Outcome:
    """Enqueue an operation on one value."""
    x = torch.ones(1, device=bench.device)
    return _compare("seconds a launch", host_seconds(lambda: x.add_(1), bench, 500), _assumed(bench)[2], bench)


CASES: Cases = {"copy": copy_bandwidth, "bf16 products": products, "launch": launches}
