"""Checkpoint files: they appear whole or not at all, and say of themselves whether they are intact.

A file is what ``torch.save`` writes, which ``torch.load(weights_only=True)`` reads, and a seal after its end: a mark, the
length and a CRC-32. torch's format and not safetensors, because it keeps strides (channels last), shared storage, every
dtype, and the plain values beside the tensors; torch itself does not look at its checksums when it reads. So it writes none:
the seal's covers everything, and one takes as long as the other.
"""

from __future__ import annotations

import os
import struct
import zlib
from io import BufferedWriter
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils.serialization import config

from tdfx.checkpoint.temporary import begin, clear
from tdfx.errors import CheckpointError

_MARK = b"tdfxseal"
_SEAL = struct.Struct("<8sQI")
_CHUNK = 1 << 22


class _Sealing:
    """A file that counts and sums what is written to it."""

    def __init__(self, inside: BinaryIO) -> None:
        self.inside = inside
        self.length = 0
        self.crc = 0

    def write(self, data: Any) -> int:
        self.length += self.inside.write(data)
        self.crc = zlib.crc32(data, self.crc)
        return len(data)

    def flush(self) -> None:
        self.inside.flush()

    def seal(self) -> None:
        self.inside.write(_SEAL.pack(_MARK, self.length, self.crc))


def write(record: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a record to a file that takes its place at once, when all of it is on the disk.

    What processes that were killed here left beside it is cleared away first.

    Raises:
        CheckpointError: The folder is missing or cannot be written to, or the disk is full.
    """
    # A link goes on pointing to the file, as it does when one is opened and written.
    target = Path(os.path.realpath(path))
    try:
        clear(target)
        with begin(target) as file:
            try:
                _fill(file, record, target)
                if os.name == "nt":
                    file.close()  # open files have fixed names there
                os.replace(file.name, target)  # noqa: PTH105
            finally:
                Path(file.name).unlink(missing_ok=True)
        _sync_folder(target.parent)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be written: {error}. What was there before is unchanged. Pass the "
            f"path of a file in a folder that exists, with room on its disk."
        ) from error


def _fill(file: BufferedWriter, record: dict[str, Any], target: Path) -> None:
    """Write a record and its seal to a new file, and wait until they are on the disk."""
    if target.exists():
        Path(file.name).chmod(target.stat().st_mode & 0o777)
    sealing = _Sealing(file)
    with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        torch.save(record, sealing)  # type: ignore[arg-type]
    sealing.seal()
    file.flush()
    os.fsync(file.fileno())


def read_sealed(path: str | os.PathLike[str]) -> Any:
    """Return what a file holds, on the CPU.

    Raises:
        CheckpointError: There is no such file, tdfx did not write it, or it is not as it was written.
    """
    try:
        with Path(path).open("rb") as file:
            _check_seal(file, str(path))
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be read: {error}. Pass the path that was given to tdfx.save."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} is intact, and this torch ({torch.__version__}) cannot read it: {error}. Read it "
            f"with the version that wrote it, or a newer one."
        ) from error


def _check_seal(file: BinaryIO, path: str) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _SEAL.size))
    mark, length, crc = _SEAL.unpack(file.read().rjust(_SEAL.size, b"\0"))
    if mark != _MARK:
        raise CheckpointError(
            f"{path!r} does not end as a checkpoint of tdfx does: tdfx.save did not write it, or it was cut off. If it is "
            f"one of your own that holds what tdfx.state gave, read it with torch.load and pass that part to tdfx.load."
        )
    file.seek(0)
    found = 0
    left = size - _SEAL.size
    while left > 0:
        chunk = file.read(min(_CHUNK, left))
        found = zlib.crc32(chunk, found)
        left -= len(chunk)
    if length != size - _SEAL.size or found != crc:
        raise CheckpointError(
            f"The checkpoint {path!r} is damaged: its {size} bytes are not those that were written. Go back to an earlier "
            f"checkpoint, or copy the file again."
        )


def _sync_folder(folder: Path) -> None:
    """Make the new name of a file last through a power failure, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
