"""Reports on their way to the disk: they appear whole, or not at all."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

from tdfx.checkpoint.temporary import begin, clear
from tdfx.errors import ReportError


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that takes its place at once.

    Raises:
        ReportError: The folder is missing or cannot be written to, or the disk is full. What was there is unchanged.
    """
    target = Path(os.path.realpath(path))
    try:
        clear(target)
        with begin(target) as file:
            try:
                if target.exists():
                    Path(file.name).chmod(target.stat().st_mode & 0o777)
                file.write(data)
                file.flush()
                if os.name == "nt":
                    file.close()  # open files have fixed names there
                os.replace(file.name, target)  # noqa: PTH105
            finally:
                Path(file.name).unlink(missing_ok=True)
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
