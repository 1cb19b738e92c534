"""Measure how long a switch takes: planning and rewriting, with the times of all layers in the cache.

A network trains for a few steps on random data, with weights whose spectra are as after training, and is planned once, so
that the cache has its layer times. Then ``tdfx.Switch`` with the default policy switches a freshly trained copy,
--repeats times. The figures are the medians of ``Switch.spent``.

With --against PATH the same runs with the tdfx of another checkout, in turns (A B A B ...), and the last line is the
ratio of this version's seconds to the other's.

Networks: VGG-19 for 32×32 images, ResNet-18 at 64×64, and a small GPT of four blocks of 256 channels. Each takes about a
minute on one core, most of it for the first plan, and twice that with --against.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
import options
from bench_common import clock_name, make_table, write_results
from planning_worker import NETS
from rich.console import Console

import tdfx

PARTS = ("planning", "rewriting")
"""Keys of ``Switch.spent`` that make up the cost of a switch."""
Spent = dict[str, float]
"""Seconds of the parts of one switch, and the number of factorized sites."""


class SwitchWorker:
    """A process that measures switches with the tdfx of one checkout."""

    def __init__(self, checkout: Path, process: subprocess.Popen[str]) -> None:
        """Wait until the process has imported tdfx; ClickException if it imported another tdfx, or ended."""
        self.checkout, self.process = checkout, process
        imported = Path(self._read_line()).resolve().parents[1]
        if imported != checkout:
            raise click.ClickException(f"A process with {checkout} first on its path imported tdfx from {imported}.")

    def measure(self) -> Spent:
        """Measure one switch."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        spent: Spent = json.loads(self._read_line())
        return spent

    def _read_line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise click.ClickException(f"The process with the tdfx of {self.checkout} ended; its error is above.")
        return line


@contextmanager
def start_worker(checkout: Path, settings: Mapping[str, Any]) -> Iterator[SwitchWorker]:
    """Start a process with the tdfx of a checkout and an empty cache of layer times."""
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(Path(__file__).with_name("planning_worker.py")), json.dumps(settings)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": path, "TDFX_CACHE_DIR": cache}
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
            yield SwitchWorker(checkout, process)


def measure(checkouts: Mapping[str, Path], repeats: int, settings: Mapping[str, Any]) -> dict[str, list[Spent]]:
    """Measure switches with each checkout in turns, and return them by the names of the checkouts."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(start_worker(checkout, settings)) for name, checkout in checkouts.items()}
        rounds = [{name: worker.measure() for name, worker in workers.items()} for _ in range(repeats)]
    return {name: [spent[name] for spent in rounds] for name in checkouts}


def medians(switches: list[Spent]) -> Spent:
    """Return the median seconds of each part and of their sum.

    >>> medians([{"planning": 1.0, "rewriting": 2.0}, {"planning": 2.0, "rewriting": 4.0}])
    {'planning': 1.5, 'rewriting': 3.0, 'both': 4.5}
    """
    parts = {part: median(spent[part] for spent in switches) for part in PARTS}
    return {**parts, "both": median(sum(spent[part] for part in PARTS) for spent in switches)}


@options.command(__doc__)
@click.option("--net", type=click.Choice(list(NETS)), default="vgg19", help="tiny is for tests.")
@click.option("--batch", type=click.IntRange(min=1), default=16, help="Samples in a batch.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, help="Switches of each version.")
@click.option("--total-steps", type=click.IntRange(min=2), default=100_000, help="As for tdfx.Switch.")
@click.option(
    "--against",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    metavar="PATH",
    help="Another checkout of tdfx, to compare with.",
)
@options.threads(1)
@options.cpu_time
@options.json_file("Write the seconds of every switch to a file.")
def main(
    net: str,
    batch: int,
    repeats: int,
    total_steps: int,
    against: Path | None,
    threads: int,
    cpu_time: bool,
    json_file: Path | None,
) -> None:
    """Measure, print, write."""
    checkouts = {"this": Path(tdfx.__file__).resolve().parents[1]}
    if against is not None:
        checkouts["against"] = against
    settings = {"net": net, "batch": batch, "total_steps": total_steps, "cpu_time": cpu_time}
    switches = measure(checkouts, repeats, {**settings, "threads": 1 if cpu_time else threads})
    results = {name: medians(spent) for name, spent in switches.items()}
    rows = [
        {net: name, **{f"{part} s": f"{value:.3f}" for part, value in seconds.items()}}
        | {"sites": f"{switches[name][0]['factorized']:.0f}"}
        for name, seconds in results.items()
    ]
    ratios = {}
    if against is not None:
        this, other = results.values()
        ratios = {part: this[part] / other[part] for part in this if other[part] > 0}
        rows.append({net: "this / against", **{f"{part} s": f"{ratio:.2f}" for part, ratio in ratios.items()}})
    Console(width=100).print(make_table(rows))
    written = [{"version": name, **results[name], "switches": switches[name]} for name in switches]
    write_results(json_file, written, ratios=ratios, clock=clock_name(cpu_time), **settings)


if __name__ == "__main__":
    main()
