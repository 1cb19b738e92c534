"""The callbacks in DistributedDataParallel: trainers_worker.py runs the checks on two processes, and each is a test here."""

from __future__ import annotations

from pathlib import Path

import pytest
import trainers_worker
import two_processes

# The few checks that need neither would take as long as many: three processes import torch for them.
pytestmark = pytest.mark.skipif(
    not any(map(trainers_worker.installed, trainers_worker.NEEDS)),
    reason="neither Lightning nor Transformers is installed: pip install 'tdfx[integrations]'",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each check; "" for nothing."""
    script, folder = Path(trainers_worker.__file__), tmp_path_factory.mktemp("trainers")
    return two_processes.start(script, folder, trainers_worker.CHECKS, torchrun=True)


@pytest.mark.parametrize("name", trainers_worker.CHECKS)
def test_two_processes(name: str, request: pytest.FixtureRequest) -> None:
    if not trainers_worker.installed(name):
        pytest.skip("what it needs is not installed: pip install 'tdfx[integrations]'")
    assert request.getfixturevalue("outcomes")[name] == ""
