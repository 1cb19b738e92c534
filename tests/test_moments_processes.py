"""Moments on two processes: moments_worker.py runs the checks, and each is a test here."""

from __future__ import annotations

from pathlib import Path

import moments_worker
import pytest
import two_processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The error of each check; "" for none."""
    return two_processes.start(Path(moments_worker.__file__), tmp_path_factory.mktemp("moments"), moments_worker.CHECKS)


@pytest.mark.parametrize("name", [name for name in moments_worker.CHECKS if name.startswith("check_")])
def test_two_processes(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == ""


def test_a_difference_between_processes_is_seen(outcomes: dict[str, str]) -> None:
    assert "AssertionError" in outcomes["control_moments_that_are_not_averaged_differ"]
