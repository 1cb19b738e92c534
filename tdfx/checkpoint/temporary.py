"""Files on the way to their place: beside it, locked while they are written, and cleared away once their process is dead.

The lock tells the living from the dead, since the kernel lets go of it when a process ends in whatever way. Between kernels
that share a disk a lock need not be seen, so a file that another one began must also have lain still for a day.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import sys
import time
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_DAY = 86_400.0
"""Seconds for which a file that another kernel began is left alone after the last write."""


def begin(target: Path) -> BufferedWriter:
    """Open a new file beside a target, to be renamed to it while it is open, so that it stays locked until then."""
    while True:
        path = target.with_name(f".{target.name}.{_kernel()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
        # By open() itself, so that the file has the permissions of any other.
        file = open(path, "xb")  # noqa: PTH123, SIM115
        _lock(file)
        if path.exists():
            return file
        file.close()  # another process, clearing away, was quicker than the lock


def clear(target: Path) -> None:
    """Remove what processes that are dead left beside a target; what cannot be told, or removed, stays."""
    named = re.compile(rf"\.{re.escape(target.name)}\.([0-9a-f]{{8}})-\d+-[0-9a-f]{{8}}\.tmp")
    with suppress(OSError):
        for path in target.parent.iterdir():
            if (found := named.fullmatch(path.name)) is not None:
                _clear_one(path, 0.0 if found[1] == _kernel() else _DAY)


def _clear_one(path: Path, still: float) -> None:
    """Remove a file that no process has locked, if nothing was written to it for some seconds."""
    if sys.platform != "win32":
        with suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(file.fileno()).st_mtime >= still:
                path.unlink()


def _lock(file: BufferedWriter) -> None:
    if sys.platform != "win32":
        # Where the disk knows no locks, clearing away finds none to take either, and leaves the file.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)


def _kernel() -> str:
    """Return what tells apart the kernels under which files are written: containers of one share its locks."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        name = platform.node()
    return hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
