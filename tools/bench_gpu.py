"""Run tdfx on a GPU and say what does not hold there: one command, eight minutes on an H200.

Each section runs in a process of its own with a deadline: ceilings of the device, correctness, times of single layers, whole
steps, the pass, memory, and accuracy. The JSON file is written after every row. A row is ``ok``, ``falsified`` (it ran, and
its bound does not hold), ``FAILED`` (an error, or its process died), or ``not run`` (the deadline came first). The exit code
is 1 if a row of the section correctness failed.

On a CPU, ``--small`` runs a few rows of each section in about a minute: that shows that the program runs, and its bounds for
speed do not count.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import options
import torch
from bench_common import make_table, write_results
from gpu.rows import Bench, Row, run_cases
from gpu.sections import SECTIONS
from rich.console import Console

_MARK = "row: "
"""How a line of a section's process begins that holds a row."""


def run_section(name: str, bench: Bench, seconds: float) -> Iterator[Row]:
    """Run a section in a process of its own, and yield a row for each of its cases."""
    worker = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--device", bench.device]
    process = subprocess.Popen(
        [*worker, *(["--small"] if bench.small else [])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    readers = [
        threading.Thread(target=_read_rows, args=(process, lines), daemon=True),
        threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True),
    ]
    for reader in readers:
        reader.start()
    expected: list[str] = []
    done: set[str] = set()
    ends = time.monotonic() + seconds
    timed_out = False
    while True:
        try:
            line = lines.get(timeout=max(0.0, ends - time.monotonic()))
        except queue.Empty:
            timed_out = True
            break
        if line is None:
            break
        value = json.loads(line)
        if isinstance(value, list):
            expected = value
        else:
            done.add(value["name"])
            yield Row(**value)
    process.kill()
    process.wait()
    for reader in readers:
        reader.join()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    missing = [case for case in expected if case not in done]
    if not timed_out and (missing or not expected):
        died, *missing = missing or ["(start)"]
        text = "".join(errors).strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        yield Row(section=name, name=died, status="FAILED", values={"error": text[0][:300]})
    for case in missing if expected else ["(start)"] if timed_out else []:
        yield Row(section=name, name=case, status="not run", bound=f"the deadline of {seconds:g} s")


def _read_rows(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    for line in process.stdout or ():
        if line.startswith(_MARK):
            lines.put(line.removeprefix(_MARK))
    lines.put(None)


def work(name: str, bench: Bench) -> None:
    """Print the names of a section's rows, and then the rows, each as soon as it is there."""
    cases = SECTIONS[name].rows(bench)
    print(_MARK + json.dumps(list(cases)), flush=True)
    for row in run_cases(name, cases, bench):
        print(_MARK + json.dumps(row.to_dict()), flush=True)


def _cells(row: Row) -> dict[str, str]:
    values = ", ".join(f"{name} {_short(value)}" for name, value in row.values.items())
    return {"section": row.section, "row": row.name, "": row.status, "values": values, "falsified if": row.bound}


def _short(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_short, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(part)}" for name, part in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@options.command(__doc__)
@options.device
@click.option("--small", is_flag=True, help="A few rows in small sizes; the only way on a CPU that takes a minute.")
@click.option(
    "--section", "chosen", multiple=True, type=click.Choice(list(SECTIONS)), help="Only these sections; all by default."
)
@click.option("--deadline", type=float, help="Seconds for each section, in place of its own.")
@click.option("--worker", type=click.Choice(list(SECTIONS)), hidden=True)
@options.json_file("Where the rows are written, after every row.")
def main(
    device: str,
    small: bool,
    chosen: tuple[str, ...],
    deadline: float | None,
    worker: str | None,
    json_file: Path | None,
) -> None:
    """Run the sections, or be the process of one."""
    bench = Bench(device=str(torch.device(device)), small=small)
    if worker is not None:
        work(worker, bench)
        return
    rows: list[Row] = []
    for name in chosen or SECTIONS:
        for row in run_section(name, bench, deadline or SECTIONS[name].seconds):
            rows.append(row)
            write_results(json_file, [each.to_dict() for each in rows], device=device, small=small)
    Console(width=200).print(make_table(map(_cells, rows)))
    if any(row.section == "correctness" and row.status in {"FAILED", "falsified"} for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
