"""Files that an earlier version wrote, in ``samples/``, still load and mean what they meant; see ``samples/write.py``."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_models import ConvNet, FunctionalNet, batch, train
from torch import nn
from torch.optim import SGD, AdamW

import tdfx

SAMPLES = Path(__file__).parent / "samples"
EXPECTED: dict[str, dict[str, Any]] = json.loads((SAMPLES / "expected.json").read_text())
RATIO = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)


def outputs(model: nn.Module) -> list[list[float]]:
    with torch.no_grad():
        values: list[list[float]] = model.eval()(batch()).tolist()
    return values


def agree(values: list[list[float]], expected: list[list[float]]) -> bool:
    """Compare to a few units in the last place of float32: the machine that wrote the file may have added otherwise."""
    return torch.allclose(torch.tensor(values), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def ranks_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {path: layer.origin.ranks for path, layer in model.named_modules() if isinstance(layer, tdfx.Factorized)}


CHECKPOINTS: dict[str, tuple[Callable[[], nn.Module], type[torch.optim.Optimizer], dict[str, tuple[int, ...]]]] = {
    "dense": (ConvNet, SGD, {}),
    "factorized_sgd": (ConvNet, SGD, {"conv1": (4, 2), "conv2": (4, 4), "fc": (2,)}),
    "factorized_adamw": (ConvNet, AdamW, {"conv1": (4, 2), "conv2": (4, 4), "fc": (2,)}),
    "merged": (ConvNet, SGD, {}),
    "functional": (FunctionalNet, SGD, {"kernel": (2,), "fc": (2,)}),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_loads_and_trains_on(name: str) -> None:
    build, optimizer_class, ranks = CHECKPOINTS[name]
    dense = build()
    assert not agree(outputs(dense), EXPECTED[name]["outputs"])
    optimizer = optimizer_class(dense.train().parameters(), lr=1.0)  # type: ignore[call-arg]
    saved = tdfx.read(SAMPLES / f"{name}.tdfx")
    model = tdfx.load(saved, dense, optimizer=optimizer)
    assert saved["extra"] == {"step": 3, "name": name}
    assert ranks_of(model) == ranks
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert agree(outputs(model), EXPECTED[name]["outputs"])
    train(model.train(), optimizer)
    assert agree(outputs(model), EXPECTED[name]["outputs_after_a_step"])
    assert not agree(outputs(model), EXPECTED[name]["outputs"])


@pytest.mark.parametrize("name", ["graph", "modules", "functional"])
def test_a_pickle_of_a_whole_model_loads_trains_and_merges(name: str) -> None:
    build = FunctionalNet if name == "functional" else ConvNet
    model = torch.load(SAMPLES / f"model_{name}.pt", weights_only=False)
    assert isinstance(model, build)
    assert isinstance(model, torch.fx.GraphModule) == (name != "modules")
    assert ranks_of(model) == CHECKPOINTS["functional" if name == "functional" else "factorized_sgd"][2]
    assert agree(outputs(model), EXPECTED[f"model_{name}"]["outputs"])
    merged = tdfx.merge(model)
    assert agree(outputs(merged), EXPECTED[f"model_{name}"]["outputs"])
    assert list(merged.state_dict()) == list(build().state_dict())
    train(model.train(), SGD(model.parameters(), lr=0.1))
    assert not agree(outputs(model), EXPECTED[f"model_{name}"]["outputs"])


def test_former_modules_leave_the_public_names_as_they_are() -> None:
    assert tdfx.plan(ConvNet(), RATIO).factorized
    for module, name in (("tdfx.plan", "Plan"), ("tdfx.layers", "Factorized")):
        assert getattr(sys.modules[module], name) is getattr(tdfx, name)
        with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'Nothing'"):
            _ = sys.modules[module].Nothing


def test_a_pickle_of_a_whole_model_loads_where_nothing_of_tdfx_was_used_yet() -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(Path(tdfx.__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]\n"
        f"import tdfx, torch\n"
        f"print(type(torch.load({str(SAMPLES / 'model_modules.pt')!r}, weights_only=False)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ConvNet"]


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("plan_*.json")), ids=lambda path: path.stem)
def test_a_plan_loads_as_it_was_written(path: Path) -> None:
    written = json.loads(path.read_text())
    plan = tdfx.Plan.from_json(path.read_text())
    again = json.loads(plan.to_json())
    # Later versions may add fields; those that were written keep their values.
    for after, before in [(again, written), *zip(again.pop("sites"), written.pop("sites"), strict=True)]:
        assert {key: after[key] for key in before} == before
    assert all(site.name in str(plan) for site in plan)


def test_plans_hold_every_kind_of_decision() -> None:
    plans = [tdfx.Plan.from_json(path.read_text()) for path in SAMPLES.glob("plan_*.json")]
    reasons = {site.reason for plan in plans for site in plan.kept}
    assert {site.scheme for plan in plans for site in plan.factorized} >= {"svd", "tucker2", "spatial"}
    assert reasons == {*tdfx.Reason} - {tdfx.Reason.UNINITIALIZED, tdfx.Reason.NOT_NEEDED}


@pytest.mark.parametrize("name", ["ratio", "energy", "budget", "functional"])
def test_a_plan_rewrites_a_new_model(name: str) -> None:
    plan = tdfx.Plan.from_json((SAMPLES / f"plan_{name}.json").read_text())
    model = tdfx.rewrite(FunctionalNet() if name == "functional" else ConvNet(), plan)
    assert ranks_of(model) == {site.name: site.ranks for site in plan.factorized}


def read_policy(name: str) -> tdfx.Policy:
    """Read a policy; a warning that a later version ignores one of its settings is no error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tdfx.TdfxWarning)
        return tdfx.read_policy(SAMPLES / f"policy_{name}")


def test_policy_files_are_read_as_they_were() -> None:
    rules = read_policy("rules.toml")
    assert rules.rank == tdfx.VBMF().at_least(8) | tdfx.Ratio(of=0.5)
    assert (rules.scheme, rules.include, rules.exclude) == ("tucker2:refine=2", ("conv*", "fc"), ("conv9",))
    assert (rules.min_gain, rules.round_to) == (1.2, "auto")
    assert rules.cost == tdfx.Measured(budget=30, autocast=torch.bfloat16)
    conv1 = rules.for_site("conv1")
    assert conv1 is not None
    assert (conv1.rank, conv1.scheme, conv1.min_gain) == (tdfx.Fixed({"*": (4, 6)}), "spatial", 1.2)
    assert (rules.for_site("fc"), rules.for_site("conv9"), rules.for_site("other")) == (None, None, None)
    assert rules.for_site("conv2") == rules

    speedup = read_policy("speedup.toml")
    assert isinstance(speedup.rank, tdfx.Budget)
    assert (speedup.rank.speedup, speedup.cost) == (1.5, tdfx.Modelled(flops_per_second=1e11))
    conv2 = speedup.for_site("conv2")
    assert conv2 is not None
    assert (conv2.rank, conv2.round_to) == (speedup.rank, 4)

    energy = read_policy("energy.json")
    assert (energy.rank, energy.min_gain, energy.round_to) == (tdfx.Energy(share=0.9).at_least(2), 0, 1)


def test_a_policy_file_with_ranks_decides_as_it_did() -> None:
    plan = tdfx.plan(ConvNet(), read_policy("ranks.json"))
    assert {site.name: site.ranks for site in plan} == {"conv1": (3, 5), "conv2": (8, 8), "fc": (2,)}


@pytest.mark.parametrize("name", ["outputs.json", "params.toml", "flops.toml"])
def test_policy_files_with_a_share_of_the_model_are_kept(name: str) -> None:
    plan = tdfx.plan(ConvNet(), read_policy(name), example_inputs=(batch(),))
    assert plan.factorized
    if name == "flops.toml":
        assert plan.flops_after is not None
        assert plan.flops_before is not None
        assert plan.flops_after <= 0.55 * plan.flops_before
    else:
        assert plan.parameters_after <= 0.55 * plan.parameters_before


SWITCHES: dict[str, tuple[tdfx.Policy, tdfx.AtStep | tdfx.Settled, int]] = {
    "at_step": (tdfx.Policy(parameters=0.5, min_gain=0, cost=tdfx.Modelled()), tdfx.AtStep(3), 3),
    "settled": (RATIO, tdfx.Settled(every=1, window=1, tolerance=0.5, moved=0.0, timeout=50), 2),
}
"""Policy, time of the switch, and the step at which it came."""


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_that_waited_goes_on_to_switch(name: str) -> None:
    policy, when, at = SWITCHES[name]
    saved = torch.load(SAMPLES / f"switch_{name}_before.pt", weights_only=True)
    after = torch.load(SAMPLES / f"switch_{name}_after.pt", weights_only=True)
    switch = tdfx.Switch(policy, when=when)
    switch.load_state_dict(saved["switch"])
    assert (switch.steps, switch.done, switch.plan) == (at - 1, False, None)
    model: nn.Module = ConvNet()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    while switch.steps < after["switch"]["step"]:
        train(model, optimizer)
        inputs = None if name == "settled" else (batch(),)
        model = switch.step(model, optimizer=optimizer, example_inputs=inputs)
    assert switch.done
    assert [event.step for event in switch.events] == [at] * len(switch.events)
    assert ranks_of(model) == ranks_of(tdfx.rewrite(ConvNet(), tdfx.Plan.from_json(after["switch"]["plan"])))
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        name: tuple(value.shape) for name, value in after["model"].items()
    }


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_that_is_done_gives_its_plan(name: str) -> None:
    policy, when, at = SWITCHES[name]
    saved = torch.load(SAMPLES / f"switch_{name}_after.pt", weights_only=True)
    switch = tdfx.Switch(policy, when=when)
    switch.load_state_dict(saved["switch"])
    assert switch.done
    assert switch.plan is not None
    assert (switch.steps, switch.events[0].step, switch.events[0].what) == (saved["switch"]["step"], at, "switched")
    model: nn.Module = ConvNet()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    model = tdfx.rewrite(model, switch.plan, optimizer=optimizer)
    model.load_state_dict(saved["model"], strict=True)
    optimizer.load_state_dict(saved["optimizer"])
    assert switch.step(model) is model


def test_an_exported_factorized_file_is_still_proved() -> None:
    model = tdfx.load(SAMPLES / "exported.tdfx", ConvNet)
    assert agree(outputs(model), EXPECTED["exported"]["outputs"])
    report = tdfx.verify(SAMPLES / "factorized.onnx", tdfx.merge(model), example_inputs=(batch(),))
    assert (report.structure, report.interface, report.problem) == (None, None, None)
    assert report.numbers_match
    assert len(report.contracted) == 3
    other = tdfx.verify(SAMPLES / "factorized.onnx", ConvNet(), example_inputs=(batch(),))
    assert other.structure is None
    assert not other.numbers_match
