"""Models that fully_shard was called on: two processes check them together, and each check is a test here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fsdp_worker
import pytest
import two_processes
from torch import nn

import tdfx


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tracebacks of each check; "" for a check that passed."""
    return two_processes.start(Path(fsdp_worker.__file__), tmp_path_factory.mktemp("fsdp"), fsdp_worker.CHECKS)


@pytest.mark.parametrize("name", [name for name in fsdp_worker.CHECKS if name.startswith("check_")])
def test_two_processes(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == ""


def test_a_failure_on_one_process_is_seen(outcomes: dict[str, str]) -> None:
    assert "the second process fails" in outcomes["control_a_failure_on_one_process_is_seen"]


class FullyShardedDataParallel(nn.Module):
    """A class with the name of torch's own, whose import takes longer than all of tdfx."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 4)


def test_the_former_fsdp_is_refused() -> None:
    with pytest.raises(tdfx.ModelError, match=r"Its part '0' is wrapped in .*fsdp\.fully_shard instead, or rewrite"):
        tdfx.plan(nn.Sequential(FullyShardedDataParallel()))


def test_tdfx_does_not_import_what_fsdp_needs() -> None:
    code = "import sys, torch; before = set(sys.modules); import tdfx; tdfx.rewrite; print(*set(sys.modules) - before)"
    environment = {**os.environ, "PYTHONPATH": str(Path(tdfx.__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    imported = done.stdout.split()
    assert "tdfx.layers.placement" in imported
    allowed = {"tdfx.distributed", "tdfx.distributed.processes"}
    distributed = {name for name in imported if name.startswith(("tdfx.distributed", "torch.distributed.fsdp"))}
    assert distributed - allowed == set()
