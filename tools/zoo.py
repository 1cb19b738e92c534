"""Put every model of torchvision, or your own, through tdfx, and say where it does what it promises.

Without REFERENCES all models of torchvision.models.list_models() are examined, untrained; a REFERENCE is torchvision:NAME,
package.module:factory or path/to/file.py:factory. A factory takes no arguments and returns a module; it says what its module
is called with by leaving model.example_inputs on it (a tensor, a tuple, or a mapping), or --input says it for all of them.

\b
accounted   every parameter that data are multiplied by, as seen at torch's dispatcher, belongs to a site of the plan
full train  at full rank the model returns what the original returns, in train mode, BatchNorm buffers included
full eval   the same in eval mode
gradients   of the inputs and of everything that was not factorized agree
control     a quarter of the ranks moves the output by far more than the tolerance
merge       class, state_dict and loading are the original's; merged and factorized models agree
untouched   the model passed in is, bit by bit, what it was

Figures are shares of the tolerance, so at most 1 (for the control: at least 100); the tolerance is what the original moves
by if its weights are moved by their rounding, as tools/zoo_run.py explains. Models too large for float64 by an estimate
of the memory are examined in float32, and said to be. All of torchvision takes one to two hours on one core; most models
take 1 to 60 seconds, those with wide linear layers (AlexNet, VGG) and the largest transformers some minutes. Exit code 1
if any model fails.
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
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torchvision import models
from zoo_checks import CHECKS, Check, Verdict, examine
from zoo_inputs import parse_input

_FAILED = 1


@click.command(help=__doc__)
@click.argument("references", nargs=-1)
@click.option("--models", "globs", multiple=True, metavar="GLOB", help="Only torchvision's models whose name matches.")
@click.option(
    "--input", "shapes", multiple=True, metavar="SHAPE", help="Inputs of your models, as 2,3,64,64 or int64:2,16."
)
@click.option("--memory", type=float, default=12.0, show_default=True, help="GiB that one model may take, by estimate.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures, as they come."
)
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
        _work(references, tuple(parse_input(one) for one in shapes), memory)
        return
    chosen = _chosen(references, globs)
    options = [f"--memory={memory}", *(f"--input={one}" for one in shapes)]
    verdicts: list[Verdict] = []
    for verdict in _with_progress(chosen, options):
        verdicts.append(verdict)
        if json_file is not None:
            _write(json_file, verdicts)
    Console(width=200).print(_table(verdicts))
    for verdict in verdicts:
        for line in complaints(verdict):
            click.echo(line)
    passed = sum(one.ok for one in verdicts)
    click.echo(f"{passed} of {len(verdicts)} models pass, in {sum(one.seconds for one in verdicts) / 60:.1f} minutes")
    if passed < len(verdicts):
        sys.exit(_FAILED)


def _chosen(references: Sequence[str], globs: Sequence[str]) -> list[str]:
    wanted = globs or (() if references else ("*",))
    names = [name for name in models.list_models() if any(fnmatchcase(name, glob) for glob in wanted)]
    if globs and not names:
        raise click.UsageError(
            f"--models {' '.join(globs)} matches none of torchvision's {len(models.list_models())} models."
        )
    return [*references, *(f"torchvision:{name}" for name in names)]


def _with_progress(chosen: Sequence[str], options: Sequence[str]) -> Iterator[Verdict]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(chosen[0], total=len(chosen))
        for done, verdict in enumerate(verdicts_of(chosen, options), start=1):
            following = chosen[done] if done < len(chosen) else "done"
            bars.update(task, advance=1, description=following)
            yield verdict


def verdicts_of(references: Sequence[str], options: Sequence[str] = ()) -> Iterator[Verdict]:
    """Examine models one after the other in a process of their own; if it dies, another goes on with the next model."""
    waiting = list(references)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    while waiting:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", *options, "--", *waiting]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                waiting.pop(0)
                yield Verdict.from_dict(json.loads(line))
        if waiting:
            how = f"its process ended with code {worker.returncode}: most likely it ran out of memory"
            yield Verdict(waiting.pop(0), error=how)


def _work(references: Sequence[str], given: tuple[Tensor, ...], memory: float) -> None:
    """Examine models and print a line of JSON for each; whatever else would be printed goes to stderr."""
    for reference in references:
        with contextlib.redirect_stdout(sys.stderr):
            verdict = examine(reference, given, memory)
        print(json.dumps(verdict.to_dict()), flush=True)


def _write(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Write what there is so far; an interrupted run leaves whole files only."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps([one.to_dict() for one in verdicts], indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _table(verdicts: Sequence[Verdict]) -> Table:
    table = Table(box=None)
    table.add_column("model", no_wrap=True)
    for name in (
        "sites",
        "factorized",
        "emit",
        *(name.replace("_", " ") for name in CHECKS),
        "dtype",
        "plan s",
        "s",
        "",
    ):
        table.add_column(name, justify="right")
    for one in verdicts:
        facts = one.facts
        table.add_row(
            _name(one),
            *(str(facts.get(name, "")) for name in ("sites", "factorized", "emit")),
            *(_cell(name, one.checks.get(name)) for name in CHECKS),
            *(str(facts.get(name, "")) for name in ("dtype", "planning_s")),
            f"{one.seconds:.1f}",
            "ok" if one.ok else "FAILED",
        )
    return table


def _name(verdict: Verdict) -> str:
    """Return a model's name without its source or folder.

    >>> _name(Verdict("torchvision:vgg11")), _name(Verdict("some/folder/nets.py:small"))
    ('vgg11', 'nets.py:small')
    """
    return verdict.model.removeprefix("torchvision:").rpartition("/")[2]


def _cell(name: str, check: Check | None) -> str:
    """Return a check's figure, with a mark where it failed.

    >>> _cell("merge", Check(True, {"share": 0.0123})), _cell("merge", Check(False)), _cell("accounted", None)
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
    """Yield a line for everything that failed, was not run, or that the plan remarks."""
    name = _name(verdict)
    if verdict.error:
        yield f"{name}: {verdict.error}"
    for key, check in verdict.checks.items():
        if check.detail:
            yield f"{name}: {key}: {_short(check.detail)}"
    for note in verdict.facts.get("notes", ()):
        yield f"{name}: note: {note}"


def _short(text: str, length: int = 300) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."


if __name__ == "__main__":
    main()
