"""What every test shares: one thread and a seed; and one exported network for the tests of the ONNX proof."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import ModelProto
from onnx_models import Net
from torch import Tensor

from tdfx.onnx_proof.export import export_module


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Small tensors gain nothing from threads, and tests must not wait for one another's.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
