"""Where measured times are kept between runs: a small SQLite file, which several processes may use at once."""

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
"""Rows that are kept, about 20 MB; the oldest go first."""
_WAIT = 5.0
"""Seconds to wait for another process that writes."""
_SCHEMA = "CREATE TABLE IF NOT EXISTS times (key BLOB PRIMARY KEY, seconds REAL NOT NULL, at REAL NOT NULL)"


def cache_folder() -> Path:
    """Return the folder of tdfx's cache: ``$TDFX_CACHE_DIR``, or the user's own for caches."""
    own = os.environ.get("TDFX_CACHE_DIR")
    if own:
        return Path(own)
    try:
        return user_cache_path("tdfx", appauthor=False)
    except RuntimeError:  # the user has no home, as in some containers
        return Path(tempfile.gettempdir()) / "tdfx-cache"


@dataclass(frozen=True, slots=True)
class Store:
    """Times by key, in a file.

    A cache is a help and nothing else: where the file cannot be read or written, what was asked for is not there, and what
    is given is not kept.
    """

    folder: Path

    @property
    def file(self) -> Path:
        """The file itself."""
        return self.folder / "times.sqlite3"

    def get(self, keys: Sequence[str]) -> dict[str, float]:
        """Return the times in seconds of those keys that are known."""
        found: dict[str, float] = {}
        with contextlib.suppress(sqlite3.Error, OSError), self._opened() as connection:
            for key in keys:
                row = connection.execute("SELECT seconds FROM times WHERE key = ?", (_digest(key),)).fetchone()
                if row is not None:
                    found[key] = float(row[0])
        return found

    def put(self, times: Mapping[str, float]) -> None:
        """Keep times in seconds by key, all or none of them."""
        now = time.time()
        with contextlib.suppress(sqlite3.Error, OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._opened(create=True) as connection:
                rows = [(_digest(key), seconds, now) for key, seconds in times.items()]
                connection.executemany("INSERT OR REPLACE INTO times VALUES (?, ?, ?)", rows)
                connection.execute(
                    "DELETE FROM times WHERE key IN (SELECT key FROM times ORDER BY at DESC LIMIT -1 OFFSET ?)",
                    (_MOST_ROWS,),
                )

    def clear(self) -> int:
        """Forget everything, and return how many times were known.

        Raises:
            OSError: The file is there and cannot be deleted.
        """
        count = 0
        with contextlib.suppress(sqlite3.Error, OSError):
            count = len(self)
        for path in (self.file, *(self.file.with_name(self.file.name + end) for end in ("-journal", "-wal", "-shm"))):
            path.unlink(missing_ok=True)
        return count

    def __len__(self) -> int:
        if not self.file.exists():
            return 0
        with self._opened() as connection:
            return int(connection.execute("SELECT COUNT(*) FROM times").fetchone()[0])

    @contextlib.contextmanager
    def _opened(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        """Open the file for one transaction, which is undone if it fails."""
        if not (create or self.file.exists()):
            raise FileNotFoundError(self.file)
        connection = sqlite3.connect(self.file, timeout=_WAIT)
        try:
            with connection:
                if create:
                    connection.execute(_SCHEMA)
                yield connection
        finally:
            connection.close()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
