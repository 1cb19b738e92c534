"""``tdfx verify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

import tdfx
from tdfx.cli.completers import complete_model
from tdfx.cli.output import FAILED, check_writable, write
from tdfx.errors import InputError, ModelReferenceError

if TYPE_CHECKING:
    from torch import nn

_PATH = click.Path(dir_okay=False, path_type=Path)
_SEED = 0
"""Seed of models without ``--weights``, so that the same code gives the same weights on both sides."""


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
    import torch

    from tdfx.cli.inputs import parse_input, read_inputs

    check_writable(json_file)
    if inputs and inputs_file is not None:
        raise InputError("--input and --inputs both say what to run the models on. Give one of them.")
    torch.manual_seed(0)
    examples = read_inputs(inputs_file) if inputs_file is not None else tuple(map(parse_input, inputs)) or None
    side, other_side = _build_sides((model, reference), weights)
    report = tdfx.verify(side, other_side, examples, tolerance=tolerance)
    click.echo(str(report))
    write(json_file, json.dumps(report.to_dict(), indent=2))
    if not report.ok:
        sys.exit(FAILED)


def _build_sides(names: tuple[str, str], weights: tuple[Path, ...]) -> list[nn.Module | Path]:
    """Return the models or files that two names stand for, with weights: none, one for all models, or one for each."""
    import torch

    from tdfx.cli.references import build_model
    from tdfx.cli.weights import load_weights

    is_file = [_is_file(name) for name in names]
    models = is_file.count(False)
    if len(weights) > max(1, models) or (weights and not models):
        raise ModelReferenceError(
            f"There are {len(weights)} --weights for {models} model(s): an ONNX file has its own. Give one for all models, "
            f"or one for each, in their order."
        )
    remaining = iter(weights if len(weights) > 1 else weights * models)
    sides: list[nn.Module | Path] = []
    for name, file in zip(names, is_file, strict=True):
        torch.manual_seed(_SEED)
        if file:
            sides.append(Path(name))
            continue
        model = build_model(name)
        if weights:
            load_weights(model, next(remaining))
        sides.append(model)
    return sides


def _is_file(name: str) -> bool:
    """Return True for the path of an ONNX file, which need not exist, and False for the name of a model."""
    if Path(name).suffix == ".onnx" or Path(name).is_file():
        return True
    if ":" not in name:
        from tdfx.cli.references import what_is_meant

        raise ModelReferenceError(
            f"{name!r} is not the path of an .onnx file, and it names no model: {what_is_meant(name)}"
        )
    return False
