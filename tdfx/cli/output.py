"""Where a command's results go: the terminal, and files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
from rich.console import Console, Group

from tdfx.errors import TdfxError
from tdfx.plan_table import render_plain


def show(view: Group) -> None:
    """Print a view, in colour and as wide as the terminal where there is one."""
    if sys.stdout.isatty():
        Console().print(view)
    else:
        click.echo(render_plain(view))


def check_writable(path: Path | None) -> None:
    """Raise TdfxError before the work, not after it, if its result cannot be written."""
    if path is not None and not (path.parent.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)):
        raise TdfxError(f"Cannot write {str(path)!r}. Name a file in a folder that exists and that you may write to.")


def write(path: Path | None, text: str) -> None:
    """Write text to a file, where one was named."""
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
