"""A failure changes nothing: each error is checked by its text, and model and optimizer are compared before and after."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

import tdfx

QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)


def trained() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Return a small network after one training step, so that its optimizer has state."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.rand(2, 3, 6, 6)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[object, ...]:
    tensors = [
        (name, id(parameter), parameter.detach().clone().numpy().tobytes())
        for name, parameter in model.named_parameters()
    ]
    modules = [(name, id(module), module.training, sorted(module.__dict__)) for name, module in model.named_modules()]
    groups = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    states = copy.deepcopy(optimizer.state_dict()["state"])
    return tensors, modules, groups, repr(states), [id(parameter) for parameter in optimizer.state]


def other_plan(**changes: Any) -> tdfx.Plan:
    plan = tdfx.plan(trained()[0], QUARTER)
    return replace(plan, sites=(replace(plan.sites[0], **changes), *plan.sites[1:]))


Case = tuple[type[tdfx.TdfxError], str, dict[str, Any]]
CASES: dict[str, Case] = {
    "input shape": (
        tdfx.InputError,
        r"Sequential does not accept the example inputs \(float32 \(2, 4, 6, 6\) on cpu\): "
        r"RuntimeError: .*Pass example_inputs=\(x,\)",
        {"policy": QUARTER, "example_inputs": (torch.rand(2, 4, 6, 6),)},
    ),
    "include matches nothing": (
        tdfx.PolicyError,
        r"The pattern 'layer\*' in include matches none of the model's 2 sites.*Nearest: .*tdfx\.plan lists them all",
        {"policy": replace(QUARTER, include=("layer*",))},
    ),
    "exclude matches nothing": (
        tdfx.PolicyError,
        "The pattern 'fc' in exclude matches none",
        {"policy": replace(QUARTER, exclude=("fc",))},
    ),
    "override matches nothing": (
        tdfx.PolicyError,
        "The pattern 'head' in overrides matches none",
        {"policy": replace(QUARTER, overrides={"head": None})},
    ),
    "fixed matches nothing": (
        tdfx.PolicyError,
        "The pattern 'conv' in rank matches none",
        {"policy": tdfx.Policy(rank=tdfx.Fixed({"conv": 4}))},
    ),
    "fixed above full rank": (
        tdfx.PolicyError,
        r"Fixed ranks \(99, 2\) for site '0' are above its full ranks \(8, 3\)",
        {"policy": tdfx.Policy(rank=tdfx.Fixed({"0": (99, 2)}))},
    ),
    "not a policy": (
        tdfx.PolicyError,
        "policy='vbmf' is a str: it says what to rewrite",
        {"policy": "vbmf"},
    ),
    "unknown emit": (
        tdfx.PolicyError,
        "emit='onnx' is not known: a model is given back as 'graph'",
        {"policy": QUARTER, "emit": "onnx"},
    ),
    "plan of another model": (
        tdfx.PlanError,
        "The plan names site 'stem', which Sequential does not have: .*Make it again with tdfx.plan",
        {"policy": other_plan(name="stem")},
    ),
    "plan of another shape": (
        tdfx.PlanError,
        r"The plan has a Conv2d of shape \(8, 5, 3, 3\) split by tucker2 at site '0', and the model has a Conv2d of shape",
        {"policy": other_plan(shape=(8, 5, 3, 3))},
    ),
    "plan with impossible ranks": (
        tdfx.PlanError,
        r"The plan gives site '0' the ranks \(9, 3\), and tucker2 takes 2 ranks there, from 1 to \(8, 3\)",
        {"policy": other_plan(ranks=(9, 3))},
    ),
    "plan with an unknown scheme": (
        tdfx.PlanError,
        "plan for site '0' cannot be carried out: scheme='tuker' is not known: the schemes are tucker2, svd, .*, or 'auto'.*"
        "Nearest: 'tucker2'",
        {"policy": other_plan(scheme="tuker")},
    ),
    "not an optimizer": (
        tdfx.OptimizerError,
        "optimizer=0.1 is a float, not a torch.optim.Optimizer",
        {"policy": QUARTER, "optimizer": [0.1]},
    ),
    "not even a list of optimizers": (
        tdfx.OptimizerError,
        "optimizer=0.1 is a float, not a torch.optim.Optimizer",
        {"policy": QUARTER, "optimizer": 0.1},
    ),
    "optimizer of another model": (
        tdfx.OptimizerError,
        "The weights of 2 sites are in none of the optimizers given, the first being '0'",
        {"policy": QUARTER, "optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_error_says_what_to_do_and_changes_nothing(name: str) -> None:
    kind, message, arguments = CASES[name]
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    with pytest.raises(kind, match=f"(?s){message}"):
        tdfx.rewrite(model, **{"optimizer": optimizer, **arguments})
    assert snapshot(model, optimizer) == before
    assert tdfx.rewrite(model, QUARTER, optimizer=optimizer) is not model, "the same model and optimizer still work"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    model, optimizer = trained()
    with torch.no_grad():
        model.get_parameter("3.weight")[0, 0] = value
    plan = tdfx.plan(trained()[0], QUARTER)
    before = snapshot(model, optimizer)
    for wish in (QUARTER, plan):
        with pytest.raises(
            tdfx.WeightError, match=r"weight of site '3' has 1 values that are NaN or infinite.*exclude=\('3',\)"
        ):
            tdfx.rewrite(model, wish, optimizer=optimizer)
        assert snapshot(model, optimizer) == before
    kept = tdfx.rewrite(model, replace(QUARTER, exclude=("3",)), optimizer=optimizer)
    assert isinstance(kept.get_submodule("0"), tdfx.Factorized)


def test_a_weight_on_the_meta_device_is_refused() -> None:
    with pytest.raises(tdfx.WeightError, match="weight of site '' is on the meta device and has no values"):
        tdfx.rewrite(nn.Linear(4, 4, device="meta"), QUARTER)
    with pytest.raises(tdfx.WeightError, match=r"weight of site '' is on the meta device .* and VBMF\(.* reads them"):
        tdfx.plan(nn.Linear(4, 4, device="meta"), replace(QUARTER, rank=tdfx.VBMF()))


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(tdfx.PolicyError, match=r"scheme='tucker' is not known.* Nearest: 'tucker2'"):
        tdfx.Policy(scheme="tucker")


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (DataParallel, r"wrapped in DataParallel.*Pass model\.module"),
        (AveragedModel, r"wrapped in AveragedModel.*Pass model\.module"),
        (lambda model: model.state_dict(), "model is a OrderedDict, not a torch.nn.Module"),
    ],
)
def test_a_wrapped_model_is_refused_with_advice_to_unwrap_it(wrap: Callable[[nn.Module], Any], message: str) -> None:
    wrapped = wrap(trained()[0])
    for call in (tdfx.plan, tdfx.rewrite, tdfx.merge):
        with pytest.raises(tdfx.ModelError, match=f"(?s){message}"):
            call(wrapped)


def test_a_rewrite_during_a_cuda_graph_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(tdfx.ModelError, match=r"CUDA graph is being captured.*capture graphs of the old model anew"):
        tdfx.rewrite(nn.Linear(4, 4), QUARTER)


def test_merging_a_model_that_was_never_rewritten_returns_it_with_a_warning() -> None:
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    with pytest.warns(tdfx.TdfxWarning, match="Sequential was never rewritten: it holds no factorized layer"):
        assert tdfx.merge(model, optimizer=optimizer) is model
    assert snapshot(model, optimizer) == before


def test_merging_what_a_switch_has_kept_or_what_was_merged_says_nothing() -> None:
    model, optimizer = trained()
    switch = tdfx.Switch(tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=1e9), when=tdfx.AtStep(1))
    assert switch.step(model, optimizer=optimizer) is model
    assert switch.done
    assert tdfx.merge(model, optimizer=optimizer) is model
    merged = tdfx.merge(tdfx.rewrite(model, QUARTER, optimizer=optimizer), optimizer=optimizer)
    assert tdfx.merge(merged) is merged


def test_checking_the_steps_of_a_dense_model_is_refused() -> None:
    model, _ = trained()
    plan = tdfx.plan(model, QUARTER)
    with pytest.raises(tdfx.MergeError, match="Sequential is dense"):
        tdfx.check_step(replace(plan, sites=()), model, example_inputs=torch.zeros(1))


def test_merging_with_the_optimizer_of_another_model_is_refused() -> None:
    model, optimizer = trained()
    low = tdfx.rewrite(model, QUARTER, optimizer=optimizer)
    before = snapshot(low, optimizer)
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(tdfx.OptimizerError, match="weights of 2 sites are in none of the optimizers"):
        tdfx.merge(low, optimizer=stranger)
    assert snapshot(low, optimizer) == before


def test_a_missing_optimizer_gives_a_warning_once_training_has_begun() -> None:
    model, _ = trained()
    with pytest.warns(
        tdfx.TdfxWarning, match=re.escape("No optimizer= was given, but the weights of 2 rewritten sites")
    ):
        tdfx.rewrite(model, QUARTER)
    model.zero_grad(set_to_none=True)
    tdfx.rewrite(model, QUARTER)
