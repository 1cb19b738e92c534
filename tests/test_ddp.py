"""Models in DistributedDataParallel: two processes check them together, and each check is a test here."""

from __future__ import annotations

from pathlib import Path

import ddp_worker
import pytest
import two_processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tracebacks of each check; "" for a check that passed."""
    return two_processes.start(Path(ddp_worker.__file__), tmp_path_factory.mktemp("ddp"), ddp_worker.CHECKS)


@pytest.mark.parametrize("name", [name for name in ddp_worker.CHECKS if name.startswith("check_")])
def test_two_processes(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == ""


def test_a_difference_between_processes_is_seen(outcomes: dict[str, str]) -> None:
    assert "AssertionError" in outcomes["control_a_difference_of_bits_is_seen"]
