"""Write reports to the disk: a file appears complete or not at all."""

from __future__ import annotations

import os

from tdfx.checkpoint.atomic import atomic_writer
from tdfx.errors import ReportError


def write_report(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a report to a file; if that fails, raise ReportError and leave what was there."""
    try:
        with atomic_writer(path) as file:
            file.write(data)
    except OSError as error:
        raise ReportError(
            f"The report {str(path)!r} could not be written: {error}. What was there before is unchanged. Name a file in a "
            f"folder that exists, with room on its disk."
        ) from error
