"""Freeze on two processes: freeze_worker.py runs the checks, and each is a test here."""

from __future__ import annotations

from pathlib import Path

import freeze_worker
import pytest
import two_processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The error of each check; "" for none."""
    return two_processes.start(Path(freeze_worker.__file__), tmp_path_factory.mktemp("freeze"), freeze_worker.CHECKS)


@pytest.mark.parametrize("name", freeze_worker.CHECKS)
def test_two_processes(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == ""
