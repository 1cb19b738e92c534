"""``tdfx verify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import torch

import tdfx
from tdfx.cli.completers import complete_model
from tdfx.cli.exit_codes import FAILED
from tdfx.cli.inputs import parse_input, read_inputs
from tdfx.cli.output import check_writable, write
from tdfx.cli.sides import build_sides
from tdfx.cli.weights import load_weights
from tdfx.errors import InputError

_PATH = click.Path(dir_okay=False, path_type=Path)


@click.command(short_help="Prove that two models or ONNX files match.")
@click.argument("model", shell_complete=complete_model)
@click.argument("reference", shell_complete=complete_model)
@click.option("--input", "inputs", multiple=True, metavar="SHAPE", help="Shape of a random input, such as 8,3,224,224.")
@click.option("--inputs", "inputs_file", type=_PATH, help="An .npz file of inputs to run.")
@click.option(
    "--weights",
    multiple=True,
    type=_PATH,
    help="Weights for the models, as for inspect; give it twice for one file each. No code in it is run.",
)
@click.option(
    "--tolerance", type=float, help="Largest relative error to accept; by default derived from dtype and depth."
)
@click.option("--json", "json_file", type=_PATH, help="Write the report to a file.")
def verify(
    model: str,
    reference: str,
    inputs: tuple[str, ...],
    inputs_file: Path | None,
    weights: tuple[Path, ...],
    tolerance: float | None,
    json_file: Path | None,
) -> None:
    """Check whether MODEL and REFERENCE have the same structure and interface, and compute the same numbers.

    Each is an ONNX file, or a model as for inspect: torchvision:NAME, package.module:factory or path/to/file.py:factory.
    Models need --input or --inputs; without --weights both are built with the same seed. Exits with 0 if all three are the
    same, 1 if one is not, 2 if they cannot be compared.
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
