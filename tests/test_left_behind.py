"""A loop that goes on with the old model, and an optimizer that goes on with the old weights: both are noticed."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import tdfx
from tdfx.optim import left_behind
from tdfx.wrappers.in_place import InPlaceModule

QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, cost=tdfx.Modelled())
X = torch.ones(2, 16)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def sgd(model: nn.Module, lr: float = 0.1) -> Optimizer:
    return SGD(model.parameters(), lr=lr)


def learn(model: nn.Module, *optimizers: Optimizer) -> None:
    model.zero_grad()
    model(X).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def switch_at_1() -> tdfx.Switch:
    return tdfx.Switch(QUARTER, when=tdfx.AtStep(1), collect=0)


@pytest.fixture(autouse=True)
def nothing_is_watched() -> Iterator[None]:
    """Leave no watch to the next test."""
    left_behind._watched.clear()
    yield
    left_behind._watched.clear()


@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager"), InPlaceModule]
)
def test_a_model_whose_replacement_was_dropped_is_an_error(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    switch, optimizer, passed = switch_at_1(), sgd(model), wrap(model)
    learn(model, optimizer)
    assert switch.step(passed, optimizer=optimizer, emit="modules") is not passed
    with pytest.raises(
        tdfx.ModelError, match=r"the Sequential that the switch replaced at step 1: .* dropped"
    ) as error:
        switch.step(wrap(model), optimizer=optimizer)
    assert ("replace_with" in str(error.value)) == (wrap is InPlaceModule)
    assert switch.steps == 1


def test_a_model_that_is_trained_under_another_reference_is_an_error() -> None:
    model = net()
    compiled: Any = torch.compile(model, backend="eager")
    switch, optimizer = switch_at_1(), sgd(model)
    learn(compiled, optimizer)
    model = switch.step(model, optimizer=optimizer)
    learn(compiled, optimizer)
    with pytest.raises(tdfx.ModelError, match="the loop trains another reference"):
        switch.step(model, optimizer=optimizer)


def test_no_word_while_the_new_model_is_trained() -> None:
    dense = net()
    switch, optimizer = switch_at_1(), sgd(dense, lr=0.0)
    learn(dense, optimizer)
    model = switch.step(dense, optimizer=optimizer)
    model = switch.step(model, optimizer=optimizer)  # a step that a GradScaler has left out
    for _ in range(3):
        learn(model, optimizer)
        learn(dense)  # beside it, for a comparison
        model = switch.step(model, optimizer=optimizer)
    assert switch.step(tdfx.merge(model, optimizer=optimizer)) is not model
    assert switch.steps == 6


def test_a_part_that_was_replaced_in_place_goes_on() -> None:
    holder = nn.ModuleDict({"net": net()})
    switch, optimizer = switch_at_1(), sgd(holder)
    for _ in range(3):
        learn(holder["net"], optimizer)
        part = InPlaceModule(holder, "net")
        rewritten = switch.step(part, optimizer=optimizer, emit="modules")
        if rewritten is not part:
            part.replace_with(rewritten)
    assert switch.plan is not None
    assert switch.steps == 3


def test_a_resumed_model_that_is_still_dense_is_an_error() -> None:
    switch = switch_at_1()
    model = switch.step(net())
    saved = switch.state_dict()
    resumed = switch_at_1()
    resumed.load_state_dict(saved)
    with pytest.raises(
        tdfx.ModelError, match=r"says that 2 sites were switched, '0' first, and this Sequential holds no"
    ):
        resumed.step(net())
    assert resumed.step(model) is model
    resumed.load_state_dict(saved)
    merged = tdfx.merge(model)
    assert resumed.step(merged) is merged


def test_a_copy_of_a_switch_expects_nothing() -> None:
    switch = switch_at_1()
    dense = net()
    switch.step(dense)
    copied = copy.deepcopy(switch)
    assert copied.step(dense) is dense


@pytest.mark.parametrize("by_switch", [False, True])
def test_a_forgotten_optimizer_is_named_at_its_second_step(by_switch: bool) -> None:
    model = net()
    optimizer = sgd(model)
    model = switch_at_1().step(model) if by_switch else tdfx.rewrite(model, QUARTER)
    learn(model, optimizer)
    with pytest.warns(
        tdfx.TdfxWarning, match=r"SGD has taken two steps, and 4 parameters .* holds 2 weights that tdfx.rew"
    ):
        learn(model, optimizer)
    learn(model, optimizer)  # it is said once
    assert left_behind._handle is None


def test_a_merge_without_its_optimizer_is_named_too() -> None:
    small = tdfx.rewrite(net(), QUARTER)
    optimizer = sgd(small)
    model = tdfx.merge(small)
    learn(model, optimizer)
    with pytest.warns(tdfx.TdfxWarning, match=r"2 parameters .* holds 4 weights that tdfx.merge has replaced"):
        learn(model, optimizer)


def new_optimizer(old: Optimizer, model: nn.Module) -> list[Optimizer]:
    return [sgd(model)]


def added_group(old: Optimizer, model: nn.Module) -> list[Optimizer]:
    held = {id(parameter) for group in old.param_groups for parameter in group["params"]}
    old.add_param_group({"params": [each for each in model.parameters() if id(each) not in held], "lr": 0.0})
    return [old]


def second_optimizer(old: Optimizer, model: nn.Module) -> list[Optimizer]:
    held = {id(parameter) for group in old.param_groups for parameter in group["params"]}
    return [old, SGD([each for each in model.parameters() if id(each) not in held], lr=0.0)]


def frozen(old: Optimizer, model: nn.Module) -> list[Optimizer]:
    held = {id(parameter) for group in old.param_groups for parameter in group["params"]}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in held)
    return [old]


def other_model(old: Optimizer, model: nn.Module) -> list[Optimizer]:
    return []


@pytest.mark.parametrize("go_on", [new_optimizer, added_group, second_optimizer, frozen, other_model])
def test_no_word_of_an_optimizer_that_trains_or_has_nothing_to_train(go_on: Any) -> None:
    dense = net()
    optimizer = sgd(dense)
    model = tdfx.rewrite(dense, QUARTER)
    optimizers = go_on(optimizer, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            learn(model, *optimizers)
        learn(model, *optimizers)
        unrelated = net()
        learn(unrelated, sgd(unrelated))


def test_the_old_model_may_train_on() -> None:
    dense = net()
    optimizer = sgd(dense)
    kept = tdfx.rewrite(dense, QUARTER)
    for _ in range(3):
        learn(dense, optimizer)
    assert len(left_behind._watched) == 1
    for _ in range(left_behind._LOOKS):
        optimizer.step()
    assert left_behind._watched == []
    assert kept is not dense


def test_nothing_is_watched_once_the_model_is_gone() -> None:
    tdfx.rewrite(net(), QUARTER)
    gc.collect()  # graphs refer to themselves
    other = net()
    learn(other, sgd(other))
    assert left_behind._watched == []
    assert left_behind._handle is None
