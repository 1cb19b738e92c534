"""tdfx.export: the file computes what the model does, and a failure leaves the previous file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx.checkpoint import atomic
from tdfx.errors import ExportError, InputError, ModelError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A model with two inputs and two outputs that differs between train and eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Dropout()
        self.fc = nn.Linear(16, 12)

    def forward(self, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = self.drop(torch.relu(self.norm(self.conv(image))))
        return {"logits": self.fc(y.mean((2, 3))) * scale, "features": y}


INPUTS = {"image": X, "scale": torch.full((2, 1), 3.0)}
AXES = {"image": {0: "batch", 2: "height"}, "scale": {0: "batch"}}


def factorized() -> nn.Module:
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, cost=tdfx.Modelled())
    return tdfx.rewrite(Net(), policy)


def run(path: Path, **inputs: Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return outputs


def test_a_factorized_model_is_exported_with_dynamic_axes(tmp_path: Path) -> None:
    model = factorized().train()
    path = tmp_path / "net.onnx"
    names = ["logits", "features"]
    report = tdfx.export(model, path, example_inputs=INPUTS, dynamic_axes=AXES, output_names=names)
    assert model.training
    assert report.files == (path,)
    assert report.size == path.stat().st_size
    assert report.chains == 2
    assert report.max_error <= report.tolerance < 1e-4
    assert report.inputs == ("image: float[batch, 3, height, 8]", "scale: float[batch, 1]")
    assert report.outputs == ("logits: float[batch, 12]", "features: float[batch, 16, height, 8]")
    assert str(report).startswith(
        f"{path}: {report.nodes} nodes, 0.0 MB, 2 site(s) factorized\n  image: float[batch, 3"
    )
    image, scale = torch.randn(5, 3, 6, 8), torch.randn(5, 1)
    with torch.no_grad():
        expected = model.eval()(image, scale)
    for output, tensor in zip(run(path, image=image, scale=scale), expected.values(), strict=True):
        atol = report.tolerance * float(tensor.abs().max())
        np.testing.assert_allclose(output, tensor.numpy(), rtol=0, atol=atol)


def test_the_file_can_be_compared_with_the_original(tmp_path: Path) -> None:
    model = factorized()
    original = tdfx.merge(model)
    tdfx.export(model, tmp_path / "net.onnx", example_inputs=INPUTS)
    report = tdfx.verify(tmp_path / "net.onnx", original, INPUTS)
    assert report.ok, report
    assert report.numbers_match
    assert len(report.contracted) == 2


def test_an_optimized_export_is_another_graph_with_the_same_numbers(tmp_path: Path) -> None:
    model = Net()
    plain = tdfx.export(model, tmp_path / "plain.onnx", example_inputs=INPUTS)
    optimized = tdfx.export(model, tmp_path / "optimized.onnx", example_inputs=INPUTS, optimize=True)
    assert optimized.nodes < plain.nodes
    report = tdfx.verify(tmp_path / "optimized.onnx", tmp_path / "plain.onnx", INPUTS)
    assert report.numbers_match


def test_large_weights_go_to_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tdfx.export.__globals__, "SINGLE_FILE_BYTES", 1000)
    model, path = nn.Linear(64, 32), tmp_path / "net.onnx"
    x = torch.randn(2, 64)
    first = tdfx.export(model, path, example_inputs=x)
    assert sorted(tmp_path.iterdir()) == sorted(first.files)
    assert len(first.files) == 2
    assert first.files[1].stat().st_size >= 4 * 64 * 32 > path.stat().st_size
    assert tdfx.verify(path, model, x).ok
    (tmp_path / "net.onnx.mine.data").touch()
    second = tdfx.export(nn.Linear(64, 32), path, example_inputs=x)
    assert second.files[1] != first.files[1]
    assert sorted(tmp_path.iterdir()) == sorted([*second.files, tmp_path / "net.onnx.mine.data"])
    assert not tdfx.verify(path, model, x).ok


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "folder" / "net.onnx")
    tdfx.export(nn.ReLU(), tmp_path / "link.onnx", example_inputs=X)
    assert (tmp_path / "link.onnx").is_symlink()
    assert onnx.load(tmp_path / "folder" / "net.onnx").graph.node[0].op_type == "Relu"


def test_a_failed_export_of_large_weights_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tdfx.export.__globals__, "SINGLE_FILE_BYTES", 0)
    with pytest.raises(ExportError, match="computes something else in ONNX Runtime"):
        tdfx.export(Moody(), tmp_path / "net.onnx", example_inputs=X)
    assert list(tmp_path.iterdir()) == []


def test_an_export_keeps_permissions_and_removes_the_leftovers_of_dead_processes(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.touch(0o640)
    with atomic.open_temporary(path) as file:
        file.write(b"half of it")
    assert len(list(tmp_path.iterdir())) == 2
    tdfx.export(nn.ReLU(), path, example_inputs=X)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o640


class Moody(nn.Module):
    """A model that computes something else when it is not being exported."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return x + 1
        return x + 2


class Fixed(nn.Module):
    """A model that fixes the size of its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(2, 1, 1, 1)


class Picky(nn.Module):
    """A model that refuses other sizes, but not while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and x.shape[0] != 2:
            raise ValueError("two at a time")
        return x * 2


class Nameless(nn.Module):
    """A model that does not name its arguments."""

    def forward(self, *args: Tensor) -> Tensor:
        return args[0] * 2


class NotANumber(nn.Module):
    """A model that outputs NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(-x * x - 1)


REFUSED: dict[str, tuple[nn.Module, dict[str, Any], type[Exception], str]] = {
    "inputs": (
        nn.Conv2d(4, 1, 1),
        {},
        InputError,
        r"Conv2d does not accept the example inputs \(float32\[2, 3, 8, 8\]\)",
    ),
    "no tensors": (nn.ReLU(), {"example_inputs": (3,)}, InputError, r"must be a tuple of tensors, not \(int\)"),
    "no input": (nn.ReLU(), {"dynamic_axes": {"inptu": {0: "n"}}}, InputError, r"'inptu', .*Nearest: 'input'\.$"),
    "no axis": (nn.ReLU(), {"dynamic_axes": {"input": {4: "n"}}}, InputError, r"axis 4 of 'input', .* the 4 axes of"),
    "bad name": (nn.ReLU(), {"dynamic_axes": {"input": {0: "a b"}}}, InputError, r"axis 0 of 'input' 'a b': give it a"),
    "nameless": (
        Nameless(),
        {"dynamic_axes": {"x": {0: "n"}}},
        InputError,
        r"Nameless\.forward, which does not name its",
    ),
    "names": (nn.ReLU(), {"output_names": "y"}, InputError, r"^output_names='y' is not a list of names"),
    "twice": (nn.ReLU(), {"output_names": ["y", "y"]}, InputError, r"has a name twice"),
    "tolerance": (nn.ReLU(), {"tolerance": -1.0}, InputError, r"^tolerance=-1\.0 is not a relative error"),
    "fixed": (Fixed(), {"dynamic_axes": {"x": {0: "n"}}}, ExportError, r"(Fixed|dynamic).*"),
    "picky": (
        Picky(),
        {"dynamic_axes": {"x": {0: "n"}}},
        ExportError,
        r"does not run with one more.*two at a time\. Le",
    ),
    "moody": (
        Moody(),
        {},
        ExportError,
        r"The exported Moody computes something else in ONNX Runtime: .*Nothing was writ",
    ),
    "nan": (
        NotANumber(),
        {},
        ExportError,
        r"NotANumber cannot be proved: output '\w+' holds NaN: 384 in the file, 384 in",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_failed_export_leaves_the_file_as_it_was(name: str, tmp_path: Path) -> None:
    model, options, kind, text = REFUSED[name]
    path = tmp_path / "net.onnx"
    path.write_bytes(b"what was there")
    with pytest.raises(kind, match=text):
        tdfx.export(model, path, **{"example_inputs": X, **options})
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_anything_but_a_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^model is a dict, not a torch\.nn\.Module\. Pass the module to export"):
        tdfx.export({}, tmp_path / "net.onnx", example_inputs=X)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["", "no/net.onnx"])
def test_a_path_that_cannot_be_written_is_refused_before_the_work(where: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^Cannot write '.*'\. Name a file in a folder that exists and that you may"):
        tdfx.export(nn.ReLU(), tmp_path / where, example_inputs=X)


def test_a_full_disk_is_reported_and_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"what was there")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ExportError, match=r"could not be written: .*No space left on device\. What was there before is u"
    ):
        tdfx.export(nn.ReLU(), path, example_inputs=X)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_a_compiled_model_is_exported_without_its_wrapper(tmp_path: Path) -> None:
    compiled = torch.compile(nn.Linear(8, 4))
    assert isinstance(compiled, nn.Module)
    tdfx.export(compiled, tmp_path / "net.onnx", example_inputs=torch.ones(1, 8))
    assert {tensor.name for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer} == {"weight", "bias"}
