"""The format of checkpoint files: what ``torch.save`` writes, followed by a seal that shows any damage.

The seal is a mark, the length and a CRC-32 of everything before it; ``torch.load(weights_only=True)`` ignores it. The
format is torch's and not safetensors, because it keeps strides (channels last), shared storage, every dtype, and the plain
values beside the tensors. torch writes checksums too but does not check them when it reads, so they are switched off: the
seal takes their time.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils.serialization import config

from tdfx.checkpoint.atomic import atomic_writer
from tdfx.errors import CheckpointError

_MARK = b"tdfxseal"
_SEAL = struct.Struct("<8sQI")
_CHUNK = 1 << 22


class _SealingWriter:
    """A writer that keeps the length and the CRC-32 of what passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.length, self.crc = file, 0, 0

    def write(self, data: Any) -> int:
        self.length += self.file.write(data)
        self.crc = zlib.crc32(data, self.crc)
        return len(data)

    def flush(self) -> None:
        self.file.flush()

    def seal(self) -> None:
        self.file.write(_SEAL.pack(_MARK, self.length, self.crc))


def write_sealed(record: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a record to a file, which appears complete or not at all; raise CheckpointError if that fails."""
    try:
        with atomic_writer(path) as file:
            writer = _SealingWriter(file)
            with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
                torch.save(record, writer)  # type: ignore[arg-type]
            writer.seal()
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be written: {error}. What was there before is unchanged. Pass the "
            f"path of a file in a folder that exists, with room on its disk."
        ) from error


def read_sealed(path: str | os.PathLike[str]) -> Any:
    """Return the record in a file, with its tensors on the CPU.

    Raises CheckpointError if there is no such file, tdfx did not write it, or it is damaged.
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
            f"The checkpoint {str(path)!r} is intact, but this torch ({torch.__version__}) cannot read it: {error}. Read "
            f"it with the torch version that wrote it, or a newer one."
        ) from error


def is_sealed(path: Path) -> bool:
    """Return True for a file that ends with the mark of a seal, damaged or not."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _SEAL.size))
            return file.read().startswith(_MARK)
    except OSError:
        return False


def _check_seal(file: BinaryIO, path: str) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _SEAL.size))
    mark, length, sealed_crc = _SEAL.unpack(file.read().rjust(_SEAL.size, b"\0"))
    if mark != _MARK:
        raise CheckpointError(
            f"{path!r} does not end with the seal of a tdfx checkpoint: tdfx.save did not write it, or it was cut off. If "
            f"it is a file of yours that holds what tdfx.state returned, read it with torch.load and pass that part to "
            f"tdfx.load."
        )
    file.seek(0)
    content_size, crc = size - _SEAL.size, 0
    for start in range(0, content_size, _CHUNK):
        crc = zlib.crc32(file.read(min(_CHUNK, content_size - start)), crc)
    if length != content_size or crc != sealed_crc:
        raise CheckpointError(
            f"The checkpoint {path!r} is damaged: its {size} bytes are not those that were written. Use an earlier "
            f"checkpoint, or copy the file again."
        )
