"""``tdfx verify`` on the command line: files, models, inputs from a file, and one message for each error."""

from __future__ import annotations

import contextlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx_models import node, small

import tdfx
from tdfx.cli import main
from tdfx.errors import TdfxError
from tdfx.onnx_proof.verify import verify

OK, FAILED, STOPPED = 0, 1, 2
MODELS = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, slope=0.1):
        super().__init__(nn.Linear(4, 8), nn.LeakyReLU(slope), nn.Linear(8, 3))

def build(): return Net()
def other(): return Net(0.2)
def deaf(): return nn.Sequential(nn.Dropout(), Branch())

class Branch(nn.Module):
    def forward(self, x): return x if bool(x.sum() > 0) else -x

class Pair(nn.Module):
    def forward(self, left, right): return left - right
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "duo.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "duo", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["verify", *arguments])


def test_axes_are_those_of_an_exported_file() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LeakyReLU(0.1), torch.nn.Linear(8, 3))
    report = tdfx.export(model, "net.onnx", example_inputs=(torch.rand(2, 4),), dynamic_axes={"input": {0: "batch"}})
    assert "input: float[batch, 4] -> " in str(report)
    torch.save(model.state_dict(), "net.pt")
    for sides in (("net.onnx", "duo:build"), ("duo:build", "net.onnx")):
        assert "same interface" in output_of(OK, *sides, "--input", "2,4", "--weights", "net.pt")
    assert "the structures differ" in output_of(
        FAILED, "net.onnx", "duo:other", "--input", "2,4", "--weights", "net.pt"
    )


def output_of(code: int, *arguments: str) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (code, ""), result.output
    return result.stdout


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (STOPPED, "")
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


def relu_file(path: str, op: str = "Relu") -> str:
    onnx.save(small([node(op, "x", "y")], ["y"]), path)
    return path


def test_a_model_named_in_two_ways_is_the_same() -> None:
    text = output_of(OK, "duo:build", "duo.py:build", "--input", "2,4")
    assert text.startswith(
        "verified\n  same structure (3 nodes)\n  same interface\n  same numbers (largest relative error 0"
    )


def test_a_changed_attribute_is_named_and_drawn() -> None:
    text = output_of(FAILED, "duo:build", "duo:other", "--input", "2,4", "--json", "report.json")
    assert "the structures differ: node 'node_leaky_relu' (LeakyRelu) has alpha 0.1" in text
    assert "same interface" in text
    assert "the numbers differ" in text
    assert "▶ 'node_leaky_relu' (LeakyRelu)" in text
    assert "╭ 0 ─ 'node_linear' (Gemm)" in text
    assert "╰▷ 'node_linear_1' (Gemm), argument 0" in text
    report = json.loads(Path("report.json").read_text())
    assert (report["structure_matches"], report["interface_matches"], report["numbers_match"]) == (False, True, False)
    assert report["place"].splitlines()[0].split("  ")[0] == "in the model"


def test_one_weights_file_is_for_both_models_and_two_are_for_one_each() -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save(
            torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).state_dict(),
            f"{seed}.pt",
        )
    models = ("duo:build", "duo:build", "--input", "2,4")
    assert output_of(OK, *models, "--weights", "1.pt") == output_of(OK, *models, "--weights", "2.pt")
    assert "first stored tensor that differs is '0.weight': 32 of its 32" in output_of(
        FAILED, *models, "--weights", "1.pt", "--weights", "2.pt"
    )


def test_inputs_from_a_file_are_passed_by_name_or_in_order() -> None:
    left, right = np.ones((2, 3), np.float32), np.full((2, 3), 3, np.float32)
    np.savez("named.npz", right=right, left=left)
    np.savez("plain.npz", left, right)
    for name in ("named", "plain"):
        assert "on given inputs" in output_of(OK, "duo:Pair", "duo:Pair", "--inputs", f"{name}.npz")
    onnx.save(small([node("Sqrt", "x", "y")], ["y"]), "root.onnx")
    assert "holds NaN" in output_of(FAILED, "root.onnx", "root.onnx")  # half of the random inputs are negative
    np.savez("positive.npz", x=np.ones((5, 4), np.float32))
    assert "same numbers" in output_of(OK, "root.onnx", "root.onnx", "--inputs", "positive.npz")


def test_a_tolerance_can_be_given() -> None:
    models = ("duo:build", "duo:build", "--input", "2,4", "--tolerance")
    assert "tolerance 0.0e+00" in output_of(OK, *models, "0")
    assert "tolerance=-1.0 is not a relative error" in refused(*models, "-1")


def test_a_file_and_a_model_are_compared() -> None:
    torch.manual_seed(0)
    relu_file("relu.onnx")
    text = output_of(FAILED, "relu.onnx", "duo:build", "--input", "2,4")
    assert "the structures differ: " in text


REFUSED = {
    "missing file": (("missing.onnx", "relu.onnx"), "'missing.onnx' is not a file: give the path of an .onnx file"),
    "no onnx": (("relu.onnx", "text.onnx"), "'text.onnx' cannot be read as ONNX: "),
    "not onnx at all": (("duo.py", "relu.onnx"), "'duo.py' cannot be read as ONNX: "),
    "empty": (("empty.onnx", "relu.onnx"), "'empty.onnx' holds no ONNX graph"),
    "cut off": (("cut.onnx", "relu.onnx"), "'cut.onnx' cannot be read as ONNX: "),
    "folder": (("folder.onnx", "relu.onnx"), "'folder.onnx' is not a file"),
    "no name": (
        ("nothing", "relu.onnx"),
        "'nothing' is not the path of an .onnx file, and it names no model: it lacks a part",
    ),
    "no model": (("duo:built", "duo:build", "--input", "2,4"), "there is no 'built' in it. Nearest: 'build'"),
    "no torchvision": (("torchvision:resnet19", "relu.onnx"), "torchvision has no model 'resnet19'"),
    "no input": (
        ("duo:build", "duo:build"),
        "example_inputs is missing: a module is exported by running it on example",
    ),
    "no shape": (("duo:build", "duo:build", "--input", "2;4"), "--input '2;4' is not a shape"),
    "misfit": (
        ("duo:build", "duo:build", "--input", "2,5"),
        "Net does not accept the example inputs (float32[2, 5]): Run",
    ),
    "two inputs": (
        ("duo:build", "duo:build", "--input", "2,4", "--input", "1"),
        "Net does not accept the example inputs",
    ),
    "misfit of file": (
        ("relu.onnx", "relu.onnx", "--input", "2,5"),
        "the example input for 'x' is float[2, 5], but the gr",
    ),
    "too many": (
        ("relu.onnx", "relu.onnx", "--input", "2,4", "--input", "1"),
        "holds 2 tensor(s), but the graph takes 1",
    ),
    "both": (
        ("relu.onnx", "relu.onnx", "--input", "2,4", "--inputs", "good.npz"),
        "--input and --inputs both say what",
    ),
    "no npz": (
        ("relu.onnx", "relu.onnx", "--inputs", "missing.npz"),
        "The inputs 'missing.npz' could not be read: FileNotFo",
    ),
    "bad npz": (("relu.onnx", "relu.onnx", "--inputs", "text.onnx"), "The inputs 'text.onnx' could not be read: "),
    "npy": (("relu.onnx", "relu.onnx", "--inputs", "single.npy"), "The inputs 'single.npy' could not be read: "),
    "pickled": (
        ("relu.onnx", "relu.onnx", "--inputs", "objects.npz"),
        "The inputs 'objects.npz' could not be read: ValueEr",
    ),
    "words": (("relu.onnx", "relu.onnx", "--inputs", "words.npz"), "are not arrays of numbers: 'x' is of dtype <U1"),
    "no arrays": (
        ("relu.onnx", "relu.onnx", "--inputs", "none.npz"),
        "are not arrays of numbers: the file holds no array",
    ),
    "other names": (
        ("relu.onnx", "relu.onnx", "--inputs", "good.npz"),
        "example_inputs has no 'x', only 'z'; the graph take",
    ),
    "weights of files": (
        ("relu.onnx", "relu.onnx", "--weights", "w.pt"),
        "There are 1 --weights for 0 model(s): an ONNX file",
    ),
    "three weights": (
        ("duo:build", "duo:build", "--input", "2,4", *("--weights", "w.pt") * 3),
        "There are 3 --weights for 2 model(s)",
    ),
    "no weights": (
        ("duo:build", "duo:build", "--input", "2,4", "--weights", "w.pt"),
        "The weights 'w.pt' could not be read",
    ),
    "no export": (("duo:deaf", "duo:deaf", "--input", "2,4"), "torch.onnx cannot export Sequential: "),
    "no folder": (("relu.onnx", "relu.onnx", "--json", "no/report.json"), "Cannot write 'no/report.json'"),
    "metadata": (("damaged.onnx", "relu.onnx"), "The ONNX file's metadata 'tdfx.chains' is damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_error_is_one_message(name: str) -> None:
    relu_file("relu.onnx")
    Path("text.onnx").write_text("this is no model, as every reader of it can tell\n")
    Path("empty.onnx").touch()
    Path("cut.onnx").write_bytes(Path("relu.onnx").read_bytes()[:-7])
    Path("folder.onnx").mkdir()
    damaged = onnx.load("relu.onnx")
    damaged.metadata_props.add(key="tdfx.chains", value="[1")
    onnx.save(damaged, "damaged.onnx")
    np.savez("good.npz", z=np.ones((2, 4), np.float32))
    np.savez("none.npz")
    np.savez("words.npz", x=np.array(["a"]))
    np.savez("objects.npz", x=np.array([None]))
    np.save("single.npy", np.ones(3))
    arguments, message = REFUSED[name]
    assert message in refused(*arguments)


def test_debug_shows_the_exception() -> None:
    result = CliRunner().invoke(main, ["--debug", "verify", "missing.onnx", "missing.onnx"])
    assert isinstance(result.exception, TdfxError)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_files_never_end_in_a_traceback(seed: int) -> None:
    """Change some bytes of a valid file thirty times: verify returns a report or raises a TdfxError."""
    generator = random.Random(seed)
    clean = small(
        [node("Conv", "z w", "a", pads=[1, 1]), node("Relu", "a", "y")], ["y"], w=np.ones((2, 4, 3), np.float32)
    )
    clean.graph.input[0].name = "z"
    content = clean.SerializeToString()
    Path("clean.onnx").write_bytes(content)
    for _ in range(30):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        Path("damaged.onnx").write_bytes(damaged[: generator.choice([len(damaged), generator.randrange(len(damaged))])])
        with contextlib.suppress(TdfxError):
            str(verify("damaged.onnx", "clean.onnx", (torch.ones(1, 4),)))
