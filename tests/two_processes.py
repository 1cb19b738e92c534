"""Checks that two processes run together: starting them, and collecting what failed."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo  # noqa: F401  # optimizers import it, which would take two seconds in both processes
import torch.distributed as dist

import tdfx

SECONDS = 480
"""Time limit for all checks of a script; some 30 s are usual on idle cores."""

WAIT = 60
"""Seconds after which a process gives up waiting for another, which may be far behind on busy cores."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(script: Path, folder: Path, names: Iterable[str], *, torchrun: bool = False) -> dict[str, str]:
    """Run a script on two processes and return the tracebacks of each of its checks; "" for a check that passed.

    Args:
        script: What is run; it calls ``run``.
        folder: Where it writes.
        names: The names of its checks.
        torchrun: Whether torchrun starts both processes, as trainers expect. Else ``run`` forks the second process, so that
            torch, which takes most of the time of small checks to import, is imported once and not three times.
    """
    # The processes have to test the same tdfx as this one.
    environment = {**os.environ, "PYTHONPATH": str(Path(tdfx.__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *(TORCHRUN if torchrun else ()), str(script), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        env=environment,
    )
    path = folder / "outcomes.json"
    outcomes: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = f"the processes ended before this check was done:\n{done.stderr[-4000:]}"
    return {name: outcomes.get(name, missing) for name in names}


def refused(kind: type[Exception], text: str) -> AbstractContextManager[Any]:
    """Expect an error that says this."""
    return pytest.raises(kind, match=re.escape(text))


@contextmanager
def refused_promptly(kind: type[Exception], message: str, *, rank: int = 1) -> Iterator[None]:
    """Expect an error of one process on both, without a wait; the other process names it and repeats its message.

    Args:
        kind: The class of the error.
        message: What the error says.
        rank: The process that cannot go on by itself.
    """
    started = time.monotonic()
    prefix = f"Process {rank} could not go on, so nothing was changed on any process. It says: {kind.__name__}: "
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    assert message in text, text
    assert text.startswith(prefix) == (dist.get_rank() != rank), text
    assert time.monotonic() - started < WAIT / 2, "a process waited for another that had failed"


def run(folder: Path, prepare: Callable[[], tuple[Any, ...]], checks: Mapping[str, Callable[..., None]]) -> None:
    """Run all checks on two processes, with what ``prepare`` returns as arguments, and write their outcomes."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=WAIT)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=timeout)
        _run_here(folder, prepare, checks)
        return

    def run_as(rank: int) -> None:
        dist.init_process_group("gloo", f"file://{folder / 'store'}", timeout=timeout, rank=rank, world_size=2)
        _run_here(folder, prepare, checks)

    second = multiprocessing.get_context("fork").Process(target=run_as, args=(1,), daemon=True)
    second.start()
    run_as(0)
    second.join()


def _run_here(folder: Path, prepare: Callable[[], tuple[Any, ...]], checks: Mapping[str, Callable[..., None]]) -> None:
    """Run all checks as one of the two processes of the process group."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch.*")
    arguments = prepare()
    outcomes = {}
    for name, check in checks.items():
        try:
            check(*arguments)
            failure = ""
        except Exception:  # pytest reports it
            failure = traceback.format_exc()
        outcomes[name] = "\n".join(filter(None, on_both(failure)))
        if dist.get_rank() == 0:
            (folder / "outcomes.json").write_text(json.dumps(outcomes), encoding="utf-8")
    dist.destroy_process_group()


def on_both(value: Any) -> list[Any]:
    """Return what the two processes have, in the order of their ranks."""
    values: list[Any] = [None, None]
    dist.all_gather_object(values, value)
    return values


def checks_of(*modules: ModuleType) -> dict[str, Callable[..., None]]:
    """Return the functions of some modules whose names start with ``check_`` or ``control_``."""
    return {
        name: function
        for module in modules
        for name, function in vars(module).items()
        if name.startswith(("check_", "control_"))
    }
