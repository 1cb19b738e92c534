"""The zoo's checks on models of a few kinds, and a fault for each check that it must find."""

from __future__ import annotations

import doctest
import io
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkout import needs, tool
from click.testing import CliRunner
from torch import Tensor, nn

import tdfx

pytestmark = needs("zoo.py")

SOME = ("squeezenet1_1",)
"""The smallest; tools/zoo.py examines all."""

FACTORIES = """
import os, torch, tdfx
from torch import nn
from torchvision.models import VisionTransformer

def small():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                          nn.Flatten(), nn.Linear(128, 8), nn.Linear(8, 4))
    model.example_inputs = torch.randn(4, 3, 8, 8)
    return model

def small_vit():
    model = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64)
    model.example_inputs = (torch.randn(2, 3, 32, 32),)
    return model

def renamed():
    merge = tdfx.merge
    def wrong(model):
        merged = merge(model)
        merged.add_module("other", merged[7])
        return merged
    tdfx.merge = wrong
    return small()

class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)
    def forward(self, x):
        return self.second(self.first(x) @ torch.ones(16, 16, dtype=torch.float32))

def single():
    model = Single()
    model.example_inputs = {"x": torch.randn(2, 16)}
    return model

class TwoModes(nn.Module):  # has an auxiliary head in train mode, as GoogLeNet has
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16))
        self.auxiliary, self.head = nn.Linear(16, 4), nn.Linear(16, 4)
    def forward(self, x):
        x = self.body(x)
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)

def two_modes():
    model = TwoModes()
    model.example_inputs = torch.randn(4, 3, 8, 8)
    return model

def dies():
    os._exit(9)

def silent():
    return nn.Linear(3, 3)
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES, encoding="utf-8")
    return path


def examine(reference: str) -> Any:
    return tool("zoo_checks").examine(reference)


def complaints(verdict: Any) -> str:
    return "\n".join(tool("zoo").complaints(verdict))


def failed(verdict: Any) -> set[str]:
    assert not verdict.error
    return {name for name, check in verdict.checks.items() if check.ok is False}


@pytest.mark.parametrize("name", SOME)
def test_a_model_of_torchvision_passes(name: str) -> None:
    verdict = examine(f"torchvision:{name}")
    assert verdict.ok, complaints(verdict)
    assert set(verdict.checks) == set(tool("zoo_verdict").CHECKS)
    assert all(check.ok for check in verdict.checks.values())
    assert verdict.facts["factorized"] > 0


def test_a_small_vision_transformer_passes(factories: Path) -> None:
    verdict = examine(f"{factories}:small_vit")
    assert verdict.ok, complaints(verdict)
    assert verdict.checks["accounted"].figures["parameters"] == 1 + 2 * 4 + 1


def test_a_model_with_another_forward_in_train_mode_passes(factories: Path) -> None:
    verdict = examine(f"{factories}:two_modes")
    assert verdict.ok, complaints(verdict)
    assert all(check.ok for check in verdict.checks.values())
    assert verdict.facts["factorized"] == 4


def test_a_verdict_survives_json(factories: Path) -> None:
    verdict = examine(f"{factories}:small")
    assert verdict.ok, complaints(verdict)
    text = json.dumps(verdict.to_dict())
    assert type(verdict).from_dict(json.loads(text)).to_dict() == json.loads(text)


@pytest.mark.parametrize("name", ["zoo", "zoo_run", "zoo_inputs"])
def test_the_examples_of_the_tools_run(name: str) -> None:
    result = doctest.testmod(tool(name))
    assert (result.failed, result.attempted > 0) == (0, True)


# Each check fails for its own faults alone.

Fault = Callable[[nn.Module, nn.Module], nn.Module]
"""A faulty rewrite: (the model passed in, the correctly rewritten model) -> what the faulty rewrite returns."""


def move_a_factor(original: nn.Module, rewritten: nn.Module) -> nn.Module:
    layers = [module for module in rewritten.modules() if isinstance(module, tdfx.Factorized)]
    with torch.no_grad():
        layers[2].weights[0].mul_(1 + 1e-6)
    return rewritten


def detach_a_factor(original: nn.Module, rewritten: nn.Module) -> nn.Module:
    layers = [module for module in rewritten.modules() if isinstance(module, tdfx.Factorized)]
    layers[2].factors[0].register_forward_hook(lambda module, arguments, output: output.detach())
    return rewritten


def move_the_original(original: nn.Module, rewritten: nn.Module) -> nn.Module:
    with torch.no_grad():
        weight = next(original.parameters())
        weight.copy_(torch.nextafter(weight, weight + 1))
    return rewritten


def leave_in_eval_mode(original: nn.Module, rewritten: nn.Module) -> nn.Module:
    original.eval()
    return rewritten


class Wrapped(nn.Module):
    """Returns the right numbers in another structure."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.inner(x)]


def wrap(original: nn.Module, rewritten: nn.Module) -> nn.Module:
    wrapped = Wrapped(rewritten)
    wrapped.__dict__["_tdfx_plan"] = rewritten.__dict__["_tdfx_plan"]
    return wrapped


def raise_an_error(original: nn.Module, rewritten: nn.Module) -> nn.Module:
    raise RuntimeError("no room")


FULL_ONLY: dict[Fault, set[str]] = {
    move_a_factor: {"full_train", "full_eval", "gradients"},
    detach_a_factor: {"gradients"},
    move_the_original: {"untouched"},
    leave_in_eval_mode: {"untouched"},
    wrap: {"full_train", "full_eval"},
    raise_an_error: {"accounted", "full_train", "full_eval", "gradients"},
}
"""A fault in the rewrite at full rank -> the checks that find it."""


@pytest.mark.parametrize("fault", FULL_ONLY, ids=lambda fault: fault.__name__)
def test_a_fault_of_the_rewrite_is_found(fault: Fault, factories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = tdfx.rewrite

    def rewrite(model: nn.Module, policy: tdfx.Policy, **options: Any) -> nn.Module:
        rewritten = correct(model, policy, **options)
        return fault(model, rewritten) if policy.rank == tdfx.Ratio(of=1.0) else rewritten

    monkeypatch.setattr(tdfx, "rewrite", rewrite)
    verdict = examine(f"{factories}:small")
    assert not verdict.ok
    assert failed(verdict) == FULL_ONLY[fault]


def test_a_low_rank_that_changes_nothing_is_found(factories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = tdfx.rewrite
    full = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0)
    monkeypatch.setattr(tdfx, "rewrite", lambda model, policy, **options: correct(model, full, **options))
    assert failed(examine(f"{factories}:small")) == {"control"}


def rename_a_key(merged: nn.Module) -> None:
    merged.add_module("other", merged.get_submodule("7"))


def reorder_the_keys(merged: nn.Module) -> None:
    merged._modules["0"] = merged._modules.pop("0")


def change_the_class(merged: nn.Module) -> None:
    merged.__class__ = type("Other", (nn.Sequential,), {})


def move_a_weight(merged: nn.Module) -> None:
    with torch.no_grad():
        merged.get_parameter("6.weight").mul_(1 + 1e-9)


@pytest.mark.parametrize("fault", [rename_a_key, reorder_the_keys, change_the_class, move_a_weight])
def test_a_fault_of_the_merge_is_found(
    fault: Callable[[nn.Module], None], factories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct = tdfx.merge

    def merge(model: nn.Module) -> nn.Module:
        merged = correct(model)
        fault(merged)
        return merged

    monkeypatch.setattr(tdfx, "merge", merge)
    assert failed(examine(f"{factories}:small")) == {"merge"}


# The account of the parameters that data are multiplied by.


class Products(nn.Module):
    """Every way in which data are multiplied by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.functional = nn.Parameter(torch.randn(4, 4))
        self.packed = nn.Parameter(torch.randn(8, 4))
        self.transposed = nn.Parameter(torch.randn(4, 4))
        self.scaled = nn.Parameter(torch.randn(4, 4))
        self.kernel = nn.Parameter(torch.randn(4, 1, 3))
        self.query = nn.Parameter(torch.randn(4, 4))
        self.gain = nn.Parameter(torch.randn(4))
        self.table = nn.Parameter(torch.randn(3, 4))
        self.unused = nn.Parameter(torch.randn(4, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x) + F.linear(x, self.functional, self.gain)
        left, right = self.packed.chunk(2)
        x = F.linear(x, left) + F.linear(x, right)
        x = x @ self.transposed + x @ (self.scaled / self.scaled.norm()).clone()
        x = F.conv1d(x[:, :, None].expand(-1, -1, 3), self.kernel, groups=4).squeeze(2)
        x = x * self.gain + self.table[0] + self.layer(self.query).mean(0)
        attended: Tensor = self.attention(x[None], x[None], x[None])[0]
        return x + attended[0]


MULTIPLIED = [
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "functional",
    "kernel",
    "layer.weight",
    "packed",
    "query",
    "scaled",
    "transposed",
]


def account_of(model: nn.Module) -> Any:
    call = tool("zoo_inputs").ModelCall((torch.randn(5, 4),))
    return tool("zoo_account").account(model, tool("zoo_inputs").ModelExample(call, call))


def sites(*names: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(name=name, factorized=True, reason=None) for name in names]


def test_every_parameter_that_data_are_multiplied_by_is_found() -> None:
    assert account_of(Products()).names == MULTIPLIED


def test_a_parameter_belongs_to_a_layer_a_parameter_or_a_named_path() -> None:
    account = account_of(Products())
    listed = sites("layer", "functional", "packed", "transposed", "kernel", "attention.out_proj", "scaled")
    assert account.missed(listed) == ["attention.in_proj_weight"], "the query is data of the layer"
    listed.append(SimpleNamespace(name="attention.in", parameter="attention.in_proj_weight"))
    assert account.missed(listed) == []


@pytest.mark.parametrize("name", [name for name in MULTIPLIED if name != "query"])
def test_a_site_that_a_plan_lacks_is_found(name: str) -> None:
    others = [other.removesuffix(".weight") for other in MULTIPLIED if other not in (name, "query")]
    check = tool("zoo_verdict").accounted(account_of(Products()), sites(*others))
    assert check.ok is False
    assert name in check.detail


def test_a_site_kept_without_a_reason_is_found() -> None:
    listed = sites(*(name.removesuffix(".weight") for name in MULTIPLIED))
    assert tool("zoo_verdict").accounted(account_of(Products()), listed).ok
    listed[0].factorized = False
    assert (
        tool("zoo_verdict").accounted(account_of(Products()), listed).detail
        == f"kept without a reason: {MULTIPLIED[0]}"
    )


# The comparison.


class Unstable(nn.Module):
    """Has an output that rounding alone changes completely, and a stable output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        y = self.layer(x)
        return OrderedDict(stable=y, unstable=(1e14 * y).sin())


def test_an_output_that_changes_under_rounding_is_named_and_not_compared() -> None:
    compare, model = tool("zoo_compare"), Unstable().double()
    call = tool("zoo_inputs").ModelCall((torch.randn(3, 4, dtype=torch.float64),))

    def observe(model: nn.Module) -> dict[str, Any]:
        return {"eval": tool("zoo_run").observe(model, call, mode=False)}

    reference = observe(model)
    response = compare.rounding_response(model, reference, ["layer.weight"], observe)["eval"]
    gap = compare.gap_of(reference["eval"].outputs, reference["eval"].outputs, response)
    assert (gap.unstable, gap.compared, gap.share) == (("['unstable']",), 1, 0.0)
    unchanged = compare.rounding_response(model, reference, [], observe)["eval"]
    assert set(unchanged.values()) == {0.0}


def test_the_type_of_a_structure_counts() -> None:
    flatten = tool("zoo_run").flatten
    x = torch.zeros(2)
    values = ({"a": x}, OrderedDict(a=x), [x], (x,), x, x.double())
    assert len({flatten(value)[1] for value in values}) == len(values)


def test_running_a_model_leaves_it_as_it_was() -> None:
    fingerprint = tool("zoo_verdict").fingerprint
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout().eval())
    call = tool("zoo_inputs").ModelCall((torch.randn(5, 4),))
    before = fingerprint(model)
    observation = tool("zoo_run").observe(model, call, mode=True, wanted=dict(model.named_parameters()))
    assert fingerprint(model) == before
    assert not torch.equal(observation.buffers["1.running_mean"], model.get_buffer("1.running_mean"))
    assert set(observation.gradients) == {"(input 0)", "0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_model_that_does_not_fit_is_examined_with_less_precision() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    call = tool("zoo_inputs").ModelCall((torch.randn(20, 64),))
    account = tool("zoo_account").account(model, tool("zoo_inputs").ModelExample(call, call))
    memory, choices = 1.0, []
    for _ in range(4):
        dtype, gradients, needed = tool("zoo_checks").affordable_precision(model, account, memory)
        choices.append((dtype, gradients))
        assert needed < memory or dtype is None
        memory = 0.999 * needed
    assert choices == [(torch.float64, True), (torch.float32, True), (torch.float32, False), (None, False)]


def test_a_model_that_does_not_fit_at_all_is_still_accounted_for(factories: Path) -> None:
    verdict = tool("zoo_checks").examine(f"{factories}:small", memory=1e-9)
    assert verdict.ok, complaints(verdict)
    assert verdict.facts["dtype"] == "structure only"
    assert verdict.checks["accounted"].figures == {"parameters": 4, "missed": 0}
    assert {check.ok for name, check in verdict.checks.items() if name != "accounted"} == {None}


def test_a_model_with_float32_constants_is_examined_in_float64_too(factories: Path) -> None:
    verdict = examine(f"{factories}:single")
    assert verdict.ok, complaints(verdict)
    assert verdict.facts["dtype"] == "float64"
    assert "float32 in its code is read as float64" in verdict.facts["dtype_note"]


# The command.


def test_the_command_continues_after_a_failure_and_reports_it(factories: Path, tmp_path: Path) -> None:
    written = tmp_path / "zoo.json"
    references = [f"{factories}:{name}" for name in ("dies", "silent", "small", "renamed")]
    result = CliRunner().invoke(tool("zoo").main, [*references, "--json", str(written)])
    assert result.exit_code == 1, result.output
    verdicts = json.loads(written.read_text(encoding="utf-8"))
    assert [verdict["ok"] for verdict in verdicts] == [False, False, True, False]
    assert "its process ended with code 9" in verdicts[0]["error"]
    assert "does not say what its model is called with" in verdicts[1]["error"]
    assert verdicts[3]["checks"]["merge"]["ok"] is False
    assert "the state_dict differs" in verdicts[3]["checks"]["merge"]["detail"]
    assert "1 of 4 models pass" in result.output


class InThisProcess:
    """Runs the command of a worker at once, without the seconds that a process takes to import torch."""

    def __init__(self, command: list[str], **_: Any) -> None:
        result = CliRunner().invoke(tool("zoo").main, command[2:])
        self.returncode, self.stdout = result.exit_code, io.StringIO(result.stdout)

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_the_command_takes_inputs_and_succeeds(factories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool("zoo").subprocess, "Popen", InThisProcess)
    result = CliRunner().invoke(tool("zoo").main, [f"{factories}:silent", "--input", "2,3"])
    assert result.exit_code == 0, result.output
    assert "1 of 1 models pass" in result.output


def test_a_glob_that_matches_nothing_is_an_error() -> None:
    result = CliRunner().invoke(tool("zoo").main, ["--models", "nonsense*"])
    assert result.exit_code == 2
    assert "matches none of torchvision's" in result.output


def test_help_explains_every_check() -> None:
    result = CliRunner().invoke(tool("zoo").main, ["--help"])
    assert result.exit_code == 0
    assert all(name.replace("_", " ") in result.output for name in tool("zoo_verdict").CHECKS)
