"""A run that is killed at any moment and started again ends with the same bits as an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_worker import LOWER, PLACES, STEPS, SWITCH
from torch import Tensor

import tdfx

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked, to import torch once")

Run = Callable[..., int]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Return a function that starts a run in a new process and returns its exit status."""
    path = os.pathsep.join([str(Path(tdfx.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("kill_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def start(folder: Path, optimizer: str, **how: Any) -> int:
        stdin.write(json.dumps({"folder": str(folder), "optimizer": optimizer, **how}) + "\n")
        stdin.flush()
        return int(stdout.readline())

    yield start
    stdin.close()
    assert process.wait(timeout=300) == 0
    stdout.close()


def final_record(folder: Path) -> dict[str, Any]:
    return tdfx.read(folder / "run.tdfx")


def same(first: Any, second: Any) -> bool:
    """Return whether two records agree, each tensor in its bits and its layout."""
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and first.stride() == second.stride() and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(*pair) for pair in zip(first, second, strict=True))
    return bool(first == second)


# Eight kills: seven at named places when they are reached for the n-th time, and one after a delay.
# Every step saves; the rewrite and the change of the optimizer are reached twice, at the switch and at the lowering.
COUNTS = {"inside the rewrite": (1, 2), "inside the optimizer": (1, 2)}


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, run: Run) -> None:
    optimizer = "adamw"
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    begin = time.perf_counter()
    assert run(undisturbed, optimizer) == 0
    length = time.perf_counter() - begin
    expected = final_record(undisturbed)
    assert expected["extra"]["step"] == STEPS
    assert [site["ranks"] for site in expected["rewrites"][0]["sites"]]
    draw = random.Random(optimizer)
    kills: list[dict[str, Any]] = [{"delay": draw.uniform(0.1, 0.9) * length}]
    for place in PLACES:
        counts = COUNTS.get(place, range(SWITCH - 1, LOWER + 3))
        kills.append({"place": place, "count": draw.choice(counts)})
    steps = []
    for number, kill in enumerate(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        status = run(folder, optimizer, **kill)
        assert status == -signal.SIGKILL or "delay" in kill, kill
        if (folder / "run.tdfx").exists():
            steps.append(final_record(folder)["extra"]["step"])
        assert run(folder, optimizer) == 0
        assert same(final_record(folder), expected), kill
        assert [path.name for path in folder.iterdir()] == ["run.tdfx"], f"{kill} left something behind"
    assert len(set(steps) - {0, STEPS}) > 1, "runs were killed at several steps"


def test_a_run_that_forgets_its_momentum_ends_elsewhere(tmp_path: Path, run: Run) -> None:
    expected, folder = tmp_path / "undisturbed", tmp_path / "forgetful"
    expected.mkdir()
    folder.mkdir()
    assert run(expected, "sgd") == 0
    assert run(folder, "sgd", place="before the rename", count=LOWER) == -signal.SIGKILL
    assert run(folder, "sgd", forget=True) == 0
    assert not same(final_record(folder)["tensors"], final_record(expected)["tensors"])
