"""What the benchmarks share: the clock, separate layer times, result files, and a progress bar."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

import tdfx
from tdfx.cost import measured
from tdfx.cost.timing import take_turns
from tdfx.devices import processor

ROOT = Path(__file__).resolve().parents[1]
_WRITTEN = ("--json", "--plot")
"""The options that name a result, whose folder does not matter."""
Clock = Callable[[], float]
"""Returns a time in seconds."""


def set_clock(cpu_time: bool, threads: int) -> Clock:
    """Set the number of threads, and set and return the clock that tdfx reads in this process from now on.

    With ``cpu_time`` it is the CPU time of this process, which on a loaded machine is close to the wall-clock time of an
    idle one. It adds up the time of all threads, so only one thread is used.
    """
    torch.set_num_threads(1 if cpu_time else threads)
    if not cpu_time:
        return time.perf_counter
    defaults = take_turns.__kwdefaults__
    assert defaults is not None
    defaults["clock"] = time.process_time
    return time.process_time


def clock_name(cpu_time: bool) -> str:
    """Return what result files call the clock."""
    return "CPU time" if cpu_time else "wall clock"


@contextmanager
def separate_times(times: dict[str, float] | None = None) -> Iterator[None]:
    """Let tdfx read only the layer times in ``times``, and add what it measures there; the cache on disk is not used."""
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, TDFX_CACHE_DIR=folder),
        patch.object(measured, "_known", {} if times is None else times),
    ):
        yield


def write_results(file: Path | None, results: Any, **settings: Any) -> None:
    """Write results as JSON with settings, and with the command and the versions that produced them; nothing for None."""
    write_json(file, {"command": command(sys.argv), "versions": versions(), **settings, "results": results})


def write_json(file: Path | None, value: Any) -> None:
    """Replace a file in one move, so that an interrupted program leaves no half-written file; do nothing for None."""
    if file is not None:
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)


def make_table(rows: Iterable[Mapping[str, str]], **settings: Any) -> Table:
    """Return rows of cells by their columns' heads as a table whose first column does not wrap; a row may lack cells."""
    listed = list(rows)
    first, *heads = dict.fromkeys(head for row in listed for head in row) or [""]
    table = Table(Column(first, no_wrap=True), *(Column(head, **settings) for head in heads), box=None)
    for row in listed:
        table.add_row(*(row.get(head, "") for head in (first, *heads)))
    return table


def command(arguments: list[str]) -> str:
    """Return a command that runs again at the root of a checkout.

    Files of the checkout are named from its root. Of other files that are there the whole path is kept, except of results.

    >>> command(["/some/where/tools/bench.py", "--json", "/tmp/no/out.json", "--set", "output.plot=/tmp/no/a.png"])
    'python tools/bench.py --json out.json --set output.plot=a.png'
    >>> command(["tools/train.py", str(ROOT / "tools" / "configs" / "text.toml")])
    'python tools/train.py tools/configs/text.toml'
    """
    program, *options = arguments
    pairs = itertools.pairwise(["", *options])
    return shlex.join(
        ["python", f"tools/{Path(program).name}", *(_from_root(option, before) for before, option in pairs)]
    )


def _from_root(option: str, before: str) -> str:
    """Return an option with the path in it, if there is one, as seen from the root; ``before`` is the word before it."""
    name, equals, text = option.rpartition("=")
    path = Path(text).absolute()
    if "/" not in text and not path.is_file():
        return option
    if path.is_relative_to(ROOT):
        return f"{name}{equals}{path.relative_to(ROOT)}"
    is_input = path.exists() and not {name, before} & set(_WRITTEN)
    return f"{name}{equals}{path if is_input else path.name}"


def versions() -> dict[str, str | int]:
    """Return the versions and the machine that the figures depend on."""
    return {
        "tdfx": tdfx.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return the mean, and with several values their standard deviation.

    >>> mean_and_deviation([1.0, 2.0], 1), mean_and_deviation([1.0], 1)
    ('1.5 ± 0.7', '1.0')
    """
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def show_progress(names: Sequence[str]) -> Iterator[str]:
    """Yield the names one by one, and show on stderr which one is being worked on and how many are done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=len(names))
        for name in names:
            bars.update(task, description=name)
            yield name
            bars.advance(task)
