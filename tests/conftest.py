"""What all tests share: one thread, a seed, an order, and an exported network for the tests of the ONNX proof."""

from __future__ import annotations

import atexit
import copy
import functools
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

# Tests run in several processes, and some start more. OpenMP reads this once, when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Layer times from tests must not enter the user's cache. The processes that tests start inherit this.
os.environ["TDFX_CACHE_DIR"] = tempfile.mkdtemp(prefix="tdfx-tests-")

import onnx
import pytest
import torch
from onnx import ModelProto
from onnx_models import Net
from torch import Tensor

from tdfx.cost.timing import take_turns
from tdfx.onnx_proof.torch_to_onnx import export_module
from tdfx.passes.planning import step_time, worthwhile

atexit.register(shutil.rmtree, os.environ["TDFX_CACHE_DIR"], ignore_errors=True)
# Small tensors gain nothing from threads, and tests would wait for each other's threads; doctests too.
torch.set_num_threads(1)


def _build_tables_once() -> None:
    """Let torch build two tables of operators once and not in each of hundreds of exports, half of whose time it takes.

    Both are private: with a torch that has them elsewhere the tests are only slower.
    """
    from torch._export import utils
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    build = functools.cache(ONNXRegistry.from_torchlib)

    def copied(cls: type[ONNXRegistry], *arguments: Any, **options: Any) -> ONNXRegistry:
        registry = copy.copy(build(*arguments, **options))
        registry.functions = {operator: list(functions) for operator, functions in registry.functions.items()}
        return registry

    collect = utils._collect_all_valid_cia_ops_for_namespace
    ONNXRegistry.from_torchlib = classmethod(copied)  # type: ignore[assignment]
    utils._collect_all_valid_cia_ops_for_namespace = functools.cache(collect)


with suppress(ImportError, AttributeError):
    _build_tables_once()

LONGEST = (
    "test_trainers_processes",
    "test_transformers",
    "test_trainers_others",
    "test_fsdp",
    "test_zoo",
    "test_functional",
    "test_readme",
    "test_proof",
    "test_verify",
    "test_proof_forms",
    "test_demo",
    "test_freeze_processes",
    "test_scheme_api",
    "test_contract",
    "test_laws",
    "test_report",
    "test_recipe",
)
"""The test files that take longest, in descending order."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files, so that at the end no single process works on one of them alone."""
    order = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _idle_machine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let plans not depend on how busy the machine is, those of a module's fixtures too, but in the tests of just that."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != "test_trust":
            patch.setattr(worthwhile, "_MOST_CARE", 0.0)
            patch.setattr(step_time, "_MOST_DOUBT", math.inf)
        yield


@pytest.fixture
def same_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the clock of all timing after a test, which a tool may set."""
    monkeypatch.setattr(take_turns, "__kwdefaults__", dict(take_turns.__kwdefaults__ or {}))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def net_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export ``Net`` with seed 0 once, for all tests that need a file or a proto."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("verify") / "net.onnx"
    export_module(Net(), (torch.randn(2, 3, 8, 8),), path)
    return path


@pytest.fixture
def proto(net_path: Path) -> ModelProto:
    return onnx.load(net_path)
