"""How long a thread waits for a processor while other processes use it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

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


def _read(descriptor: int) -> float:
    try:
        return 1e-9 * int(os.pread(descriptor, 100, 0).split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
