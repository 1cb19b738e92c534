"""Where a command's results go: the terminal, a pipe, and files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console, Group

from tdfx.errors import TdfxError
from tdfx.plans.table import render_plain

STDOUT = Path("-")
"""The file name that stands for the standard output, where a file is asked for."""


def show(view: Callable[[int | None], Group]) -> None:
    """Print a view, in colour and as wide as the terminal where there is one; in a pipe nothing of it is cut.

    ``FORCE_COLOR`` asks for colour in a pipe too, cut to ``COLUMNS`` if that is set, and ``NO_COLOR`` for none anywhere.

    Args:
        view: Given the columns that there is room for, or None for any number, returns what to print.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        click.echo(render_plain(view(None)))
    elif sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal():
        console.print(view(console.width))
    else:
        Console(highlight=False, width=100_000).print(view(None))


def check_writable(path: Path | None) -> None:
    """Raise TdfxError before the work, not after it, if its result cannot be written."""
    if path is None or path == STDOUT:
        return
    try:
        possible = path.parent.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
    except OSError:  # a name that is too long
        possible = False
    if not possible:
        raise TdfxError(f"Cannot write {str(path)!r}. Name a file in a folder that exists and that you may write to.")


def write(path: Path | None, text: str) -> None:
    """Write text to a file, where one was named, or to the standard output."""
    if path == STDOUT:
        click.echo(text)
    elif path is not None:
        path.write_text(text + "\n", encoding="utf-8")
