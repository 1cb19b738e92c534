"""Time functions in turns, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tdfx.devices import current, synchronize

_SHORTEST = 1e-3
"""A sample repeats its function until it takes about this long, in seconds, so that the clock and the wait for the device
hardly count."""
_LONG = 0.02
"""A call that takes longer than this, in seconds, need not be repeated, even if it was the first."""
_OUTLIER = 1.25
"""A sample this many times longer than the shortest was disturbed: nothing makes a run faster than it is."""
_AGREES = 1.05
"""Two samples of which neither is more than this many times the other need no third."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one function took."""

    samples: tuple[float, ...]
    """Seconds of each sample, in the order in which they were taken."""

    def divided(self, parts: int) -> Timing:
        """Return the times of one of several equal parts."""
        return Timing(tuple(sample / parts for sample in self.samples))

    @property
    def trusted(self) -> tuple[float, ...]:
        """The samples that are not outliers."""
        most = _OUTLIER * min(self.samples)
        return tuple(sample for sample in self.samples if sample <= most)

    def is_settled(self, rounds: int) -> bool:
        """Return True if there are as many trusted samples as were asked for, or the two shortest agree closely.

        >>> Timing((1.0, 1.02)).is_settled(3), Timing((1.0, 1.2)).is_settled(3), Timing((1.0,)).is_settled(1)
        (True, False, True)
        """
        shortest, *others = sorted(self.samples)
        return len(self.trusted) >= rounds or bool(others and others[0] <= _AGREES * shortest)

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
    agree: Callable[[float], float] = float,
) -> list[Timing]:
    """Time some functions in turns (A B C A B C ...), each sample between two waits for the device.

    A function takes part until it has ``rounds`` trusted samples, or two that agree closely, but in no more than twice as
    many rounds.

    Args:
        runs: The functions to time; each must do the same work at every call.
        device: The device that they work on.
        rounds: Trusted samples to take of each, at least 1; two are enough where they agree closely.
        most_seconds: About how long all of it may take; a round that would exceed it is not begun, apart from the first.
        warmups: Calls of each before the first sample, at least 1; a short function is called once more.
        agree: Maps a number of this process to that of all processes that take the same turns together, so that they call
            the functions equally often: functions that communicate would wait for one another otherwise.
    """
    with current(device):
        return _take_turns(runs, partial(synchronize, device), rounds, most_seconds, warmups, clock, agree)


def _take_turns(
    runs: Sequence[Callable[[], object]],
    wait: Callable[[], None],
    rounds: int,
    most_seconds: float,
    warmups: int,
    clock: Callable[[], float],
    agree: Callable[[float], float],
) -> list[Timing]:
    began = clock()

    def sample(run: Callable[[], object], repeat: int) -> float:
        wait()
        start = clock()
        for _ in range(repeat):
            run()
        wait()
        return agree((clock() - start) / repeat)

    repeats = []
    for run in runs:
        for call in range(max(1, warmups) + 1):
            took = sample(run, 1)
            # The first call is cold, and does not show how often a short function should be repeated.
            if call + 1 >= warmups and took > _LONG:
                break
        repeats.append(max(1, math.ceil(_SHORTEST / max(took, 1e-9))) if took < _SHORTEST else 1)
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(2 * rounds):
        round_began = clock()
        for index, (run, times) in enumerate(zip(runs, samples, strict=True)):
            if Timing(tuple(times)).is_settled(rounds):
                continue
            seconds = sample(run, repeats[index])
            if 2 * seconds * repeats[index] < _SHORTEST:
                # The first call was slow for another reason: a library was loaded, or a kernel was chosen.
                repeats[index] = math.ceil(_SHORTEST / max(seconds, 1e-9))
                seconds = sample(run, repeats[index])
            times.append(seconds)
        now = clock()
        is_late = agree(now - began + (now - round_began)) > most_seconds
        if is_late or all(Timing(tuple(times)).is_settled(rounds) for times in samples):
            break
    return [Timing(tuple(times)) for times in samples]


def time_once(run: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Return the seconds of one call, between two waits for the device; a first call may be cold."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start
