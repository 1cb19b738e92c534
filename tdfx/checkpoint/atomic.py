"""Write a file so that it appears complete or not at all, even if the process is killed; used for every file of tdfx.

The new file is written beside the target and then renamed to it. While it is written it is locked. The kernel releases a
lock when its process ends, however it ends, so an unlocked file was left behind by a dead process and is removed by the
next one that writes the same target. Machines that share a disk may not see each other's locks, so a file that another
machine began is removed only a day after its last change.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedWriter
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_FOREIGN_AGE = 86_400.0
"""Seconds since its last change after which a file that another machine began is removed."""


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BufferedWriter]:
    """Open a new file that replaces ``path`` when the block ends; after an error ``path`` is as it was.

    A link keeps pointing to its file, and a file that existed keeps its permissions. Files that killed processes left
    beside ``path`` are removed first.

    Raises:
        OSError: The folder is missing or cannot be written to, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    remove_leftovers(target)
    with open_temporary(target) as file:
        temporary = Path(file.name)
        try:
            mode = target.stat().st_mode & 0o777 if target.exists() else None
            if mode is not None:
                temporary.chmod(0o600)  # nobody may read it who may not read the target
            yield file
            if mode is not None:
                temporary.chmod(mode)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":
                file.close()  # Windows does not rename open files
            os.replace(temporary, target)  # noqa: PTH105
        finally:
            temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def open_temporary(target: Path) -> BufferedWriter:
    """Open and lock a new file beside a target; rename it before it is closed, so that it stays locked until then."""
    while True:
        path = target.with_name(f".{target.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
        # open(), unlike tempfile, gives the permissions of an ordinary new file.
        file = open(path, "xb")  # noqa: PTH123, SIM115
        _lock(file)
        if path.exists():
            return file
        file.close()  # another process removed the file before it was locked


def remove_leftovers(target: Path) -> None:
    """Remove the temporary files of dead processes beside a target; ignore files that cannot be read or removed."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.([0-9a-f]{{8}})-\d+-[0-9a-f]{{8}}\.tmp")
    with suppress(OSError):
        for path in target.parent.iterdir():
            if (match := pattern.fullmatch(path.name)) is not None:
                _remove_if_unlocked(path, min_age=0.0 if match[1] == _machine() else _FOREIGN_AGE)


def _remove_if_unlocked(path: Path, min_age: float) -> None:
    """Remove a file that no process has locked and that has not changed for ``min_age`` seconds."""
    if sys.platform != "win32":
        with suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(file.fileno()).st_mtime >= min_age:
                path.unlink()


def _lock(file: BufferedWriter) -> None:
    if sys.platform != "win32":
        # On a disk without locks _remove_if_unlocked fails too, so nothing is removed there.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)


def _machine() -> str:
    """Return a short name of the running kernel; containers on one kernel share its locks."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        name = platform.node()
    return hashlib.blake2b(name.encode(), digest_size=4).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a renamed file survive a power failure, where the system can; the file is in its place either way."""
    if os.name != "nt":
        with suppress(OSError), ExitStack() as stack:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            os.fsync(descriptor)
