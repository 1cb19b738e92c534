"""``tdfx inspect``: its output on terminals and in pipes, the files it writes and reads, and its errors."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

import tdfx
from tdfx.cli import main
from tdfx.cli.device import build_on
from tdfx.cli.inspect import SORTS
from tdfx.cli.references import build_model
from tdfx.errors import ModelReferenceError
from tdfx.factors import registry
from tdfx.plans.plan import Plan

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.body = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 128)
        self.spare = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))

def build():
    torch.manual_seed(0)
    return Net()

def needs_values():
    model = Net()
    assert model.head.weight.sum().item() != 0
    return model

def tied():
    model = Net()
    model.norm = nn.BatchNorm2d(4)
    model.spare.weight = model.head.weight
    model.stem.weight.requires_grad_(False)
    return model

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 64)
        self.head = nn.Linear(64, 64)

    def forward(self, tokens):
        return self.head(self.table(tokens))

class Broken(Net):
    def forward(self, x):
        raise KeyError("no such thing")
"""
QUICK = ("--modelled", "--policy", "ratio", "--min-gain", "0")
NOTED = ("--modelled", "--policy", "ratio,at_least=24", "--min-gain", "0", "--input", "2,3,16,16")
INPUT = ("--input", "2,3,16,16")


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "nets.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    yield
    sys.modules.pop("nets", None)  # tools/nets.py has the same name


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, ["inspect", "nets.py:build", *arguments], env=env)


def shown(*arguments: str, env: dict[str, str] | None = None) -> str:
    result = run(*arguments, env=env)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def refused(*arguments: str, model: str = "nets.py:build") -> str:
    result = CliRunner().invoke(main, ["inspect", model, *arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith(("Error: ", "Usage: "))
    return result.stderr


def build() -> Any:
    namespace: dict[str, Any] = {"__name__": "nets"}
    exec(MODEL, namespace)
    return namespace["build"]()


def rows(text: str) -> list[str]:
    """Return the names of the sites in the table."""
    lines = text.splitlines()
    names = (line.split()[0] for line in lines[1:] if line)
    return [name for name in names if name in {"stem", "body", "head", "spare"}]


# Which sites are shown, and in which order.


def test_sites_are_in_the_order_of_the_model_by_default() -> None:
    assert rows(shown(*QUICK)) == ["stem", "body", "head", "spare"]
    assert rows(shown(*QUICK, "--sort", "name")) == ["body", "head", "spare", "stem"]
    assert rows(shown(*QUICK, "--sort", "parameters")) == ["body", "head", "stem", "spare"]
    assert rows(shown(*QUICK, *INPUT, "--sort", "flops")) == ["body", "stem", "head", "spare"]


@pytest.mark.parametrize("key", [sort for sort in SORTS if sort not in {"order", "name"}])
def test_sites_are_sorted_by_a_quantity_the_largest_first(key: str) -> None:
    options = QUICK if key == "error" else ("--policy", "ratio")
    shown(*options, *INPUT, "--sort", key, "--csv", "rows.csv")
    table = list(csv.DictReader(io.StringIO(Path("rows.csv").read_text())))
    columns = {"time": "seconds_before", "parameters": "parameters_before", "flops": "flops_before"}
    if key == "saved":
        values = [float(row["seconds_before"]) - float(row["seconds_after"]) for row in table if row["seconds_before"]]
    else:
        cells = [row[columns.get(key, key)] for row in table]
        assert "" not in cells[: len(cells) - cells.count("")]
        values = [float(cell) for cell in cells if cell]
    assert len(values) >= 2
    assert values == sorted(values, reverse=True)


def test_sites_are_sorted_by_savings_without_times_too() -> None:
    assert rows(shown(*QUICK, "--sort", "saved"))[0] == "body"
    assert rows(shown(*QUICK, *INPUT, "--sort", "saved"))[0] == "body"


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        ("time", QUICK, "--sort time has no values to sort by: no layer was timed. Give --input, without --modelled."),
        ("flops", QUICK, "--sort flops has no values to sort by: operations depend on the sizes of the inputs."),
        (
            "error",
            ("--exclude", "*"),
            "--sort error has no values to sort by: nothing is factorized, or the weights have no",
        ),
        ("gain", ("--exclude", "*"), "--sort gain has no values to sort by: no gain was computed."),
    ],
)
def test_sorting_by_an_unknown_quantity_is_refused(key: str, options: tuple[str, ...], message: str) -> None:
    assert message in refused(*options, "--sort", key)


def test_a_wrong_sort_lists_the_right_ones() -> None:
    assert "'speed' is not one of 'order', 'name', 'time', 'saved'," in refused("--sort", "speed")


def test_filters_select_sites_and_leave_the_totals() -> None:
    options = ("--exclude", "stem", *INPUT, *QUICK)
    whole = shown(*options)
    assert rows(shown(*options, "--filter", "factorized")) == ["body", "head"]
    assert rows(shown(*options, "--filter", "kept")) == ["stem", "spare"]
    assert rows(shown(*options, "--filter", "excluded")) == ["stem"]
    assert rows(shown(*options, "--filter", "s*")) == ["stem", "spare"]
    assert rows(shown(*options, "--filter", "s*", "--filter", "not_called")) == ["spare"]
    none = shown(*options, "--filter", "tied")
    assert rows(none) == []
    assert "shown: 0 of 4 sites" in none
    (total,) = (line for line in whole.splitlines() if line.startswith("Net: "))
    assert total in none


def test_a_filter_that_matches_nothing_names_the_nearest() -> None:
    message = refused(*QUICK, "--filter", "bdy")
    assert "--filter 'bdy' matches none of the 4 sites. Nearest: 'body'" in message
    assert "It takes factorized, kept, a reason, or a glob over names." in message
    assert "Nearest: 'excluded'" in refused(*QUICK, "--filter", "exclude")


def test_a_hint_appears_if_a_rule_reads_untrained_weights() -> None:
    result = run("--modelled")
    (note,) = [line for line in result.stdout.splitlines() if "show only noise yet" in line]
    assert re.fullmatch(r"note: \d+ cut weights show only noise yet; noise_floor=[\w. ]+", note)
    assert len(note) <= 80
    assert result.stderr.startswith("Hint: these are the model's initial weights. Load trained weights with --weights")
    torch.save(build().state_dict(), "w.pt")
    assert run("--modelled", "--weights", "w.pt").stderr == ""
    assert run("--modelled", "--policy", "ratio:0.25").stderr == ""


# Terminals, pipes, colours.


def test_a_pipe_gets_the_whole_table_without_colour() -> None:
    text = shown(*NOTED, env={"COLUMNS": "40"})
    assert "\x1b" not in text
    assert "Conv2d 64×64×3×3" in text
    assert "raised from 16/16" in text


def test_colour_can_be_forced_and_the_width_too() -> None:
    wide = shown(*NOTED, env={"FORCE_COLOR": "1"})
    assert "\x1b[" in wide
    assert "raised from 16/16" in wide
    narrow = shown(*NOTED, env={"FORCE_COLOR": "1", "COLUMNS": "50"})
    assert "Conv2d 64×64×3×3" not in narrow


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_a_table_of_its_width(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import pty

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    inside, outside = pty.openpty()
    with os.fdopen(outside, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        main(["inspect", "nets.py:build", *NOTED], standalone_mode=False)
        terminal.flush()
        text = os.read(inside, 100_000).decode()
    os.close(inside)
    assert ("\x1b[36m" in text) != no_color
    assert "scheme" in text
    assert "raised from" not in text


# Files that are written.


def test_json_and_csv_can_be_printed_instead_of_the_table() -> None:
    options = (*QUICK, *INPUT)
    plan = Plan.from_json(shown(*options, "--json", "-"))
    assert [site.name for site in plan] == ["stem", "body", "head", "spare"]
    table = list(csv.reader(io.StringIO(shown(*options, "--csv", "-", "--filter", "factorized", "--sort", "name"))))
    assert table[0] == [field.name for field in fields(tdfx.SitePlan)]
    assert [line[0] for line in table[1:]] == ["body", "head", "stem"]
    body = dict(zip(table[0], table[1], strict=True))
    assert body["shape"] == "64x64x3x3"
    assert body["ranks"] == "x".join(map(str, plan["body"].ranks or ()))
    assert float(body["error"]) == plan["body"].error
    assert int(body["flops_after"]) == plan["body"].flops_after
    both = shown(*options, "--json", "-", "--csv", "rows.csv")
    assert Plan.from_json(both) == plan
    assert len(Path("rows.csv").read_text().splitlines()) == 5


def test_files_that_cannot_be_written_are_refused_before_the_work() -> None:
    long = "x" * 300
    assert "--json - and --csv - both write to the standard output. Name a file" in refused("--json", "-", "--csv", "-")
    assert "Cannot write 'no/rows.csv'. Name a file in a folder" in refused("--csv", "no/rows.csv", model="raises:now")
    assert f"Cannot write '{long}'" in refused("--json", long, model="raises:now")


# Policies.


def test_a_policy_comes_from_a_file_and_options_override_it() -> None:
    Path("p.toml").write_text('rank = "ratio:0.5"\nmin_gain = 0\nexclude = ["stem"]\noverrides = {head = "keep"}\n')
    text = shown("--policy", "p.toml", "--modelled", "--json", "plan.json")
    assert "Net: 1 of 4 sites factorized; kept: 2 excluded, 1 not_called" in text
    plan = Plan.from_json(Path("plan.json").read_text())
    expected = tdfx.Policy(
        rank=tdfx.Ratio(of=0.5), min_gain=0, exclude=("stem",), cost=tdfx.Modelled(), overrides={"head": None}
    )
    assert plan.policy == repr(expected)
    # The source of this instance cannot be read, so no graph says that the spare layer is not called.
    expected_sites = [site for site in tdfx.plan(build(), expected).factorized if site.name != "spare"]
    assert list(plan.factorized) == expected_sites
    assert "2 of 4" in shown("--policy", "p.toml", "--modelled", "--exclude", "spare")
    assert "0 of 4" in shown("--policy", "p.toml", "--modelled", "--include", "spare")
    assert "0 of 4" in shown("--policy", "p.toml", "--modelled", "--min-gain", "1e9")


OWN_SCHEME = """
import tdfx
from torch import nn

@tdfx.register_scheme
class Last(tdfx.TwoFactors):
    name = "of_the_file"
    def fits(self, operation):
        return sum(taps > 1 for taps in operation.kernel) > 1
    def first_axes(self, operation):
        return (max(axis for axis, taps in enumerate(operation.kernel) if taps > 1),)

def build():
    return nn.Sequential(nn.Conv2d(16, 16, 3))
"""


def test_a_policy_may_name_a_scheme_that_the_models_file_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_SCHEMES", dict(registry._SCHEMES))
    Path("own.py").write_text(OWN_SCHEME)
    Path("p.toml").write_text('rank = "ratio:0.25"\nscheme = "of_the_file"\nmin_gain = 0\n')
    result = CliRunner().invoke(main, ["inspect", "own.py:build", "--policy", "p.toml", "--modelled"])
    assert result.exit_code == 0, result.output
    assert re.search(r"0 +Conv2d 16×16×3×3 +of_the_file ", result.stdout)


def test_modelled_is_for_overrides_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDFX_CACHE_DIR", str(tmp_path / "cache"))
    Path("p.json").write_text(json.dumps({"rank": "ratio", "overrides": {"body": {"rank": "ratio:0.5"}}}))
    shown("--policy", "p.json", "--modelled", *INPUT)
    assert not (tmp_path / "cache").exists()


def test_an_error_names_the_policy_file() -> None:
    Path("p.toml").write_text('rnak = "ratio:0.5"\n')
    assert "The policy 'p.toml' has the unknown key 'rnak'. Nearest: 'rank'" in refused("--policy", "p.toml")
    assert "The policy 'no.json' could not be read: No such file" in refused("--policy", "no.json")


# Weights.


def wrapped(state: dict[str, Tensor], way: str) -> dict[str, Any]:
    ways: dict[str, Any] = {
        "ddp": {f"module.{key}": tensor for key, tensor in state.items()},
        "compiled": {f"_orig_mod.{key}": tensor for key, tensor in state.items()},
        "ddp of compiled": {f"module._orig_mod.{key}": tensor for key, tensor in state.items()},
        "compiled part": {key.replace("body.", "body._orig_mod."): tensor for key, tensor in state.items()},
        "nested": {"epoch": 3, "model_state_dict": {f"module.{key}": tensor for key, tensor in state.items()}},
        "nested twice": {"checkpoint": 1, "state_dict": {"model": state}},
    }
    checkpoint: dict[str, Any] = ways[way]
    return checkpoint


@pytest.mark.parametrize("way", ["ddp", "compiled", "ddp of compiled", "compiled part", "nested", "nested twice"])
def test_names_from_wrappers_and_checkpoints_are_removed(way: str) -> None:
    state = build().state_dict()
    state["body.weight"] = torch.ones_like(state["body.weight"])  # of rank 1, so a quarter of the ranks is exact
    torch.save(wrapped(state, way), "w.pt")
    shown(*QUICK, "--weights", "w.pt", "--json", "plan.json")
    error = Plan.from_json(Path("plan.json").read_text())["body"].error
    assert error is not None
    assert error < 1e-6


def test_safetensors_are_read() -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = build().state_dict()
    state["body.weight"] = torch.ones_like(state["body.weight"])
    save_file(state, "w.safetensors")
    shown(*QUICK, "--weights", "w.safetensors", "--json", "plan.json")
    error = Plan.from_json(Path("plan.json").read_text())["body"].error
    assert error is not None
    assert error < 1e-6
    Path("bad.safetensors").write_bytes(b"nothing of the kind")
    assert "The weights 'bad.safetensors' could not be read: SafetensorError" in refused("--weights", "bad.safetensors")
    assert "could not be read: FileNotFoundError" in refused("--weights", "no.safetensors")


def test_safetensors_without_their_library_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    Path("w.safetensors").write_bytes(b"")
    message = refused("--weights", "w.safetensors")
    assert (
        "could not be read: the library safetensors is not installed. Install it: pip install 'tdfx[safetensors]'"
        in message
    )


def test_weights_of_another_model_are_refused_with_the_first_differences() -> None:
    state = build().state_dict()
    few = {key: tensor for key, tensor in state.items() if not key.startswith("head")}
    few["haed.weight"] = state["head.weight"]
    few["body.weight"] = torch.ones(3)
    torch.save(few, "w.pt")
    message = refused("--weights", "w.pt")
    assert "The weights 'w.pt' do not fit Net: 2 of 8 entries are missing, first 'head.weight'; " in message
    assert "1 are not the model's, first 'haed.weight' (nearest: 'head.weight'); " in message
    assert (
        "1 have another shape, first 'body.weight', which is (3,) in the file and (64, 64, 3, 3) in the model."
        in message
    )
    torch.save([1, 2], "list.pt")
    assert "the checkpoint holds a list, not a mapping from names to tensors" in refused("--weights", "list.pt")


# Devices.


def test_rules_that_read_no_values_plan_a_model_without_values() -> None:
    text = shown("--device", "meta", "--policy", "ratio", *INPUT, "--sort", "flops")
    assert rows(text)[0] == "body"
    assert "Net: 1 of 4 sites factorized" in text
    assert "error" not in text
    real = shown("--modelled", "--policy", "ratio", *INPUT, "--json", "plan.json")
    assert "error" in real
    meta = Plan.from_json(shown("--device", "meta", "--policy", "ratio", *INPUT, "--json", "-"))
    for site, other in zip(meta, Plan.from_json(Path("plan.json").read_text()), strict=True):
        assert (site.name, site.scheme, site.ranks, site.flops_after) == (
            other.name,
            other.scheme,
            other.ranks,
            other.flops_after,
        )
        assert site.error is None


def test_a_huge_model_is_inspected_without_its_weights() -> None:
    result = CliRunner().invoke(main, ["inspect", "torchvision:vit_h_14", "--device", "meta", "--policy", "ratio"])
    assert result.exit_code == 0, result.output
    assert "parameters 632M → " in result.stdout


def test_a_model_can_compute_while_it_is_built_on_the_meta_device() -> None:
    regnet = build_on(torch.device("meta"), "torchvision:regnet_y_400mf", build_model)
    assert all(tensor.is_meta for tensor in (*regnet.parameters(), *regnet.buffers()))
    built = build_on(torch.device("meta"), "nets.py:tied", build_model)
    assert all(tensor.is_meta for tensor in (*built.parameters(), *built.buffers()))
    assert built.get_parameter("head.weight") is built.get_parameter("spare.weight")
    assert not built.get_parameter("stem.weight").requires_grad
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_a_rule_that_needs_values_says_so_on_the_meta_device() -> None:
    message = refused("--device", "meta", "--policy", "energy")
    assert (
        "The weight of site 'stem' is on the meta device and has no values, and Energy(share=0.9) reads them" in message
    )
    assert "take a rule that reads none: Ratio or Fixed (ratio:0.25 on the command line)" in message
    torch.save(build().state_dict(), "w.pt")
    assert "--weights has no use on --device meta" in refused("--device", "meta", "--weights", "w.pt")


def test_a_model_that_needs_values_to_be_built_says_so_on_the_meta_device() -> None:
    message = refused("--device", "meta", model="nets.py:needs_values")
    assert "'nets.py:needs_values' could not be called without arguments: RuntimeError" in message
    assert "it may need values that the meta device does not have: leave out --device meta." in message


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cpu:x", "hpu"])
def test_a_missing_device_is_refused(device: str) -> None:
    message = refused("--device", device)
    assert f"--device {device!r} cannot be used: this machine and its PyTorch have cpu" in message
    assert "Take one of these, or meta, which needs no memory" in message
    assert "opengl" not in message


def test_a_model_that_does_not_fit_on_a_device_says_so() -> None:
    class Large(torch.nn.Linear):
        def to(self, *_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 90 GiB.")

    with pytest.raises(
        ModelReferenceError, match=r"'nets:large' could not be moved to 'cuda': CUDA out of memory\. Take anot"
    ):
        build_on(torch.device("cuda"), "nets:large", lambda _: Large(2, 2))


def test_a_model_of_torchvision_that_cannot_be_built_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no disk")

    monkeypatch.setattr("torchvision.models.get_model", fails)
    assert "torchvision's 'resnet18' could not be built: OSError: no disk." in refused(model="torchvision:resnet18")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_a_model_is_built_and_timed_on_cuda() -> None:
    assert "Net: " in shown("--device", "cuda", "--policy", "ratio", *INPUT)


# Inputs that a model does not accept.


def test_inputs_that_do_not_fit_are_refused_with_the_error_of_the_model() -> None:
    message = refused(*QUICK, "--input", "2,4,16,16")
    assert "Net does not accept the example inputs (float32 (2, 4, 16, 16) on cpu): RuntimeError: " in message
    assert "Pass example_inputs=(x,) (--input on the command line) with the shape, dtype and device" in message
    assert "(int64 (2, 3, 16, 16) on cpu): RuntimeError" in refused(*QUICK, "--input", "int64:2,3,16,16")
    assert "Tokens does not accept the example inputs (float32 (2, 8) on cpu)" in refused(
        *QUICK, "--input", "2,8", model="nets.py:Tokens"
    )
    assert "TypeError" in refused(*QUICK, "--input", "2,3,16,16", "--input", "2")
    assert "KeyError: 'no such thing'" in refused(*QUICK, *INPUT, model="nets.py:Broken")
    assert run(*QUICK, *INPUT).exit_code == 0


def test_a_defect_of_tdfx_is_one_message_and_a_traceback_with_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("tdfx.plan", fails)
    message = refused()
    assert (
        "Error: tdfx failed because of a defect in it: ZeroDivisionError: division by zero. Run it again as " in message
    )
    debug = CliRunner().invoke(main, ["--debug", "inspect", "nets.py:build"])
    assert isinstance(debug.exception, ZeroDivisionError)
    assert debug.exc_info is not None


def test_an_interrupt_has_the_usual_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tdfx.plan", interrupted)
    result = run()
    assert result.exit_code == 130
    assert result.stderr == "Interrupted.\n"
