"""The command line: its output, its errors, and the exit code of each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torchvision
from click.testing import CliRunner, Result
from onnx import TensorProto, helper
from torch import nn

import tdfx
from tdfx.cli import main
from tdfx.cli.output import say
from tdfx.errors import ModelReferenceError

OK, FAILED, STOPPED = 0, 1, 2
MODEL = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, bias=False))

def build():
    torch.manual_seed(0)
    return Net()

def sized(width): return nn.Linear(width, width)
def broken(): raise OSError("no disk")
def text(): return "a model"
number = 3
ready = Net()
"""


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder with a file nets.py that can also be imported."""
    (tmp_path / "nets.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    yield
    sys.modules.pop("nets", None)  # tools/nets.py has the same name


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def shown(*arguments: str) -> str:
    """Return the output of a command that succeeds."""
    result = run(*arguments)
    assert result.exit_code == OK, result.output
    assert result.stderr == ""
    return result.stdout


def refused(*arguments: str) -> str:
    """Return the message of a command that fails."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == STOPPED
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("Error: ")
    return result.stderr


def build() -> Any:
    namespace: dict[str, Any] = {"__name__": "nets"}
    exec(MODEL, namespace)
    return namespace["build"]()


def test_the_version_in_a_separate_process() -> None:
    paths = os.pathsep.join([str(Path(tdfx.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tdfx", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert (done.returncode, done.stdout, done.stderr) == (OK, f"tdfx, version {tdfx.__version__}\n", "")


def test_help_names_every_command() -> None:
    text = shown("--help")
    assert all(f"\n  {name} " in text for name in ("inspect", "demo", "verify"))


@pytest.mark.parametrize("command", ["", *main.commands])
def test_help_takes_less_than_a_second_and_no_torch(command: str) -> None:
    code = (
        f"import sys, time; sys.path.insert(0, {str(Path(tdfx.__file__).parents[1])!r}); from tdfx.cli import main\n"
        f"try: main([*{command.split()!r}, '--help'])\n"
        f"except SystemExit: print(time.process_time() < 1, *sys.modules, file=sys.stderr)"
    )

    def is_quick() -> bool:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "Usage:" in done.stdout
        quick, *modules = done.stderr.split()
        assert {"torch", "rich.console", "numpy", "pydantic"} & set(modules) == set()
        return quick == "True"

    assert any(is_quick() for _ in range(3)), "also on a busy machine one of three takes less"


def test_inspect_shows_the_sites_and_the_totals_of_a_torchvision_model() -> None:
    text = shown("inspect", "torchvision:resnet18", "--input", "1,3,64,64", "--policy", "ratio:0.25")
    lines = text.splitlines()
    convolutions = [
        name for name, module in torchvision.models.resnet18().named_modules() if isinstance(module, nn.Conv2d)
    ]
    assert [line.split()[0] for line in lines[1 : len(convolutions) + 2]] == [*convolutions, "fc"]
    assert any(line.startswith("ResNet: ") and "of 21 sites factorized" in line for line in lines)
    assert any(line.startswith("parameters 11.7M → ") for line in lines)
    assert any(line.startswith("FLOPs of the sites, forward ") for line in lines)


@pytest.mark.parametrize("reference", ["nets.py:build", "nets:build", "nets:Net", "nets.py:Net", "nets:ready"])
def test_every_form_of_reference_names_the_same_model(reference: str) -> None:
    text = shown("inspect", reference, "--policy", "ratio", "--min-gain", "0", "--exclude", "0")
    assert "Conv2d 32×16×3×3  tucker2" in text
    assert "Net: 1 of 2 sites factorized; kept: 1 excluded" in text


def test_json_is_the_plan() -> None:
    options = ("--input", "2,3,8,8", "--policy", "ratio:0.5", "--min-gain", "0", "--include", "2")
    shown("inspect", "nets.py:build", "--json", "plan.json", *options)
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0.0, include=("2",))
    expected = tdfx.plan(build(), policy, example_inputs=torch.zeros(2, 3, 8, 8))
    assert tdfx.Plan.from_json(Path("plan.json").read_text()) == expected
    assert expected["2"].factorized
    assert expected != tdfx.plan(build(), policy)


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_weights_are_loaded(key: str | None) -> None:
    state = build().state_dict()
    state["2.weight"] = torch.ones_like(state["2.weight"])  # of rank 1, so a quarter of the ranks is exact
    torch.save({key: state, "epoch": 3} if key else state, "weights.pt")
    options = ("inspect", "nets:build", "--policy", "ratio", "--min-gain", "0", "--json", "plan.json")
    shown(*options, "--weights", "weights.pt")
    loaded = tdfx.Plan.from_json(Path("plan.json").read_text())["2"].error
    shown(*options)
    untrained = tdfx.Plan.from_json(Path("plan.json").read_text())["2"].error
    assert loaded is not None
    assert untrained is not None
    assert loaded < 1e-6 < 0.1 < untrained


class Bomb:
    """An object whose pickle creates a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(Path("fired").absolute()), "w")


def test_weights_that_would_run_code_are_refused() -> None:
    torch.save({"0.weight": Bomb()}, "weights.pt")
    assert (
        "'weights.pt' could not be read: UnpicklingError: it holds more than tensors, and code in a file is not run"
        in refused("inspect", "nets:build", "--weights", "weights.pt")
    )
    assert not Path("fired").exists()
    torch.load("weights.pt", weights_only=False)["0.weight"].close()
    assert Path("fired").exists()


def test_weights_that_are_missing_damaged_or_of_another_model_are_refused() -> None:
    Path("damaged.pt").write_bytes(b"")
    torch.save(nn.Linear(3, 3).state_dict(), "other.pt")
    torch.save([1, 2], "list.pt")
    for name, part in {
        "missing.pt": "'missing.pt' could not be read: FileNotFoundError",
        "damaged.pt": "'damaged.pt' could not be read",
        "other.pt": "'other.pt' do not fit Net",
        "list.pt": "'list.pt' do not fit Net",
    }.items():
        assert f"The weights {part}" in refused("inspect", "nets:build", "--weights", name)


REFERENCES = {
    "resnet18": "'resnet18' does not name a model: write torchvision:resnet18.",
    "rsnet18:": "Did you mean torchvision:resnet18.? Write torchvision:resnet50, package",
    "nets.py": "'nets.py' does not name a model: add the function that builds the model, as in nets.py:build.",
    "networks": "'networks' does not name a model: it lacks a part before or after the colon. Write torchvision:resnet50",
    ":build": "':build' does not name a model",
    "nets:": "'nets:' does not name a model",
    "torchvision:resnet19": "torchvision has no model 'resnet19' among its [0-9]+. Nearest: 'resnet18'",
    "missing.py:build": "There is no file 'missing.py' to take a model from",
    "raises.py:build": "'raises.py' could not be run: ZeroDivisionError: division by zero",
    "syntax.py:build": "'syntax.py' could not be run: SyntaxError",
    "leaves.py:build": "'leaves.py' could not be run: SystemExit",
    "empty.py:build": r"there is no 'build' in it\. It defines nothing",
    "no.such.package:build": "'no.such.package' could not be imported: ModuleNotFoundError",
    "raises:build": "'raises' could not be imported: ZeroDivisionError",
    "nets:biuld": "'nets:biuld': there is no 'biuld' in it. Nearest: 'build'",
    "nets.py:biuld": "'nets.py:biuld': there is no 'biuld' in it. Nearest: 'build'",
    "nets:sized": "'nets:sized' could not be called without arguments: TypeError: .*'width'",
    "nets:broken": "'nets:broken' could not be called without arguments: OSError: no disk",
    "nets:text": "'nets:text' returned a str, not a torch.nn.Module",
    "nets:number": "'nets:number' is a int, not a function that builds a model",
}


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_bad_reference_is_refused(reference: str) -> None:
    Path("raises.py").write_text("1 / 0\n")
    Path("syntax.py").write_text("def\n")
    Path("leaves.py").write_text("raise SystemExit(0)\n")
    Path("empty.py").write_text("")
    with pytest.raises(ModelReferenceError, match=REFERENCES[reference]):
        raise ModelReferenceError(refused("inspect", reference).strip())


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_torchvision_models_are_built_without_a_download(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    assert "sites factorized" in shown("inspect", f"torchvision:{name}", "--policy", "ratio")


@pytest.mark.parametrize("shape", ["", "8;3", "8,3,", "-1,3,8,8", "8,3.5", "float33:8,3", "nn:8,3", ":8,3"])
def test_an_input_that_is_not_a_shape_is_refused(shape: str) -> None:
    assert f"--input {shape!r} is not a shape" in refused("inspect", "nets:build", "--input", shape)


@pytest.mark.parametrize("shape", ["1,3,99999999,99999999", "1,99999999999999999999999", "quint8:1,3,8,8"])
def test_an_input_that_cannot_be_made_is_refused(shape: str) -> None:
    assert f"--input {shape!r}" in refused("inspect", "nets:build", "--input", shape)


def test_an_input_that_the_model_rejects_is_refused() -> None:
    message = refused("inspect", "nets:build", "--input", "1,4,8,8")
    assert "Net does not accept the example inputs (float32 (1, 4, 8, 8) on cpu): RuntimeError" in message
    assert "(int64 (1, 3, 8, 8) on cpu)" in refused("inspect", "nets:build", "--input", "int64:1,3,8,8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--include", "conv*"), "The pattern 'conv*' in include matches none of the model's 2 sites"),
        (("--exclude", "fc"), "The pattern 'fc' in exclude matches none"),
        (
            ("--policy", "vmbf"),
            "'vmbf' names no rank rule: 'vmbf' is not one of default, vbmf, energy, ratio, stable, ",
        ),
        (("--policy", "stable:1"), "'stable:1' has a number, and stable takes none"),
        (("--policy", "flops:0.5"), "Pass example_inputs=... (--input on the command line)"),
        (("--policy", "ratio:much"), "'ratio:much' has no number after the colon"),
        (("--policy", "ratio:2"), "of=2.0 is not in (0, 1]"),
        (("--min-gain", "nan"), "min_gain=nan is not a number of at least 0"),
        (("--json", "no/such/folder.json"), "Cannot write 'no/such/folder.json'. Name a file in a folder that exists"),
    ],
)
def test_an_impossible_option_is_refused(options: tuple[str, ...], message: str) -> None:
    assert message in refused("inspect", "nets:build", *options)


@pytest.mark.parametrize(
    "arguments", [(), ("inspect", "nets:build", "--nothing"), ("verify", "model.onnx"), ("train",)]
)
def test_a_wrong_command_line_shows_the_usage(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == STOPPED
    assert "Usage: main" in result.output


def test_debug_shows_the_exception() -> None:
    result = run("--debug", "inspect", "nets")
    assert isinstance(result.exception, ModelReferenceError)
    assert isinstance(run("inspect", "nets").exception, SystemExit)


def onnx_file(path: str, operator: str = "Relu", value: float = 1.0) -> str:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3], [value] * 3)
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"]), helper.make_node(operator, ["y"], ["z"])]
    x, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xz")
    graph = helper.make_graph(nodes, "g", [x], [z], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("operator", "value", "code", "line"),
    [
        ("Relu", 1.0, OK, "verified"),
        ("Sigmoid", 1.0, FAILED, "the structures differ"),
        ("Relu", 2.0, FAILED, "the numbers differ"),
    ],
)
def test_the_exit_code_of_verify_says_whether_two_files_match(
    operator: str, value: float, code: int, line: str
) -> None:
    result = run("verify", onnx_file("a.onnx"), onnx_file("b.onnx", operator, value), "--json", "report.json")
    assert result.exit_code == code
    assert line in result.stdout
    assert result.stdout.startswith("verified" if code == OK else "NOT verified")
    assert f'"ok": {str(code == OK).lower()}' in Path("report.json").read_text()


def test_verify_refuses_files_that_it_cannot_read_or_write() -> None:
    Path("damaged.onnx").write_text("no graph")
    good = onnx_file("good.onnx")
    assert "'missing.onnx' is not a file" in refused("verify", "missing.onnx", good)
    assert "'damaged.onnx' cannot be read as ONNX" in refused("verify", good, "damaged.onnx")
    assert "Cannot write 'no/report.json'" in refused("verify", good, good, "--json", "no/report.json")


def test_the_cache_is_shown_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDFX_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "cache" / "times.sqlite3"
    assert shown("cache") == f"{file}: 0 times\n"
    shown("inspect", "nets:build", "--input", "2,3,12,12", "--policy", "ratio:0.25")
    number = int(shown("cache").split()[-2])
    assert number > 0
    assert shown("cache", "--clear") == f"{number} times deleted\n"
    assert not file.exists()
    file.write_text("this is not a database")
    result = run("cache")
    assert result.exit_code == STOPPED
    assert "cannot be read: file is not a database. Delete it with tdfx cache --clear." in result.output
    assert shown("cache", "--clear") == "0 times deleted\n"


def test_modelled_times_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDFX_CACHE_DIR", str(tmp_path / "cache"))
    text = shown("inspect", "nets:build", "--input", "2,3,12,12", "--policy", "ratio:0.25", "--modelled")
    assert "measured" not in text
    assert not (tmp_path / "cache").exists()
    assert "measured, 2 sites" in shown("inspect", "nets:build", "--input", "2,3,12,12", "--policy", "ratio:0.25")


def test_a_budget_is_a_policy(tmp_path: Path) -> None:
    result = run("inspect", "nets:build", "--modelled", "--policy", "speedup:1.01", "--min-gain", "0")
    assert result.exit_code == OK
    assert "not_needed" in result.stdout
    assert result.stderr.startswith("Hint: these are the model's initial weights.")
    result = run("inspect", "nets:build", "--modelled", "--policy", "speedup:100")
    assert result.exit_code == STOPPED
    assert (
        "Budget(speedup=100.0) cannot be kept: the most that the 2 sites in question can give is speedup="
        in result.output
    )
    assert (
        "'speedup' needs a number. Write for example speedup:2."
        in run("inspect", "nets:build", "--policy", "speedup").output
    )


def test_messages_on_a_terminal_end_their_lines_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Hint: these are the model's initial weights.\nLoad trained weights with --weights of-a-very-long-name."
    monkeypatch.setenv("COLUMNS", "30")
    say(text)
    assert capsys.readouterr().err == f"{text}\n"
    monkeypatch.setattr("tdfx.progress.on_a_terminal", lambda: True)
    say(text)
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 30
    assert len(lines) > 3
    assert " ".join(lines) == text.replace("\n", " ")
