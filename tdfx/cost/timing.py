"""Time functions in turns, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from tdfx.cost.waiting import waiting_time
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
_LEAST_WORK = 0.01
"""Share of a sample's time that counts as work in any case, as the two clocks differ a little."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one function took."""

    samples: tuple[float, ...]
    """Seconds of each sample, in the order in which they were taken; time without a processor does not count."""
    load: float = 1.0
    """How many times longer all samples took by the clock on the wall: 2 if other processes had the processor for half of
    that time."""

    def divided(self, parts: int) -> Timing:
        """Return the times of one of several equal parts."""
        return replace(self, samples=tuple(sample / parts for sample in self.samples))

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
    clock: Callable[[], float] | None = None,
    agree: Callable[[float], float] = float,
    every_round: bool = False,
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
        clock: Returns the time in seconds. Left out, it is the clock on the wall, and on a CPU the time for which other
            processes had the processor is taken off each sample, where the system says how long that was.
        agree: Maps a number of this process to that of all processes that take the same turns together, so that they call
            the functions equally often: functions that communicate would wait for one another otherwise.
        every_round: Whether all functions take part in all rounds, so that their samples can be compared round by round.
    """
    with current(device), _waited(device, clock) as waited:
        sample = partial(_sample, partial(synchronize, device), clock or time.perf_counter, waited, agree)
        return _take_turns(runs, sample, rounds, most_seconds, warmups, clock or time.perf_counter, agree, every_round)


@contextmanager
def _waited(device: torch.device | str, clock: Callable[[], float] | None) -> Iterator[Callable[[], float]]:
    """Yield a function that returns for how long this thread has waited for a processor; 0 where that does not matter."""
    if clock is None and torch.device(device).type == "cpu":
        with waiting_time() as waited:
            yield waited
    else:
        yield lambda: 0.0


def _sample(
    wait: Callable[[], None],
    clock: Callable[[], float],
    waited: Callable[[], float],
    agree: Callable[[float], float],
    run: Callable[[], object],
    repeat: int,
) -> tuple[float, float]:
    """Return the seconds that one call works, and those for which it waits for a processor.

    The waiting time is read within the time on the clock: if another process gets the processor between two readings, the
    wait counts as work. Else it would be taken off without having been counted, and the shortest sample is what counts.
    """
    wait()
    start, waited_before = clock(), waited()
    for _ in range(repeat):
        run()
    wait()
    lost = waited() - waited_before
    took = clock() - start
    lost = min(lost, (1 - _LEAST_WORK) * took)
    return agree((took - lost) / repeat), lost / repeat


def _take_turns(
    runs: Sequence[Callable[[], object]],
    sample: Callable[[Callable[[], object], int], tuple[float, float]],
    rounds: int,
    most_seconds: float,
    warmups: int,
    clock: Callable[[], float],
    agree: Callable[[float], float],
    every_round: bool,
) -> list[Timing]:
    began = clock()
    repeats = []
    for run in runs:
        for call in range(max(1, warmups) + 1):
            took, _ = sample(run, 1)
            # The first call is cold, and does not show how often a short function should be repeated.
            if call + 1 >= warmups and took > _LONG:
                break
        repeats.append(max(1, math.ceil(_SHORTEST / max(took, 1e-9))) if took < _SHORTEST else 1)
    samples: list[list[float]] = [[] for _ in runs]
    losses = [0.0 for _ in runs]
    for _ in range(2 * rounds):
        round_began = clock()
        for index, (run, times) in enumerate(zip(runs, samples, strict=True)):
            if times and not every_round and Timing(tuple(times)).is_settled(rounds):
                continue
            took, lost = sample(run, repeats[index])
            if 2 * took * repeats[index] < _SHORTEST:
                # The first call was slow for another reason: a library was loaded, or a kernel was chosen.
                repeats[index] = math.ceil(_SHORTEST / max(took, 1e-9))
                took, lost = sample(run, repeats[index])
            times.append(took)
            losses[index] += lost
        now = clock()
        is_late = agree(now - began + (now - round_began)) > most_seconds
        if is_late or all(Timing(tuple(times)).is_settled(rounds) for times in samples):
            break
    pairs = zip(samples, losses, strict=True)
    return [Timing(tuple(times), 1 + lost / max(sum(times), 1e-12)) for times, lost in pairs]
