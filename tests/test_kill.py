"""A run that is killed at any moment and started again ends with the same bits as one that nobody disturbed."""

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
    """Start one run in a process of its own and return its exit status."""
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
    assert process.wait(timeout=30) == 0
    stdout.close()


def end_of(folder: Path) -> dict[str, Any]:
    return tdfx.read(folder / "run.tdfx")


def same(one: Any, other: Any) -> bool:
    """Return True if two records agree, every tensor in its bits and its layout."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


# Ten kills for each optimizer: seven at named places, the n-th time that they are reached, and three after a delay.
# A save comes after every step; the rewrites and the optimizer's changes are reached twice, at the switch and the lowering.
COUNTS = {"inside the rewrite": (1, 2), "inside the optimizer": (1, 2)}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, run: Run, optimizer: str) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    begin = time.perf_counter()
    assert run(undisturbed, optimizer) == 0
    length = time.perf_counter() - begin
    expected = end_of(undisturbed)
    assert expected["extra"]["step"] == STEPS
    assert [site["ranks"] for site in expected["rewrites"][0]["sites"]]
    draw = random.Random(optimizer)
    kills: list[dict[str, Any]] = [{"delay": draw.uniform(0.1, 0.9) * length} for _ in range(3)]
    for place in PLACES:
        counts = COUNTS.get(place, range(SWITCH - 1, LOWER + 3))
        kills.append({"place": place, "count": draw.choice(counts)})
    assert len(kills) == 10
    steps = []
    for number, kill in enumerate(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        status = run(folder, optimizer, **kill)
        assert status == -signal.SIGKILL or "delay" in kill, kill
        if (folder / "run.tdfx").exists():
            steps.append(end_of(folder)["extra"]["step"])
        assert run(folder, optimizer) == 0
        assert same(end_of(folder), expected), kill
        assert [one.name for one in folder.iterdir()] == ["run.tdfx"], f"{kill} left something behind"
    assert len(set(steps) - {0, STEPS}) > 1, "runs were killed at several steps"


def test_a_run_that_forgets_its_momentum_ends_elsewhere(tmp_path: Path, run: Run) -> None:
    expected, folder = tmp_path / "undisturbed", tmp_path / "forgetful"
    expected.mkdir()
    folder.mkdir()
    assert run(expected, "sgd") == 0
    assert run(folder, "sgd", place="before the rename", count=LOWER) == -signal.SIGKILL
    assert run(folder, "sgd", forget=True) == 0
    assert not same(end_of(folder)["tensors"], end_of(expected)["tensors"])
