"""Timing in turns, with a clock that the tests control; and the file in which times are kept."""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import tdfx
from tdfx.cost.store import _SCHEMA, Store, cache_folder
from tdfx.cost.timing import Timing, _sample, take_turns


class Clock:
    """A clock that stands still except while a timed function runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, calls: list[str], *seconds: float) -> Callable[[], None]:
        """Return a function whose calls take these times, the last one repeatedly, and are recorded."""
        left = list(seconds)

        def run() -> None:
            calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_functions_take_turns_and_the_median_counts() -> None:
    clock, calls = Clock(), list[str]()
    # The first call of each is the warm-up.
    runs = [clock.taking("a", calls, 9.0, 1.0, 1.2, 1.1), clock.taking("b", calls, 9.0, 2.0, 2.4, 2.2)]
    first, second = take_turns(runs, rounds=3, clock=clock)
    assert calls == ["a", "b"] * 4
    assert [first.seconds, second.seconds] == pytest.approx([1.1, 2.2])


def test_two_samples_that_agree_closely_need_no_third() -> None:
    clock, calls = Clock(), list[str]()
    runs = [clock.taking("a", calls, 9.0, 1.0, 1.04, 5.0), clock.taking("b", calls, 9.0, 2.0, 2.2, 2.08, 5.0)]
    first, second = take_turns(runs, rounds=5, clock=clock)
    assert calls == ["a", "b", "a", "b", "a", "b", "b"]
    assert (first.seconds, second.seconds) == pytest.approx((1.02, 2.08))


def test_a_disturbed_sample_is_replaced() -> None:
    clock, calls = Clock(), list[str]()
    runs = [clock.taking("a", calls, 1.0, 1.0, 7.0, 1.1, 1.2), clock.taking("b", calls, 2.0)]
    first, second = take_turns(runs, rounds=3, clock=clock)
    assert first.trusted == pytest.approx((1.0, 1.1, 1.2))
    assert (len(first.samples), len(second.samples)) == (4, 2)
    assert first.seconds == pytest.approx(1.1)


def test_timing_ends_even_if_every_sample_is_disturbed() -> None:
    clock, calls = Clock(), list[str]()
    (timing,) = take_turns([clock.taking("a", calls, 1.0, *(2.0**n for n in range(20)))], rounds=3, clock=clock)
    assert len(timing.samples) == 6


def test_no_round_is_begun_that_would_take_too_long() -> None:
    clock, calls = Clock(), list[str]()
    run = clock.taking("a", calls, 1.0, 0.9, 1.0, 1.1, 1.2)
    (timing,) = take_turns([run], rounds=50, most_seconds=5.5, clock=clock)
    assert len(timing.samples) == 4
    (timing,) = take_turns([clock.taking("a", calls, 1.0)], rounds=50, most_seconds=0.1, clock=clock)
    assert len(timing.samples) == 1


def test_short_functions_are_repeated() -> None:
    clock, calls = Clock(), list[str]()
    (timing,) = take_turns([clock.taking("a", calls, 1e-5)], rounds=2, clock=clock)
    assert timing.seconds == pytest.approx(1e-5)
    assert len(calls) == 2 + 2 * 100


def test_the_median_is_of_trusted_samples() -> None:
    assert Timing((3.0, 1.0, 1.2)).trusted == (1.0, 1.2)
    assert Timing((3.0, 1.0, 1.2)).seconds == pytest.approx(1.1)


def test_times_are_kept_for_other_processes(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "folder")
    assert store.get(["a"]) == {}
    store.put({"a": 0.5, "b": 0.25})
    assert Store(store.folder).get(["b", "c", "a"]) == {"b": 0.25, "a": 0.5}
    store.put({"a": 0.75})
    assert (store.get(["a"]), len(store)) == ({"a": 0.75}, 2)
    assert store.clear() == 2
    assert (store.get(["a"]), len(store), store.clear()) == ({}, 0, 0)


def test_the_oldest_times_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdfx.cost.store._MOST_ROWS", 3)
    store = Store(tmp_path)
    for number in range(5):
        monkeypatch.setattr("tdfx.cost.store.time.time", lambda number=number: float(number))
        store.put({str(number): float(number)})
    assert store.get([str(number) for number in range(5)]) == {"2": 2.0, "3": 3.0, "4": 4.0}


def test_a_damaged_file_is_no_failure(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.file.write_bytes(b"this is not a database, and long enough to be looked at" * 100)
    assert store.get(["a"]) == {}
    store.put({"a": 1.0})
    assert store.get(["a"]) == {}
    assert store.clear() == 0
    store.put({"a": 1.0})
    assert store.get(["a"]) == {"a": 1.0}


def test_a_folder_that_cannot_be_made_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file")
    store.put({"a": 1.0})
    assert store.get(["a"]) == {}


def test_all_or_none_of_a_batch_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put({"a": 1.0})
    store.put({"b": 2.0, "c": None})  # type: ignore[dict-item]
    assert store.get(["a", "b", "c"]) == {"a": 1.0}


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tdfx.cost.store import Store\n"
        "for n in range(40): Store(Path(sys.argv[1])).put({f'{sys.argv[2]} {n}': float(n)})"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tdfx.__file__).resolve().parents[1])}
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], env=environment) for name in ("x", "y", "z")
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert len(Store(tmp_path)) == 120
    with sqlite3.connect(Store(tmp_path).file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_one_process_at_a_time_brings_an_old_file_up_to_date(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with contextlib.closing(sqlite3.connect(store.file)) as old, old:
        old.execute(_SCHEMA)
    looked = threading.Barrier(2, timeout=0.5)  # one waits here, between looking at the columns and adding one

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            if sql.startswith("ALTER"):
                with contextlib.suppress(threading.BrokenBarrierError):
                    looked.wait()
            return super().execute(sql, *arguments)

    connect = functools.partial(sqlite3.connect, factory=Connection)
    with patch("tdfx.cost.store.sqlite3.connect", connect), ThreadPoolExecutor() as threads:
        list(threads.map(lambda key: store.put({key: 1.0}), "ab"))
    assert store.get(["a", "b"]) == {"a": 1.0, "b": 1.0}


def test_the_folder_is_the_users_or_a_named_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDFX_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("TDFX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert cache_folder() == tmp_path / "xdg" / "tdfx"


class Processor:
    """A simulated processor: every reading of a clock may come after another process had it for a second."""

    def __init__(self, preempted: set[int]) -> None:
        self.now = self.waited = 0.0
        self.readings = 0
        self.preempted = preempted
        """The readings of either clock before which the second is lost, counted from 0."""

    def clock(self) -> float:
        self._read()
        return self.now

    def waiting(self) -> float:
        self._read()
        return self.waited

    def work(self) -> None:
        self.now += 0.5  # in which another process has it for 0.2
        self.waited += 0.2

    def _read(self) -> None:
        if self.readings in self.preempted:
            self.now += 1.0
            self.waited += 1.0
        self.readings += 1


@pytest.mark.parametrize("preempted", range(4))
def test_work_never_seems_shorter_than_it_is_on_a_busy_processor(preempted: int) -> None:
    quiet, busy = Processor(set()), Processor({preempted})
    samples = [_sample(lambda: None, cpu.clock, cpu.waiting, float, cpu.work, 1)[0] for cpu in (quiet, busy)]
    assert busy.readings == 4
    assert samples[0] == pytest.approx(0.3)
    assert samples[1] >= 0.3 - 1e-9
