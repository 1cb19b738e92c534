"""The command line: ``tdfx inspect``, ``tdfx demo``, ``tdfx verify``, ``tdfx cache``.

Exit codes: 0 for success (and for two graphs that match), 1 for a proof that failed, 2 for anything that stopped the
command, with one message and no traceback unless ``--debug`` is given.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import tdfx
from tdfx.cost.store import Store, cache_folder
from tdfx.demo import DEFAULT_EPOCHS, run_demo
from tdfx.demo_table import demo_view
from tdfx.errors import InputError, ModelReferenceError, TdfxError
from tdfx.plan_table import plan_view, render_plain
from tdfx.ranks.registry import parse_rule
from tdfx.references import build_model
from tdfx.sides import build_sides, read_inputs

FAILED = 1
STOPPED = 2
_RULES = (
    "vbmf[:floor], energy[:share], stable, threshold:above, ratio[:of], params:share, flops:share or speedup:times, and "
    "after it any of "
    ",at_least=N ,at_most=N ,round_to=N."
)


class _Commands(click.Group):
    """Turns the errors that tdfx raises on purpose into one message."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TdfxError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(STOPPED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tdfx.__version__, prog_name="tdfx")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Train PyTorch models faster by factorizing their layers mid-training."""


@main.command()
@click.argument("model")
@click.option(
    "--input", "inputs", multiple=True, metavar="SHAPE", help="Shape of an input, such as 8,3,224,224 or int64:2,16."
)
@click.option("--policy", "rule", default="vbmf", show_default=True, metavar="RULE", help=_RULES)
@click.option("--include", multiple=True, metavar="GLOB", help="Rewrite only these sites.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Keep these sites.")
@click.option(
    "--modelled", is_flag=True, help="Estimate times by arithmetic, in place of measuring them on this machine."
)
@click.option(
    "--min-gain", type=float, default=tdfx.Policy().min_gain, show_default=True, help="Least speed-up of a site."
)
@click.option(
    "--weights", type=click.Path(dir_okay=False, path_type=Path), help="A state_dict to load; no code in it is run."
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the plan to a file.")
def inspect(
    model: str,
    inputs: tuple[str, ...],
    rule: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    modelled: bool,
    min_gain: float,
    weights: Path | None,
    json_file: Path | None,
) -> None:
    """Show which layers of MODEL would be rewritten, and why not where not.

    MODEL is torchvision:NAME, package.module:factory or path/to/file.py:factory. Without --weights the model is untrained,
    and a rule that reads its weights (vbmf, energy, stable, threshold) finds no signal in them; ratio:0.25 shows what a
    quarter of the ranks would bring. With --input, layers are timed on this machine; what was timed once is kept.
    """
    _check_writable(json_file)
    cost = tdfx.Modelled() if modelled else tdfx.Measured()
    policy = tdfx.Policy(
        rank=parse_rule(rule), include=include or ("*",), exclude=exclude, min_gain=min_gain, cost=cost
    )
    examples = tuple(_parse_input(one) for one in inputs) or None
    built = build_model(model)
    if weights is not None:
        _load_weights(built, weights)
    plan = tdfx.plan(built, policy, example_inputs=examples)
    _show(plan_view(plan))
    _write(json_file, plan.to_json())


@main.command()
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights and data order, for both runs.")
@click.option("--epochs", type=int, default=DEFAULT_EPOCHS, show_default=True, help="Epochs of each run.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to a file."
)
def demo(seed: int, epochs: int, json_file: Path | None) -> None:
    """Train a network on real digits as it is and with tdfx, merge it back, and prove it."""
    _check_writable(json_file)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("epoch {task.completed}/{task.total}")
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        tasks = {name: bars.add_task(label, total=epochs, start=False) for name, label in _RUNS.items()}

        def tick(name: str, done: int, total: int) -> None:
            if done == 0:
                bars.start_task(tasks[name])
            bars.update(tasks[name], completed=done, total=total)

        result = run_demo(seed=seed, epochs=epochs, tick=tick)
    _show(demo_view(result))
    _write(json_file, json.dumps(result.to_dict(), indent=2))
    if not result.verified:
        sys.exit(FAILED)


_RUNS = {"full": "full training", "tdfx": "with tdfx    "}


@main.command()
@click.argument("model")
@click.argument("reference")
@click.option("--input", "inputs", multiple=True, metavar="SHAPE", help="Shape of a random input, such as 8,3,224,224.")
@click.option(
    "--inputs", "inputs_file", type=click.Path(dir_okay=False, path_type=Path), help="Inputs to run, an .npz file."
)
@click.option(
    "--weights",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A state_dict for the models; give it twice for one each. No code in it is run.",
)
@click.option(
    "--tolerance", type=float, help="Largest relative error to accept; derived from dtype and depth if left out."
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the report to a file."
)
def verify(
    model: str,
    reference: str,
    inputs: tuple[str, ...],
    inputs_file: Path | None,
    weights: tuple[Path, ...],
    tolerance: float | None,
    json_file: Path | None,
) -> None:
    """Compare MODEL and REFERENCE: the same structure, the same interface, the same numbers?

    Each is an ONNX file, or a model as inspect takes it: torchvision:NAME, package.module:factory or
    path/to/file.py:factory. Models need --input or --inputs; without --weights they are built with one seed. Exits with 0
    if all three answers are yes, 1 if one is not, 2 if it cannot tell.
    """
    _check_writable(json_file)
    if inputs and inputs_file is not None:
        raise InputError("--input and --inputs both say what to run the models on. Give one of them.")
    torch.manual_seed(0)
    examples = read_inputs(inputs_file) if inputs_file is not None else tuple(map(_parse_input, inputs)) or None
    sides = build_sides((model, reference), weights, _load_weights)
    report = tdfx.verify(*sides, examples, tolerance=tolerance)
    click.echo(str(report))
    _write(json_file, json.dumps(report.to_dict(), indent=2))
    if not report.ok:
        sys.exit(FAILED)


@main.command()
@click.option("--clear", is_flag=True, help="Forget all of them.")
def cache(clear: bool) -> None:
    """Say where times that were measured on this machine are kept, and how many."""
    store = Store(cache_folder())
    try:
        click.echo(f"{store.clear()} times forgotten" if clear else f"{store.file}: {len(store)} times")
    except (OSError, sqlite3.Error) as error:
        raise TdfxError(
            f"The cache {str(store.file)!r} cannot be {'deleted' if clear else 'read'}: {error}. "
            + ("Delete the file yourself." if clear else "Forget it with tdfx cache --clear.")
        ) from error


def _show(view: Group) -> None:
    """Print a view, in colour and as wide as the terminal where there is one."""
    if sys.stdout.isatty():
        Console().print(view)
    else:
        click.echo(render_plain(view))


_INPUT_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def _parse_input(text: str) -> Tensor:
    """Return a tensor for a shape: random where the dtype is floating, zeros where it is not.

    >>> _parse_input("int64:2,3").shape, _parse_input("2,3").dtype
    (torch.Size([2, 3]), torch.float32)
    """
    kind, colon, shape = text.rpartition(":")
    dtype = getattr(torch, kind, None) if colon else torch.float32
    sizes = shape.split(",")
    if dtype not in _INPUT_DTYPES or not all(size.strip().isdecimal() for size in sizes):
        raise InputError(
            f"--input {text!r} is not a shape: it takes whole numbers with commas, with a dtype before a colon where it is "
            f"not float32. Write for example 8,3,224,224 or int64:2,16."
        )
    try:
        dims = [int(size) for size in sizes]
        return torch.rand(dims).to(dtype) if dtype.is_floating_point else torch.zeros(dims, dtype=dtype)
    except (RuntimeError, OverflowError, ValueError, TypeError) as error:
        first_line = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"--input {text!r} cannot be made: {type(error).__name__}: {first_line}. Give a smaller shape, or another dtype."
        ) from error


def _load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict, also one that lies under the key ``state_dict`` or ``model`` of a checkpoint."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many classes for a file that is missing, damaged or not weights
        first_line = str(error).partition("\n")[0].rstrip(".")
        raise ModelReferenceError(
            f"The weights {str(path)!r} could not be read: {type(error).__name__}: {first_line}. "
            f"Save them with torch.save(model.state_dict(), path)."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    try:
        model.load_state_dict(found)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelReferenceError(
            f"The weights {str(path)!r} do not fit {type(model).__name__}: {error}. Name the model they were saved from."
        ) from error


def _check_writable(path: Path | None) -> None:
    """Raise TdfxError before the work, not after it, if its result cannot be written."""
    if path is not None and not (path.parent.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)):
        raise TdfxError(f"Cannot write {str(path)!r}. Name a file in a folder that exists and that you may write to.")


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
