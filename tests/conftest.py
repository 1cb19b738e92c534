"""What every test shares: one thread, a seed and an order; and one exported network for the tests of the ONNX proof."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Tests run in several processes, some of which start more. OpenMP reads this once, when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What tests measure is of no use to the user's own runs. The processes that tests start inherit it.
os.environ["TDFX_CACHE_DIR"] = tempfile.mkdtemp(prefix="tdfx-tests-")

import onnx
import pytest
import torch
from onnx import ModelProto
from onnx_models import Net
from torch import Tensor

from tdfx.cost.timing import take_turns
from tdfx.onnx_proof.torch_to_onnx import export_module

atexit.register(shutil.rmtree, os.environ["TDFX_CACHE_DIR"], ignore_errors=True)
# Small tensors gain nothing from threads, and tests must not wait for one another's; this holds for doctests too.
torch.set_num_threads(1)

LONGEST = (
    "test_zoo",
    "test_fsdp",
    "test_demo",
    "test_readme",
    "test_kill",
    "test_laws",
    "test_proof",
    "test_ddp",
    "test_verify",
    "test_trainers_processes",
    "test_transformers",
    "test_lightning",
)
"""The files that take longest, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that at the end no process is left alone with one of them."""
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def same_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a tool sets for all timing last no longer than a test."""
    monkeypatch.setattr(take_turns, "__kwdefaults__", dict(take_turns.__kwdefaults__ or {}))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def net_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One export of ``Net``, with the weights of seed 0, for all tests that need a file or a proto."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("verify") / "net.onnx"
    export_module(Net(), (torch.randn(2, 3, 8, 8),), path)
    return path


@pytest.fixture
def proto(net_path: Path) -> ModelProto:
    return onnx.load(net_path)
