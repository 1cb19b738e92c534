"""Where a command's results go: the terminal, a pipe, files, and the exit code."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tdfx.errors import TdfxError

if TYPE_CHECKING:
    from rich.console import Group

STDOUT = Path("-")
"""The file name that means the standard output."""

FAILED, STOPPED, INTERRUPTED = 1, 2, 130
"""Exit codes: the proof failed; the command could not be carried out; the user pressed Ctrl-C, as shells number it."""


def show(view: Callable[[int | None], Group]) -> None:
    """Print a view: on a terminal in colour and as wide as it is, in a pipe in plain text of any width.

    ``view`` takes the number of columns, or None for any number. ``FORCE_COLOR`` asks for colour in a pipe too, cut to
    ``COLUMNS`` if that is set; ``NO_COLOR`` turns colour off.
    """
    from rich.console import Console

    from tdfx.plans.table import render_plain

    console = Console(highlight=False)
    if not console.is_terminal:
        click.echo(render_plain(view(None)))
    elif sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal():
        console.print(view(console.width))
    else:
        Console(highlight=False, width=100_000).print(view(None))


def say(text: str) -> None:
    """Print a message on stderr; on a terminal its lines end between words."""
    from tdfx.progress import on_a_terminal

    if on_a_terminal():
        wrapper = textwrap.TextWrapper(
            shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False
        )
        text = "\n".join(map(wrapper.fill, text.splitlines()))
    click.echo(text, err=True)


def check_writable(path: Path | None) -> None:
    """Raise TdfxError, before any work is done, if a result cannot be written to a file."""
    if path is None or path == STDOUT:
        return
    try:
        possible = path.parent.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
    except OSError:  # a name that is too long
        possible = False
    if not possible:
        raise TdfxError(f"Cannot write {str(path)!r}. Name a file in a folder that exists and that you may write to.")


def write(path: Path | None, text: str) -> None:
    """Write text to a file, or to the standard output; do nothing if no path was given."""
    if path == STDOUT:
        click.echo(text)
    elif path is not None:
        path.write_text(text + "\n", encoding="utf-8")
