"""Reports on their way to the disk: they appear whole, or not at all."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from tdfx.checkpoint.atomic import atomic_writer
from tdfx.errors import ReportError


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that takes its place at once.

    Raises:
        ReportError: The folder is missing or cannot be written to, or the disk is full. What was there is unchanged.
    """
    try:
        with atomic_writer(path) as file:
            file.write(data)
    except OSError as error:
        raise ReportError(
            f"The report {str(path)!r} could not be written: {error}. What was there before is unchanged. Name a file in a "
            f"folder that exists, with room on its disk."
        ) from error


def need(module: str, what: str) -> ModuleType:
    """Return a module of an optional package.

    Args:
        module: Its name.
        what: What it is needed for, in words.

    Raises:
        ReportError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ReportError(
            f"{what} needs {module.partition('.')[0]}, which cannot be imported ({error}). Install it with "
            f"pip install 'tdfx[report]'."
        ) from error
