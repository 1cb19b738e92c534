"""Keep measured times between runs in a small SQLite file, which several processes may use at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

_MOST_ROWS = 200_000
"""Rows that are kept, about 20 MB; the oldest are deleted first."""
_WAIT = 5.0
"""Seconds to wait for another process that is writing."""
_SCHEMA = "CREATE TABLE IF NOT EXISTS times (key BLOB PRIMARY KEY, seconds REAL NOT NULL, at REAL NOT NULL)"
_LOAD = "ALTER TABLE times ADD COLUMN load REAL NOT NULL DEFAULT 1.0"
"""Adds what files of earlier versions do not have."""


def cache_folder() -> Path:
    """Return the folder of tdfx's cache: ``$TDFX_CACHE_DIR``, or one in the user's folder for caches."""
    if folder := os.environ.get("TDFX_CACHE_DIR"):
        return Path(folder)
    try:
        return user_cache_path("tdfx", appauthor=False)
    except RuntimeError:  # the user has no home, as in some containers
        return Path(tempfile.gettempdir()) / "tdfx-cache"


@dataclass(frozen=True, slots=True)
class Store:
    """Times by key, in a file.

    A cache never stops a run: if the file cannot be read, no time is known, and if it cannot be written, none is kept.
    """

    folder: Path
    """The folder that holds the file."""

    @property
    def file(self) -> Path:
        """The SQLite file."""
        return self.folder / "times.sqlite3"

    def get(self, keys: Sequence[str]) -> dict[str, float]:
        """Return the times in seconds of the keys that are known."""
        return {key: seconds for key, (seconds, _) in self.entries(keys).items()}

    def entries(self, keys: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Return the times of the keys that are known, and the load of the machine at the time; 1 is an idle one."""
        entries: dict[str, tuple[float, float]] = {}
        with contextlib.suppress(sqlite3.Error, OSError), self._open() as connection:
            for key in keys:
                # Files of earlier versions have no load.
                for _, seconds, _, *load in connection.execute("SELECT * FROM times WHERE key = ?", (_digest(key),)):
                    entries[key] = float(seconds), float(load[0]) if load else 1.0
        return entries

    def put(self, times: Mapping[str, float], loads: Mapping[str, float] | None = None) -> None:
        """Keep times in seconds by key, either all or none of them, and the loads under which they were taken."""
        now, loads = time.time(), loads or {}
        with contextlib.suppress(sqlite3.Error, OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._open(create=True) as connection:
                rows = [(_digest(key), seconds, now, loads.get(key, 1.0)) for key, seconds in times.items()]
                connection.executemany(
                    "INSERT OR REPLACE INTO times (key, seconds, at, load) VALUES (?, ?, ?, ?)", rows
                )
                oldest = "SELECT key FROM times ORDER BY at DESC LIMIT -1 OFFSET ?"
                connection.execute(f"DELETE FROM times WHERE key IN ({oldest})", (_MOST_ROWS,))

    def clear(self) -> int:
        """Delete all times, and return how many there were.

        Raises:
            OSError: The file exists and cannot be deleted.
        """
        count = 0
        with contextlib.suppress(sqlite3.Error, OSError):
            count = len(self)
        for ending in ("", "-journal", "-wal", "-shm"):
            self.file.with_name(self.file.name + ending).unlink(missing_ok=True)
        return count

    def __len__(self) -> int:
        if not self.file.exists():
            return 0
        with self._open() as connection:
            return int(connection.execute("SELECT COUNT(*) FROM times").fetchone()[0])

    @contextlib.contextmanager
    def _open(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        """Open the file for one transaction, rolled back if it fails; one process at a time creates or writes."""
        if not (create or self.file.exists()):
            raise FileNotFoundError(self.file)
        with contextlib.closing(sqlite3.connect(self.file, timeout=_WAIT)) as connection, connection:
            if create:
                connection.execute("BEGIN IMMEDIATE")  # or else two processes both add the column that is missing
                connection.execute(_SCHEMA)
                if "load" not in {row[1] for row in connection.execute("PRAGMA table_info(times)")}:
                    connection.execute(_LOAD)
            yield connection


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
