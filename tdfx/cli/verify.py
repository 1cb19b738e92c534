"""``tdfx verify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import torch

import tdfx
from tdfx.cli.codes import FAILED
from tdfx.cli.complete import complete_model
from tdfx.cli.inputs import parse_input
from tdfx.cli.output import check_writable, write
from tdfx.cli.sides import build_sides, read_inputs
from tdfx.cli.weights import load_weights
from tdfx.errors import InputError

_EXISTING = click.Path(dir_okay=False, path_type=Path)


@click.command(short_help="Prove that two models or ONNX files match.")
@click.argument("model", shell_complete=complete_model)
@click.argument("reference", shell_complete=complete_model)
@click.option("--input", "inputs", multiple=True, metavar="SHAPE", help="Shape of a random input, such as 8,3,224,224.")
@click.option("--inputs", "inputs_file", type=_EXISTING, help="Inputs to run, an .npz file.")
@click.option(
    "--weights",
    multiple=True,
    type=_EXISTING,
    help="Weights for the models, as inspect takes them; give it twice for one each. No code in it is run.",
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
    check_writable(json_file)
    if inputs and inputs_file is not None:
        raise InputError("--input and --inputs both say what to run the models on. Give one of them.")
    torch.manual_seed(0)
    examples = read_inputs(inputs_file) if inputs_file is not None else tuple(map(parse_input, inputs)) or None
    sides = build_sides((model, reference), weights, load_weights)
    report = tdfx.verify(*sides, examples, tolerance=tolerance)
    click.echo(str(report))
    write(json_file, json.dumps(report.to_dict(), indent=2))
    if not report.ok:
        sys.exit(FAILED)
