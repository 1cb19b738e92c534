"""The training recipe under torchrun, on two processes that communicate through gloo."""

from __future__ import annotations

from pathlib import Path

import recipe_worker
import two_processes
from checkout import needs


@needs("train.py")
def test_two_processes_train_switch_stop_and_resume(tmp_path: Path) -> None:
    outcomes = two_processes.start(Path(recipe_worker.__file__), tmp_path, ["run"], torchrun=True)
    assert outcomes["run"] == ""
