"""Where the time of a run goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "step", "watching", "planning", "rewriting", "merging", "evaluation", "saving")
TRAINING = PHASES[:-2]
"""What a run takes to train; scoring what is held out and saving are left out."""


class Phases:
    """Seconds by phase; what a device has yet to do when a phase ends counts to ``"step"``, which asked for it."""

    def __init__(self, clock: Callable[[], float], device: torch.device) -> None:
        self.clock = clock
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count what is done inside to a phase."""
        if name not in {"data", "step"}:
            self.settle()
        begin = self.clock()
        yield
        if name not in {"data", "step"}:
            self._wait()
        self.seconds[name] += self.clock() - begin

    def settle(self) -> None:
        """Wait for the device, and count that to the steps."""
        begin = self.clock()
        self._wait()
        self.seconds["step"] += self.clock() - begin

    def add(self, name: str, seconds: float) -> None:
        """Count seconds to a phase that were measured elsewhere."""
        self.seconds[name] += seconds

    @property
    def training(self) -> float:
        """Seconds of all but evaluation."""
        return sum(self.seconds[name] for name in TRAINING)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device.type).synchronize(self.device)
