"""Freeze: which factors are frozen, what the optimizer does with them, and what merge, rewrite and save do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import SGD, AdamW, Optimizer

import tdfx
from tdfx.layers.factorized import Factorized
from tdfx.training.methods.factor_groups import Train

HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)
CORE = ("0.factors.1.weight", "4.factors.0.weight")
OUTER = ("0.factors.0.weight", "0.factors.2.weight", "4.factors.1.weight")
EACH = (("0.factors.0.weight", "4.factors.0.weight"), ("0.factors.1.weight", "4.factors.1.weight"))


def dense() -> nn.Module:
    """Return a convolution, which tucker2 splits in three, a norm, and a linear layer, which svd splits in two."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(96, 8)
    ).double()


def small(policy: tdfx.Policy = HALF) -> nn.Module:
    return tdfx.rewrite(dense(), policy)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)


def batches(seed: int = 1) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(4, 4, 4, 4, dtype=torch.float64, generator=generator)


def backward(model: nn.Module, x: Tensor) -> None:
    loss: Tensor = model(x).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]


def train(model: nn.Module, optimizer: Optimizer, steps: int, data: Iterator[Tensor] | None = None) -> None:
    """Train with zero_grad before backward, so that gradients stay after a step."""
    data = data or batches()
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, next(data))
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".factors." in name and name.endswith("weight")
    }


def not_training(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


# Which factors are frozen


@pytest.mark.parametrize(
    ("which", "every", "turns"),
    [
        ("alternate", 2, [OUTER, CORE, OUTER]),
        ("kernel", None, [OUTER, OUTER, OUTER]),
        ("others", None, [CORE, CORE, CORE]),
    ],
)
def test_the_others_are_frozen_while_the_kernel_trains(
    which: Train, every: int | None, turns: list[tuple[str, ...]]
) -> None:
    model = small()
    optimizer = sgd(model)
    freeze = tdfx.Freeze(model, optimizer, every=every, train=which)
    for expected in turns:
        for _ in range(2):
            assert freeze.frozen == expected
            assert not_training(model) == set(expected)
            train(model, optimizer, 1)


def test_one_factor_after_the_other() -> None:
    model = small()
    optimizer = sgd(model)
    tdfx.Freeze(model, optimizer, every=1, train="each")
    seen = []
    for _ in range(6):
        seen.append(tuple(sorted(factors(model).keys() - not_training(model))))
        train(model, optimizer, 1)
    assert seen[:2] == list(EACH)
    assert seen[2] == ("0.factors.2.weight", "4.factors.0.weight"), (
        "layers of three and of two factors take turns independently"
    )
    assert {name for turn in seen for name in turn} == set(factors(model))


def test_cp_has_four_factors_in_two_groups() -> None:
    model = tdfx.rewrite(
        nn.Sequential(nn.Conv2d(4, 6, 3)), tdfx.Policy(rank=tdfx.Fixed({"0": 3}), scheme="cp", min_gain=0)
    )
    freeze = tdfx.Freeze(model, sgd(model), every=1)
    assert len(factors(model)) == 4
    (trains,) = factors(model).keys() - set(freeze.frozen)
    assert factors(model)[trains].shape[2:].numel() == 3


def test_frozen_factors_stay_and_all_else_moves() -> None:
    model = small()
    optimizer = sgd(model)
    tdfx.Freeze(model, optimizer, every=2)
    start = values(model)
    train(model, optimizer, 2)
    assert moved(model, start) == set(start) - set(OUTER), "biases and the norm keep training"
    second = values(model)
    train(model, optimizer, 2)
    assert moved(model, second) == set(start) - set(CORE)
    assert moved(model, start) == set(start), "over a full cycle everything has moved"


def test_after_the_end_everything_trains() -> None:
    model = small()
    optimizer = sgd(model)
    freeze = tdfx.Freeze(model, optimizer, every=2, until=5)
    train(model, optimizer, 4)
    assert (freeze.frozen, freeze.done) == (OUTER, False)
    train(model, optimizer, 1)
    assert (freeze.frozen, freeze.done, not_training(model)) == ((), True, set())
    assert not optimizer._optimizer_step_post_hooks
    assert str(freeze) == "Freeze(train='alternate', every=2, until=5): 5 steps, done"


# The optimizer


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, foreach=False),
    "SGD, foreach": lambda p: SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True, foreach=True),
    "SGD, fused": lambda p: SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, fused=True),
    "Adam": lambda p: optim.Adam(p, weight_decay=0.1, foreach=False),
    "Adam, foreach": lambda p: optim.Adam(p, weight_decay=0.1, amsgrad=True, foreach=True),
    "AdamW, foreach": lambda p: AdamW(p, weight_decay=0.1, foreach=True),
    "AdamW, fused": lambda p: AdamW(p, weight_decay=0.1, fused=True),
    "Adagrad": lambda p: optim.Adagrad(p, weight_decay=0.1),
    "Adagrad, fused": lambda p: optim.Adagrad(p, weight_decay=0.1, fused=True),
    "Adadelta": lambda p: optim.Adadelta(p, weight_decay=0.1, foreach=True),
    "Adamax": lambda p: optim.Adamax(p, weight_decay=0.1, foreach=True),
    "NAdam": lambda p: optim.NAdam(p, weight_decay=0.1, foreach=True),
    "RAdam": lambda p: optim.RAdam(p, weight_decay=0.1, foreach=True),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.9, centered=True, weight_decay=0.1, foreach=True),
    "Rprop": lambda p: optim.Rprop(p, foreach=True),
    "ASGD": lambda p: optim.ASGD(p, weight_decay=0.1, foreach=True),
    "Adafactor": lambda p: optim.Adafactor(p, weight_decay=0.1, foreach=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_frozen_factors_and_their_state_keep_their_bits(make: Callable[[Any], Optimizer]) -> None:
    model = small()
    optimizer = make(model.parameters())
    data = batches()
    train(model, optimizer, 2, data)  # so that there is momentum that could move frozen factors
    freeze = tdfx.Freeze(model, optimizer, every=3)
    held = factors(model)
    for expected in (OUTER, CORE, OUTER):
        before = values(model)
        states = {name: copy.deepcopy(optimizer.state[held[name]]) for name in expected}
        train(model, optimizer, 2, data)
        assert freeze.frozen == expected
        assert all(held[name].grad is None for name in expected)
        assert moved(model, before) == set(before) - set(expected)
        train(model, optimizer, 1, data)
        assert moved(model, before) == set(before) - set(expected)
        for name in expected:
            torch.testing.assert_close(optimizer.state[held[name]], states[name], rtol=0, atol=0)


def test_a_gradient_that_is_left_would_move_a_frozen_factor() -> None:
    """The negative control: requires_grad alone does not keep a factor from moving."""
    model = small()
    optimizer = sgd(model)
    train(model, optimizer, 1)
    for name in OUTER:
        factors(model)[name].requires_grad_(False)
    before = values(model)
    optimizer.zero_grad(set_to_none=False)
    backward(model, next(batches()))
    optimizer.step()
    assert moved(model, before) >= set(OUTER)


def test_the_gradients_of_other_factors_do_not_change() -> None:
    """The same sums of the same numbers: equal to rounding, some 1e3 roundings of 1e-16."""
    model, twin = small(), small()
    freeze = tdfx.Freeze(model, sgd(model), every=1)
    x = next(batches())
    backward(model, x)
    backward(twin, x)
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if name in freeze.frozen:
            assert parameter.grad is None
            assert theirs[name].grad is not None
        else:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-12, atol=1e-14)


def test_counts_and_moments_go_on_after_a_turn() -> None:
    model = small()
    optimizer = adamw(model)
    tdfx.Freeze(model, optimizer, every=3)
    train(model, optimizer, 7)
    steps = {name: int(optimizer.state[factor]["step"]) for name, factor in factors(model).items()}
    assert steps == dict.fromkeys(OUTER, 3) | dict.fromkeys(CORE, 4)


# Gradients that wait


@pytest.mark.parametrize("to_none", [True, False])
def test_turns_change_at_optimizer_steps_and_not_between(to_none: bool) -> None:
    model = small()
    optimizer = sgd(model)
    freeze = tdfx.Freeze(model, optimizer, every=1)
    data = batches()
    for expected in (OUTER, CORE, OUTER, CORE):
        before = values(model)
        for _ in range(3):  # accumulated
            backward(model, next(data))
            assert freeze.frozen == expected
        optimizer.step()
        assert moved(model, before) == set(before) - set(expected)
        optimizer.zero_grad(set_to_none=to_none)


def test_a_gradient_from_before_is_never_used() -> None:
    """Gradients are never cleared here: those of the kernel when it was frozen must be gone when it trains again."""
    model = small()
    optimizer = SGD(model.parameters(), lr=1e-2)
    tdfx.Freeze(model, optimizer, every=1)
    data = batches()
    backward(model, next(data))
    used = factors(model)[CORE[0]].grad
    assert used is not None
    assert used.abs().max() > 0
    optimizer.step()
    backward(model, next(data))
    optimizer.step()
    third = next(data)
    twin = small()
    twin.load_state_dict(model.state_dict())
    backward(model, third)
    backward(twin, third)
    for name in CORE:
        torch.testing.assert_close(factors(model)[name].grad, factors(twin)[name].grad, rtol=1e-12, atol=1e-14)


def test_a_step_that_a_scaler_skips_does_not_count() -> None:
    model = small().float()
    optimizer = sgd(model)
    freeze = tdfx.Freeze(model, optimizer, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x = next(batches()).float()
    for wrong, expected in ((True, OUTER), (False, CORE)):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean() * (float("inf") if wrong else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert freeze.frozen == expected


# Saving and going on


def full_run(make: Callable[[nn.Module], Optimizer], stop: int, folder: Path | None, *, forget: bool = False) -> Tensor:
    """Train 14 steps, with a stop at which everything is saved and loaded if there is a folder; return all parameters."""
    data = batches()
    model = small()
    optimizer = make(model)
    freeze = tdfx.Freeze(model, optimizer, every=3, until=11)
    train(model, optimizer, stop, data)
    if folder is not None:
        tdfx.save(model, folder / "run", optimizer=optimizer, extra=freeze.state_dict())
        saved = tdfx.read(folder / "run")
        model = dense()
        optimizer = make(model)
        model = tdfx.load(saved, model, optimizer=optimizer)
        assert not_training(model) == set(), "a factor that is frozen for now is not saved as frozen"
        freeze = tdfx.Freeze(model, optimizer, every=3, until=11)
        if not forget:
            freeze.load_state_dict(saved["extra"])
    train(model, optimizer, 14 - stop, data)
    assert freeze.done or forget
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("stop", [0, 2, 3, 4, 10, 11, 12])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    make: Callable[[nn.Module], Optimizer], stop: int, tmp_path: Path
) -> None:
    assert torch.equal(full_run(make, stop, tmp_path), full_run(make, 0, None))


def test_without_its_state_the_run_ends_differently(tmp_path: Path) -> None:
    assert not torch.equal(full_run(sgd, 4, tmp_path, forget=True), full_run(sgd, 0, None))


def test_a_schedule_and_a_rewarm_that_end_do_not_stop_later_hooks() -> None:
    model = small()
    optimizer = sgd(model)
    freeze = tdfx.Freeze(model, optimizer, every=1, until=1)
    rewarm = tdfx.Rewarm(optimizer, 1)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *given: calls.append(1))
    train(model, optimizer, 3)
    assert calls == [1, 1, 1]
    assert freeze.done
    assert rewarm.done
    assert freeze.state_dict()["taken"] == 1


def test_states_of_other_settings_are_refused() -> None:
    model = small()
    optimizer = sgd(model)
    freeze = tdfx.Freeze(model, optimizer, every=3)
    train(model, optimizer, 1)
    state = freeze.state_dict()
    assert state == {"every": 3, "train": "alternate", "until": None, "taken": 1, "done": False}
    for wrong in ({**state, "every": 4}, {**state, "taken": -1}, {**state, "taken": True}, {**state, "done": 0}, None):
        with pytest.raises(tdfx.PolicyError, match=r"not the state of a Freeze with every=3, train='alternate' and"):
            freeze.load_state_dict(cast("Any", wrong))
    assert freeze.state_dict() == state
    freeze.remove()
    with pytest.raises(tdfx.PolicyError, match=r"This Freeze has ended.*Make a new Freeze"):
        freeze.load_state_dict(state)


# Merge, rewrite, and what else looks at the factors


@pytest.mark.parametrize("turn", [0, 1])
def test_a_weight_with_frozen_factors_is_merged_as_one_that_trains(turn: int) -> None:
    model = small()
    optimizer = sgd(model)
    freeze = tdfx.Freeze(model, optimizer, every=2)
    train(model, optimizer, 2 + turn)
    expected = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if isinstance(module, Factorized)
    }
    merged = tdfx.merge(model, optimizer=optimizer)
    assert not_training(merged) == set()
    for name, weight in expected.items():
        torch.testing.assert_close(merged.get_submodule(name).weight, weight, rtol=1e-12, atol=1e-14)
    before = values(merged)
    train(merged, optimizer, 4)
    assert moved(merged, before) == set(before)
    assert freeze.done, "the schedule ends with the factors"
    assert not optimizer._optimizer_step_post_hooks


def test_a_weight_that_the_user_froze_is_merged_as_frozen() -> None:
    model = small()
    for factor in cast("Any", model)[0].factors:
        factor.weight.requires_grad_(False)
    tdfx.Freeze(model, sgd(model), every=2)
    assert not_training(tdfx.merge(model)) == {"0.weight"}


@pytest.mark.parametrize("turn", [0, 1])
def test_lower_ranks_train_and_a_new_schedule_goes_on(turn: int) -> None:
    model = small()
    optimizer = sgd(model)
    lower = tdfx.plan(model, QUARTER)
    freeze = tdfx.Freeze(model, optimizer, every=2)
    train(model, optimizer, 2 + turn)
    lowered = tdfx.rewrite(model, lower, optimizer=optimizer)
    assert len(lower.factorized) == 2
    assert not_training(lowered) == set()
    again = tdfx.Freeze(lowered, optimizer, every=2)
    again.load_state_dict(freeze.state_dict())
    assert again.frozen == CORE
    before = values(lowered)
    train(lowered, optimizer, 2 - turn)
    assert moved(lowered, before) == set(before) - set(CORE)
    assert freeze.done
    assert set(again.frozen) == set(OUTER)


def test_sites_that_are_rewritten_later_join_and_the_former_schedule_ends() -> None:
    model: nn.Module = dense()
    optimizer = sgd(model)
    model = tdfx.rewrite(
        model, tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1, exclude=("4",)), optimizer=optimizer
    )
    former = tdfx.Freeze(model, optimizer, every=2)
    train(model, optimizer, 1)
    model = tdfx.rewrite(model, HALF, optimizer=optimizer)
    assert former.frozen == OUTER[:2], "sites that were factorized before keep their factors, and stay frozen"
    assert not_training(tdfx.merge(model)) == set()
    train(model, optimizer, 1)
    assert not_training(model) == {CORE[0]}
    assert not_training(tdfx.merge(model)) == set(), "turns of the former schedule are known in the rewritten model"
    state = former.state_dict()
    now = tdfx.Freeze(model, optimizer, every=2)
    now.load_state_dict(state)
    assert former.done
    assert not_training(model) == set(CORE)
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_a_copy_of_the_model_takes_its_own_schedule() -> None:
    model = small()
    optimizer = sgd(model)
    freeze = tdfx.Freeze(model, optimizer, every=2)
    twin, other = copy.deepcopy((model, optimizer))
    assert not_training(tdfx.merge(twin)) == set()
    twin_freeze = tdfx.Freeze(twin, other, every=1)
    train(twin, other, 1)
    assert twin_freeze.frozen == CORE
    assert freeze.frozen == OUTER
    assert not freeze.done


def test_a_checkpoint_knows_what_the_user_froze() -> None:
    model = small()
    cast("Any", model)[1].weight.requires_grad_(False)
    cast("Any", model)[4].factors[1].bias.requires_grad_(False)
    tdfx.Freeze(model, sgd(model), every=2)
    assert tdfx.state(model)["frozen"] == ["1.weight", "4.factors.1.bias"]


def test_frobenius_decay_acts_on_the_factors_that_train() -> None:
    model, twin = small(), small()
    optimizer, other = sgd(model), sgd(twin)
    freeze = tdfx.Freeze(model, optimizer, every=5)
    for trained, its_optimizer in ((model, optimizer), (twin, other)):
        tdfx.FrobeniusDecay(trained, its_optimizer)
        train(trained, its_optimizer, 1)
    theirs, start = values(twin), values(small())
    for name, value in values(model).items():
        if name in freeze.frozen:
            assert torch.equal(value, start[name])
        else:
            torch.testing.assert_close(value, theirs[name], rtol=1e-11, atol=1e-13)


# What the user froze


def test_what_the_user_froze_stays_frozen() -> None:
    model = small()
    mine = {"0.factors.0.weight", "0.factors.2.bias", "1.weight", *(name for name in factors(model) if name[0] == "4")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in mine)
    optimizer = sgd(model)
    freeze = tdfx.Freeze(model, optimizer, every=1)
    seen = []
    for _ in range(2):
        seen.append(freeze.frozen)
        assert not_training(model) == mine | set(freeze.frozen)
        train(model, optimizer, 1)
    assert seen == [("0.factors.2.weight",), ("0.factors.1.weight",)]
    thawed = "0.factors.0.weight"
    factors(model)[thawed].requires_grad_(True)
    train(model, optimizer, 3)
    assert thawed not in not_training(model), "a factor that the user thaws has no turn, and trains from then on"
    freeze.remove()
    assert not_training(model) == mine - {thawed}


def test_a_layer_that_the_user_freezes_later_is_not_thawed() -> None:
    model = small()
    optimizer = sgd(model)
    freeze = tdfx.Freeze(model, optimizer, every=1)
    factors(model)["0.factors.1.weight"].requires_grad_(False)
    train(model, optimizer, 4)
    assert "0.factors.1.weight" in not_training(model)
    freeze.remove()
    assert not_training(model) == {"0.factors.1.weight"}


# Compiled


class Counting:
    """A backend that counts how often it compiles."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("which", "turns"), [("alternate", 2), ("each", 6)])
def test_a_compiled_model_is_compiled_once_for_each_turn(which: Train, turns: int) -> None:
    backend = Counting()
    model = cast("nn.Module", torch.compile(small(), backend=backend, fullgraph=True))
    optimizer = sgd(model)
    freeze = tdfx.Freeze(model, optimizer, every=2, train=which, until=6 * turns)
    counts = []
    for _ in range(3):
        train(model, optimizer, 2 * turns)
        counts.append(backend.count)
    assert counts == [turns, turns, turns]
    assert freeze.done
    train(model, optimizer, 2)
    assert backend.count == turns + 1, "and once more for all together"


@pytest.mark.usefixtures("fresh")
def test_a_compiled_step_changes_turns_too() -> None:
    model, twin = small(), small()
    optimizer, other = sgd(model), sgd(twin)
    freeze = tdfx.Freeze(model, optimizer, every=2)
    tdfx.Freeze(twin, other, every=2)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    data = batches()
    for _ in range(5):
        optimizer.zero_grad()
        backward(model, next(data))
        step()
    assert freeze.state_dict()["taken"] == 5
    train(twin, other, 5)
    for name, value in values(twin).items():
        torch.testing.assert_close(dict(model.named_parameters())[name], value, rtol=1e-11, atol=1e-13)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"train='alternate' changes by turns, and every= is missing, which says when.*every=len\(loader\)"),
        ({"every": 0}, r"every=0 is not a whole number of at least 1"),
        ({"every": 2, "until": 1.5}, r"until=1\.5 is not a whole number of at least 1.*until=20_000"),
        ({"every": 2, "train": "kernel"}, r"every=2 says when turns change, and with train='kernel' the same"),
        ({"every": 2, "train": "kernal"}, r"train='kernal' is not known.*Nearest: .*kernel"),
    ],
)
def test_contradicting_settings_are_refused(settings: Any, message: str) -> None:
    model = small()
    optimizer = sgd(model)
    with pytest.raises(tdfx.PolicyError, match=message):
        tdfx.Freeze(model, optimizer, **settings)
    assert not optimizer._optimizer_step_post_hooks
    assert not_training(model) == set()


def test_models_and_optimizers_that_do_not_match_are_refused() -> None:
    model = small()
    optimizer = sgd(model)
    with pytest.raises(
        tdfx.ModelError, match="Sequential holds no factorized layer whose factors could train by turns"
    ):
        tdfx.Freeze(dense(), optimizer, every=1)
    with pytest.raises(tdfx.ModelError, match=r"model is a str, not a torch\.nn\.Module"):
        tdfx.Freeze(cast("Any", "model"), optimizer, every=1)
    with pytest.raises(tdfx.OptimizerError, match=r"optimizer='sgd' is a str, not a torch\.optim\.Optimizer"):
        tdfx.Freeze(model, cast("Any", "sgd"), every=1)
    with pytest.raises(tdfx.OptimizerError, match=r"The optimizer holds no factor of .*make one Freeze for each"):
        tdfx.Freeze(model, sgd(small()), every=1)
    with pytest.raises(tdfx.OptimizerError, match="holds 1 of the 3 factors of '0' that train"):
        tdfx.Freeze(model, SGD([factors(model)[CORE[0]]], lr=0.1), every=1)
    with pytest.raises(tdfx.OptimizerError, match="LBFGS keeps one flat history"):
        tdfx.Freeze(model, optim.LBFGS(model.parameters()), every=1)
    assert not_training(model) == set()
    model.requires_grad_(False)
    with pytest.raises(tdfx.ModelError, match=r"None of the 2 factorized layers of .* has two factors that train"):
        tdfx.Freeze(model, optimizer, every=1)


def test_two_optimizers_have_a_schedule_each() -> None:
    model = small()
    parts = cast("Any", model)
    first, second = SGD(parts[0].parameters(), lr=0.1), AdamW(parts[4].parameters())
    conv_freeze, head_freeze = tdfx.Freeze(model, first, every=1), tdfx.Freeze(model, second, every=2)
    assert (conv_freeze.frozen, head_freeze.frozen) == (OUTER[:2], OUTER[2:])
    backward(model, next(batches()))
    first.step()
    assert (conv_freeze.frozen, head_freeze.frozen) == (CORE[:1], OUTER[2:])
    assert factors(model)[CORE[1]].grad is not None, "its optimizer has not stepped yet"
    second.step()
    assert head_freeze.frozen == OUTER[2:]


class FullyShardedDataParallel(nn.Module):
    """A stand-in, since Freeze knows the class by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.module = small()


def test_the_former_fsdp_is_refused() -> None:
    model = FullyShardedDataParallel()
    with pytest.raises(tdfx.ModelError, match=r"FullyShardedDataParallel.*slices of one flat parameter"):
        tdfx.Freeze(model, sgd(model), every=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to capture a graph on")
def test_a_captured_step_is_refused() -> None:
    model = small().cuda()
    optimizer = AdamW(model.parameters(), capturable=True)
    tdfx.Freeze(model, optimizer, every=1)
    backward(model, next(batches()).cuda())
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(tdfx.OptimizerError, match="captured in a CUDA graph"), torch.cuda.graph(graph):
        optimizer.step()
