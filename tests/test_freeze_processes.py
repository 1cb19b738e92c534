"""Factors that train by turns on several processes: two of them check it together, and each check is told here."""

from __future__ import annotations

from pathlib import Path

import freeze_worker
import pytest
import two_processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each check; "" for nothing."""
    return two_processes.start(Path(freeze_worker.__file__), tmp_path_factory.mktemp("freeze"), freeze_worker.CHECKS)


@pytest.mark.parametrize("name", freeze_worker.CHECKS)
def test_two_processes(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == ""
