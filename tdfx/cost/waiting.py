"""How long a thread waits for a processor while other processes use it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

_LEAST_WORK = 1 / 3
"""Share of the time on the wall that counts as work in any case."""
_SCHEDULER = Path("/proc/thread-self/schedstat")
"""Linux: nanoseconds on a processor, nanoseconds of waiting for one, and a count."""


@contextmanager
def waiting_time() -> Iterator[Callable[[], float]]:
    """Yield a function that returns for how long the calling thread has waited for a processor so far, in seconds.

    Where the system does not say, it always returns 0. Time for which the thread waits for anything else, such as other
    threads of the same computation, does not count.
    """
    try:
        descriptor = os.open(_SCHEDULER, os.O_RDONLY)
    except OSError:
        yield lambda: 0.0
        return
    try:
        yield partial(_read, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def working_time() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds since, without those in which the thread waited for a processor.

    A limit in these seconds is the same on a busy machine, on which as much has to be measured; but at least a third of the
    time by the clock on the wall counts, so that three times the limit is never exceeded.
    """
    with waiting_time() as waited:
        began, waited_before = time.perf_counter(), waited()

        def worked() -> float:
            lost = waited() - waited_before
            took = time.perf_counter() - began
            return max(took - lost, _LEAST_WORK * took)

        yield worked


def _read(descriptor: int) -> float:
    try:
        return 1e-9 * int(os.pread(descriptor, 100, 0).split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
