"""Estimate times on GPUs, whose arithmetic, memory traffic and launches overlap and depend on the dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tdfx.cost.count import Flow, count_chain
from tdfx.cost.modelled import Modelled
from tdfx.devices import has_tf32
from tdfx.factors.operation import Operation


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What a kind of device does in a second."""

    flops: Mapping[int, float]
    """Bytes of a value -> operations per second."""
    bytes: float
    """Bytes per second from and to its memory."""
    launch: float
    """Seconds between the starts of two operations, which a CPU has to launch."""

    def seconds(self, chain: Sequence[Operation], flow: Flow) -> float:
        """Return the time of one training step through a chain, of three products, or four where one is computed again.

        Each takes the largest of three times.
        """
        size = flow.setting.computes_in.itemsize
        rate = self.flops.get(size, min(self.flops.values()))
        counts = list(count_chain(chain, flow))
        times = [max(self.launch, count.flops / rate, size * count.values / self.bytes) for count in counts]
        return 3 * sum(times) + sum(seconds for seconds, count in zip(times, counts, strict=True) if count.again)


ACCELERATORS = {
    "cuda": Accelerator({1: 7e14, 2: 7e14, 4: 4e13, 8: 3e13}, bytes=4e12, launch=5e-6),
    "xpu": Accelerator({2: 2e14, 4: 2e13, 8: 1e13}, bytes=1.5e12, launch=1e-5),
    "mps": Accelerator({2: 1.2e13, 4: 1e13}, bytes=3e11, launch=1e-5),
}
"""Kind of device -> its numbers: estimates of the order of an H200, a Data Center GPU Max and an M3 Max; none was measured.
Only ratios between chains are used."""


class ModelledByDevice(Modelled):
    """``Modelled`` on CPUs, and the numbers of the kind of device on others."""

    __slots__ = ()

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        """Return the modelled time of one training step through a chain, in seconds."""
        device = ACCELERATORS.get(flow.setting.device_type) if flow is not None else None
        if device is None or flow is None:
            return Modelled.seconds(self, chain, flow)
        if flow.setting.computes_in is torch.float32 and has_tf32():
            device = Accelerator({4: device.flops[2] / 2}, device.bytes, device.launch)
        return device.seconds(chain, flow)
