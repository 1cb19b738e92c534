"""Timing things in turns, so that what disturbs a machine disturbs all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_SHORTEST = 1e-3
"""A sample repeats what is timed until it takes about this long, in seconds: the clock and the wait for a device count
for little then."""
_LONG = 0.02
"""A call that takes longer than this, in seconds, need not be repeated, cold or not."""
_OUTLIER = 1.25
"""A sample this many times longer than the shortest was disturbed by something else: nothing makes a run too fast."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one thing took."""

    samples: tuple[float, ...]
    """Seconds of each sample, in the order in which they were taken."""

    def divided(self, parts: int) -> Timing:
        """Return the times of one of several equal parts."""
        return Timing(tuple(one / parts for one in self.samples))

    @property
    def trusted(self) -> tuple[float, ...]:
        """The samples that are not outliers."""
        most = _OUTLIER * min(self.samples)
        return tuple(one for one in self.samples if one <= most)

    @property
    def seconds(self) -> float:
        """The median of the trusted samples.

        >>> Timing((1.0, 1.1, 9.0, 1.05)).seconds
        1.05
        """
        return statistics.median(self.trusted)


def take_turns(
    runs: Sequence[Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 3,
    most_seconds: float = math.inf,
    warmups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time some functions in turns (A B C A B C ...), each sample between two waits for the device.

    Rounds go on until every function has ``rounds`` samples that are no outliers, for at most twice as many, and a
    round that would go past ``most_seconds`` is not begun, apart from the first.

    Args:
        runs: What to time; each must do the same work at every call.
        device: Where they work.
        rounds: Trusted samples to take of each, at least 1.
        most_seconds: About how long all of it may take.
        warmups: Calls of each beforehand that do not count; at least one is made, and one more of what is short, to see how
            often to repeat it.
        clock: Returns the time in seconds.
    """
    wait = _wait(device)
    began = clock()
    repeats = []
    for run in runs:
        for call in range(max(1, warmups) + 1):
            wait()
            start = clock()
            run()
            wait()
            took = clock() - start
            # The first call is cold, and says little of how often a short one should be repeated.
            if call + 1 >= warmups and took > _LONG:
                break
        repeats.append(max(1, math.ceil(_SHORTEST / max(took, 1e-9))) if took < _SHORTEST else 1)
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(2 * rounds):
        round_began = clock()
        for run, repeat, own in zip(runs, repeats, samples, strict=True):
            wait()
            start = clock()
            for _ in range(repeat):
                run()
            wait()
            own.append((clock() - start) / repeat)
        now = clock()
        if now - began + (now - round_began) > most_seconds:
            break
        if all(len(Timing(tuple(own)).trusted) >= rounds for own in samples):
            break
    return [Timing(tuple(own)) for own in samples]


def _wait(device: torch.device | str) -> Callable[[], None]:
    """Return what waits until a device has done all it was given."""
    kind = torch.device(device).type
    if kind == "cpu":
        return lambda: None
    module = torch.get_device_module(kind)
    return lambda: module.synchronize(device)
