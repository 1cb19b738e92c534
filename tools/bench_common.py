"""What the benchmarks share: the clock they read, times of their own, and how their figures are kept."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import tdfx
from tdfx.cost import machine, measured
from tdfx.cost.timing import take_turns

Seconds = Callable[[], float]
"""Returns the time in seconds, from wherever it counts."""


def set_clock(cpu_time: bool, threads: int) -> Seconds:
    """Set the threads and return the clock, which everything that tdfx measures in this process reads from now on.

    Args:
        cpu_time: Whether to count the time for which this process computes. On a loaded machine that is nearly what a
            quiet one needs; the clock on the wall also counts the others. One thread only, since those of all are added.
        threads: At least 1.
    """
    torch.set_num_threads(1 if cpu_time else threads)
    if not cpu_time:
        return time.perf_counter
    defaults = take_turns.__kwdefaults__
    assert defaults is not None
    defaults["clock"] = time.process_time
    return time.process_time


@contextmanager
def own_times(known: dict[str, float] | None = None) -> Iterator[None]:
    """Know no times but those in ``known``, to which what is measured is added; neither read nor write those on disk."""
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, TDFX_CACHE_DIR=folder),
        patch.object(measured, "_known", {} if known is None else known),
    ):
        yield


def keep(file: Path | None, results: Any, **settings: Any) -> None:
    """Write results beside the command and the versions that made them; whole files only, if it is interrupted.

    Args:
        file: Where to; None to write nothing.
        results: What JSON can hold.
        settings: Seeds and whatever else is to be known.
    """
    if file is None:
        return
    record = {"command": command(sys.argv), "versions": versions(), **settings, "results": results}
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def command(arguments: list[str]) -> str:
    """Return a command as one types it, with no more than the names of files.

    >>> command(["/some/where/tools/bench.py", "--json", "/tmp/out.json", "--threads", "2"])
    'python tools/bench.py --json out.json --threads 2'
    """
    program, *rest = arguments
    return shlex.join(
        ["python", f"tools/{Path(program).name}", *(Path(one).name if "/" in one else one for one in rest)]
    )


def versions() -> dict[str, str | int]:
    """Return what the figures depend on beside the settings."""
    return {
        "tdfx": tdfx.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": machine.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
