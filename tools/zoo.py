"""Check tdfx's promises on every model of torchvision, or on your own models.

Without REFERENCES all models of torchvision.models.list_models() are examined, untrained. A REFERENCE is torchvision:NAME,
package.module:factory or path/to/file.py:factory. A factory takes no arguments and returns a module; it sets
model.example_inputs to what the model is called with (a tensor, a tuple, or a mapping), or --input gives the same inputs to
all models.

\b
accounted   every parameter that data are multiplied by, as seen at torch's dispatcher, belongs to a site of the plan
full train  at full rank the model returns what the original returns, in train mode, BatchNorm buffers included
full eval   the same in eval mode
gradients   of the inputs and of everything that was not factorized agree
control     a quarter of the ranks changes the output by far more than the tolerance
merge       class, state_dict and loading are the original's; merged and factorized models agree
untouched   the model passed in is bit-identical to what it was

Figures are shares of the tolerance, so at most 1 (for the control: at least 100); the tolerance is how far the original
changes if its weights are changed by their rounding, as tools/zoo_compare.py explains. Models whose estimated memory is too
large for float64 are examined in float32, and the table says so. All of torchvision takes one to two hours on one core; most
models take 1 to 60 seconds, those with wide linear layers (AlexNet, VGG) and the largest transformers some minutes. The exit
code is 1 if any model fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import click
import options
from bench_common import make_table, show_progress, write_json
from rich.console import Console
from torch import Tensor
from torchvision import models
from zoo_checks import examine
from zoo_inputs import parse_input
from zoo_verdict import CHECKS, Verdict, ZooCheck


@options.command(__doc__)
@click.argument("references", nargs=-1)
@click.option("--models", "globs", multiple=True, metavar="GLOB", help="Only torchvision's models whose name matches.")
@click.option(
    "--input", "shapes", multiple=True, metavar="SHAPE", help="Inputs of your models, as 2,3,64,64 or int64:2,16."
)
@click.option("--memory", type=float, default=12.0, help="Most GiB for one model, by estimate.")
@options.json_file("Write all figures to a file, after each model.")
@click.option("--worker", is_flag=True, hidden=True)
def main(
    references: tuple[str, ...],
    globs: tuple[str, ...],
    shapes: tuple[str, ...],
    memory: float,
    json_file: Path | None,
    worker: bool,
) -> None:
    """Examine, collect, print."""
    if worker:
        _work(references, tuple(parse_input(shape) for shape in shapes), memory)
        return
    chosen = _chosen(references, globs)
    worker_options = [f"--memory={memory}", *(f"--input={shape}" for shape in shapes)]
    verdicts: list[Verdict] = []
    for _, verdict in zip(show_progress(chosen), verdicts_of(chosen, worker_options), strict=True):
        verdicts.append(verdict)
        write_json(json_file, [verdict.to_dict() for verdict in verdicts])
    Console(width=200).print(make_table(map(_cells, verdicts), justify="right"))
    for verdict in verdicts:
        for line in complaints(verdict):
            click.echo(line)
    passed = sum(verdict.ok for verdict in verdicts)
    minutes = sum(verdict.seconds for verdict in verdicts) / 60
    click.echo(f"{passed} of {len(verdicts)} models pass, in {minutes:.1f} minutes")
    if passed < len(verdicts):
        sys.exit(1)


def _chosen(references: Sequence[str], globs: Sequence[str]) -> list[str]:
    wanted = globs or (() if references else ("*",))
    names = [name for name in models.list_models() if any(fnmatchcase(name, glob) for glob in wanted)]
    if globs and not names:
        count = len(models.list_models())
        raise click.UsageError(f"--models {' '.join(globs)} matches none of torchvision's {count} models.")
    return [*references, *(f"torchvision:{name}" for name in names)]


def verdicts_of(references: Sequence[str], worker_options: Sequence[str] = ()) -> Iterator[Verdict]:
    """Examine models one by one in a separate process; if it dies, a new process continues with the next model."""
    waiting = list(references)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    while waiting:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", *worker_options, "--", *waiting]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                waiting.pop(0)
                yield Verdict.from_dict(json.loads(line))
        if waiting:
            error = f"its process ended with code {worker.returncode}: most likely it ran out of memory"
            yield Verdict(waiting.pop(0), error=error)


def _work(references: Sequence[str], given: tuple[Tensor, ...], memory: float) -> None:
    """Examine models and print a line of JSON for each; all other output goes to stderr."""
    for reference in references:
        with contextlib.redirect_stdout(sys.stderr):
            verdict = examine(reference, given, memory)
        print(json.dumps(verdict.to_dict()), flush=True)


def _cells(verdict: Verdict) -> dict[str, str]:
    facts = {name: str(verdict.facts.get(name, "")) for name in ("sites", "factorized", "emit")}
    checks = {name.replace("_", " "): _cell(name, verdict.checks.get(name)) for name in CHECKS}
    dtype, planning = (str(verdict.facts.get(name, "")) for name in ("dtype", "planning_s"))
    last = {"dtype": dtype, "plan s": planning, "s": f"{verdict.seconds:.1f}", "": "ok" if verdict.ok else "FAILED"}
    return {"model": _name(verdict), **facts, **checks, **last}


def _name(verdict: Verdict) -> str:
    """Return a model's name without its source or folder.

    >>> _name(Verdict("torchvision:vgg11")), _name(Verdict("some/folder/nets.py:small"))
    ('vgg11', 'nets.py:small')
    """
    return verdict.model.removeprefix("torchvision:").rpartition("/")[2]


def _cell(name: str, check: ZooCheck | None) -> str:
    """Return a check's figure, marked if the check failed.

    >>> _cell("merge", ZooCheck(True, {"share": 0.0123})), _cell("merge", ZooCheck(False)), _cell("accounted", None)
    ('0.012', 'FAILED', '')
    """
    if check is None:
        return ""
    if check.ok is None:
        return "not run"
    figures = check.figures
    if name == "accounted" and figures:
        figure = f"{int(figures['parameters']) - int(figures['missed'])}/{figures['parameters']}"
    elif "share" in figures:
        figure = f"{float(figures['share']):.2g}"
    else:
        figure = "yes" if check.ok else ""
    return figure if check.ok else f"{figure} FAILED".strip()


def complaints(verdict: Verdict) -> Iterator[str]:
    """Yield a line for every check that failed or was not run, and for every note of the plan."""
    name = _name(verdict)
    if verdict.error:
        yield f"{name}: {verdict.error}"
    for key, check in verdict.checks.items():
        if check.detail:
            yield f"{name}: {key}: {check.detail[:300]}{' ...' if len(check.detail) > 300 else ''}"
    for note in verdict.facts.get("notes", ()):
        yield f"{name}: note: {note}"


if __name__ == "__main__":
    main()
