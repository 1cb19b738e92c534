"""The time of a run by phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from bench_common import Clock

PHASES = ("data", "step", "watching", "planning", "rewriting", "merging", "evaluation", "saving")
NOT_COUNTED = ("evaluation", "saving")
"""The phases that do not count as training: the scoring of held-out data, and saving."""


def training_seconds(seconds: Mapping[str, float]) -> float:
    """Return the seconds of training among seconds by phase.

    >>> training_seconds({"step": 2.0, "evaluation": 1.0})
    2.0
    """
    return sum(value for name, value in seconds.items() if name not in NOT_COUNTED)


class Phases:
    """Seconds by phase. Work that a device has yet to do when a phase ends counts to ``"step"``, which requested it."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self.clock = clock
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the time of the block to a phase."""
        if name not in {"data", "step"}:
            self.settle()
        begin = self.clock()
        yield
        if name not in {"data", "step"}:
            self._synchronize()
        self.seconds[name] += self.clock() - begin

    def settle(self) -> None:
        """Wait for the device, and count that time to the steps."""
        begin = self.clock()
        self._synchronize()
        self.seconds["step"] += self.clock() - begin

    def add(self, name: str, seconds: float) -> None:
        """Count seconds to a phase that were measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @property
    def training(self) -> float:
        """Seconds of training."""
        return training_seconds(self.seconds)

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device.type).synchronize(self.device)
