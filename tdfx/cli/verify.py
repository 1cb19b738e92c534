"""``tdfx verify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

import tdfx
from tdfx.cli.codes import FAILED
from tdfx.cli.output import check_writable, write


@click.command()
@click.argument("model", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("reference", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the report to a file."
)
def verify(model: Path, reference: Path, json_file: Path | None) -> None:
    """Compare two ONNX files: the same graph, and the same numbers on random inputs?"""
    check_writable(json_file)
    report = tdfx.verify(model, reference)
    click.echo(str(report))
    write(json_file, json.dumps(report.to_dict(), indent=2))
    if not report.ok:
        sys.exit(FAILED)
