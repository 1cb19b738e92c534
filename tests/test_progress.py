"""Progress bars appear on terminals, for work that takes long, one at a time."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from tdfx import progress as bars
from tdfx.progress import progress, waiting


class Screen(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Replace stderr by a terminal; within the test, because pytest replaces stderr after the fixtures."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return screen


def work(what: str, count: int) -> None:
    with progress(what, count) as advance:
        for _ in range(count):
            advance(1)


def test_a_bar_appears_where_work_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = use_terminal(monkeypatch)
    work("timing layers", 3)
    assert screen.getvalue() == ""
    monkeypatch.setattr(bars, "_QUIET", -1.0)
    work("timing layers", 3)
    assert "timing layers" in screen.getvalue()
    assert "3/3" in screen.getvalue()


def test_a_bar_within_another_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = use_terminal(monkeypatch)
    monkeypatch.setattr(bars, "_QUIET", -1.0)
    with progress("reading weights", 2) as advance:
        advance(1)
        work("timing layers", 3)
        with waiting("building"):
            advance(1)
    assert "reading weights" in screen.getvalue()
    assert "timing layers" not in screen.getvalue()
    assert "building" not in screen.getvalue()
    work("timing layers", 3)
    assert "timing layers" in screen.getvalue()


def test_uncounted_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = use_terminal(monkeypatch)
    with waiting("building [a] model"):
        pass
    assert "building [a] model" in screen.getvalue()


def test_after_a_failure_the_next_bar_appears(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = use_terminal(monkeypatch)
    monkeypatch.setattr(bars, "_QUIET", -1.0)
    for block in (progress("first", 2), waiting("second")):
        with pytest.raises(KeyError), block:
            raise KeyError
    work("third", 1)
    assert "third" in screen.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), None, object()], ids=["pipe", "none", "anything"])
def test_without_a_terminal_nothing_is_shown(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "_QUIET", -1.0)
    monkeypatch.setattr(sys, "stderr", stream)
    work("timing layers", 3)
    with waiting("building"):
        pass
    if isinstance(stream, io.StringIO):
        assert stream.getvalue() == ""
