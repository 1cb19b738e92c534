"""Checks that two processes make together: how they are started, and how what went wrong is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tdfx

SECONDS = 480
"""What the processes may take together; some 30 s are usual on cores that nothing else uses."""


WAIT = 20
"""Seconds after which a process that waits for another in vain gives up."""


def start(script: Path, folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Run a script on two processes and return what went wrong in each of its checks, "" for nothing."""
    begin = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # The processes shall test the tdfx that this one does.
    environment = {**os.environ, "PYTHONPATH": str(Path(tdfx.__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*begin, str(script), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        env=environment,
    )
    written = folder / "outcomes.json"
    found: dict[str, str] = json.loads(written.read_text(encoding="utf-8")) if written.exists() else {}
    lost = f"the processes ended before this check was done:\n{done.stderr[-4000:]}"
    return {name: found.get(name, lost) for name in names}


@contextmanager
def refused_promptly(kind: type[Exception], own: str, *, rank: int = 1) -> Iterator[None]:
    """Hold one process to raise an error, and the other to raise one that names it and says the same, without a wait."""
    began = time.monotonic()
    told = f"Process {rank} could not go on, so nothing was changed on any process. It says: {kind.__name__}: "
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    assert own in text, text
    assert text.startswith(told) == (dist.get_rank() != rank), text
    assert time.monotonic() - began < WAIT / 2, "a process waited for another that had failed"


def run(folder: Path, prepare: Callable[[], tuple[Any, ...]], checks: Mapping[str, Callable[..., None]]) -> None:
    """Make all checks as one of the two processes, with what ``prepare`` returns as arguments, and write what came of it."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch.*")
    torch.set_num_threads(1)
    # Where the cores are busy with other tests, one process may be far behind the other.
    dist.init_process_group("gloo", timeout=timedelta(seconds=WAIT))
    arguments = prepare()
    outcomes = {}
    for name, check in checks.items():
        try:
            check(*arguments)
            mine = ""
        except Exception:  # it is told to pytest
            mine = traceback.format_exc()
        both: list[Any] = [None, None]
        dist.all_gather_object(both, mine)
        outcomes[name] = "\n".join(one for one in both if one)
        if dist.get_rank() == 0:
            (folder / "outcomes.json").write_text(json.dumps(outcomes), encoding="utf-8")
    dist.destroy_process_group()
