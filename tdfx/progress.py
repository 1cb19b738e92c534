"""Progress bars for work that takes long, on terminals only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

_QUIET = 2.0
"""Seconds before a bar appears."""
_shown: list[str] = []
"""What is counted now, outermost first; only the first has a bar, since two bars would overwrite each other."""


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts what is done, up to a total; if it takes long, a bar appears on stderr on terminals."""
    if _shown or not on_a_terminal():
        yield lambda count: None
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=total)
    began = time.perf_counter()

    def advance(count: int) -> None:
        bar.update(task, advance=count)
        if not bar.live.is_started and time.perf_counter() - began > _QUIET:
            bar.start()

    _shown.append(what)
    try:
        yield advance
    finally:
        _shown.remove(what)
        bar.stop()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on a terminal what is being done, where it cannot be counted."""
    if _shown or not on_a_terminal():
        yield
        return
    _shown.append(what)
    try:
        with Console(stderr=True).status(Text(what)):
            yield
    finally:
        _shown.remove(what)


def on_a_terminal() -> bool:
    """Return True if stderr is a terminal; a program may have closed stderr or replaced it by any object."""
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError):
        return False
