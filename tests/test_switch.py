"""When to switch: at a given step, when the ranks have settled, only if it pays off, and the same after a resume."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LinearLR

import tdfx
from tdfx.distributed.processes import Solo
from tdfx.layers.factorized import Factorized
from tdfx.training.switch.watch import RankWatch, Watched
from tdfx.training.switch.when import When
from tdfx.wrappers.unwrap import unwrap

# Layers this small take most of their time to start, which would make no factors pay.
COST = tdfx.Modelled(seconds_per_call=0)
QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, cost=COST)
SIGNAL = tdfx.Policy(rank=tdfx.VBMF(), min_gain=0, round_to=1, cost=COST)
SIZE = 48


class Ticking:
    """A clock in which each reading is a second after the last."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Pair(nn.Module):
    """Two linear maps of the same input, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = nn.Linear(SIZE, SIZE, bias=False)
        self.slow = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fast(x), self.slow(x)


def build(*, slow: float = 0.02) -> tuple[nn.Module, Optimizer]:
    """Return a model whose first layer learns quickly and whose second layer does not, and its optimizer."""
    torch.manual_seed(0)
    model = Pair().double()
    groups: list[dict[str, Any]] = [{"params": [model.fast.weight]}, {"params": [model.slow.weight], "lr": slow}]
    return model, SGD(groups, lr=0.2, momentum=0.5)


def targets() -> list[Tensor]:
    """Return two matrices of rank 4."""
    draw = torch.Generator().manual_seed(1)
    sides = [torch.randn(SIZE, 4, dtype=torch.float64, generator=draw) for _ in range(4)]
    return [sides[0] @ sides[1].T / 16, sides[2] @ sides[3].T / 16]


def learn(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Take a training step towards the two matrices; the same for the same step."""
    x = torch.randn(4 * SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    loss = sum((y - x @ w.T).square().sum() / len(x) / 2 for y, w in zip(model(x), targets(), strict=True))
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def train(
    switch: tdfx.Switch, model: nn.Module, optimizer: Optimizer, steps: range, **arguments: Any
) -> Iterator[tuple[int, nn.Module]]:
    for step in steps:
        learn(model, optimizer, step)
        model = switch.step(model, optimizer=optimizer, **arguments)
        yield step, model


def run(switch: tdfx.Switch, steps: int, *, slow: float = 0.02, **arguments: Any) -> tuple[list[int], nn.Module]:
    """Train; return the steps that returned another model, and the last model."""
    model, optimizer = build(slow=slow)
    changed, before = [], model
    for step, now in train(switch, model, optimizer, range(1, steps + 1), **arguments):
        if now is not before:
            changed.append(step)
        before = now
    return changed, before


def factorized(model: nn.Module) -> dict[str, Factorized]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Factorized)}


def decisions(switch: tdfx.Switch) -> list[tuple[int, str, tuple[str, ...]]]:
    return [(event.step, event.what, event.sites) for event in switch.events]


@pytest.mark.parametrize(("when", "step"), [(tdfx.AtStep(3), 3), (tdfx.AtEpoch(2, steps_per_epoch=2), 4)])
def test_it_switches_once_at_the_given_step(when: When, step: int) -> None:
    switch = tdfx.Switch(QUARTER, when=when)
    changed, model = run(switch, 6)
    assert changed == [step]
    assert switch.done
    assert set(factorized(model)) == {"fast", "slow"}
    assert decisions(switch) == [(step, "switched", ("fast", "slow"))]
    assert "the step that was asked for" in str(switch)
    assert switch.plan is not None
    assert len(switch.plan.factorized) == 2


@pytest.mark.parametrize(
    ("warm_up", "step"),
    [(5, 10), (14, 18), (100, 20)],
    ids=["over before the early step", "over some steps later", "longer than a fifth of the training"],
)
@pytest.mark.parametrize("resumed_after", [0, 9, 10, 17])
def test_an_early_switch_waits_for_learning_rates_that_rise(warm_up: int, step: int, resumed_after: int) -> None:
    switch = tdfx.Switch(QUARTER, total_steps=100, weigh=False, collect=8)
    model, optimizer = build()
    scheduler = LinearLR(optimizer, 0.01, total_iters=warm_up)
    for now in range(1, 30):
        learn(model, optimizer, now)
        scheduler.step()
        if now == resumed_after + 1 and resumed_after:
            state = saved_and_loaded(switch.state_dict())
            switch = tdfx.Switch(QUARTER, total_steps=100, weigh=False, collect=8)
            switch.load_state_dict(state, optimizer=optimizer)
        model = switch.step(model, optimizer=optimizer)
    assert decisions(switch) == [(step, "switched", ("fast", "slow"))]


def test_a_step_that_was_asked_for_waits_for_nothing() -> None:
    switch = tdfx.Switch(QUARTER, when=tdfx.AtStep(10), total_steps=100, weigh=False)
    model, optimizer = build()
    scheduler = LinearLR(optimizer, 0.01, total_iters=50)
    for now in range(1, 12):
        learn(model, optimizer, now)
        scheduler.step()
        model = switch.step(model, optimizer=optimizer)
    assert decisions(switch) == [(10, "switched", ("fast", "slow"))]


SETTLED = tdfx.Settled(every=2, window=3, tolerance=0.02, moved=0.2)


def test_all_sites_switch_at_the_first_look_at_which_half_of_them_have_settled() -> None:
    switch = tdfx.Switch(SIGNAL, when=SETTLED)
    # A site alone is watched by itself, so that it shows when each of the two settles.
    alone = [tdfx.Switch(replace(SIGNAL, include=(name,)), when=SETTLED) for name in ("fast", "slow")]
    changed, model = run(switch, 200)
    (fast,), (slow,) = (run(each, 200)[0] for each in alone)
    assert changed == [fast]
    assert fast < slow
    assert set(factorized(model)) == {"fast", "slow"}
    assert decisions(switch) == [(fast, "switched", ("fast", "slow"))]
    assert switch.events[0].why == "the stable rank of 1 of 2 sites held within 0.02 over 3 looks"
    assert switch.plan is not None
    assert {site.name: site.ranks for site in switch.plan.factorized} == {
        name: layer.origin.ranks for name, layer in factorized(model).items()
    }
    assert switch.plan.parameters_before == 2 * SIZE * SIZE


@pytest.mark.parametrize(("places", "switches"), [((0,), False), ((0, 1), True), ((0, 1, 2), True)], ids=str)
def test_fewer_than_half_of_the_sites_do_not_switch_the_others(places: tuple[int, ...], switches: bool) -> None:
    switch = tdfx.Switch(QUARTER, when=tdfx.Settled(every=1, window=2))
    model: nn.Module = Uneven()
    for step in range(12):
        if step == 1:
            for place in places:
                turn(model.get_submodule(f"layers.{place}"))
        model = switch.step(model)
    assert switch.done == switches
    assert len(factorized(model)) == (4 if switches else 0)


def test_ranks_at_the_start_look_settled_and_nothing_is_switched() -> None:
    torch.manual_seed(0)
    model: nn.Module = Pair()
    switch = tdfx.Switch(QUARTER, when=SETTLED)
    for _ in range(50):
        assert switch.step(model) is model
    assert switch.events == ()
    assert not switch.done
    # If no movement is required, the same ranks count as settled.
    eager = tdfx.Switch(QUARTER, when=tdfx.Settled(every=2, window=2, moved=0.0, tolerance=0.2))
    for _ in range(50):
        model = eager.step(model)
    assert set(factorized(model)) == {"fast", "slow"}


def shuffled(model: nn.Module, step: int) -> None:
    """Give the layers new noise of the same size: they turn, keep their rank, and learn nothing."""
    draw = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw))


def test_sites_without_signal_are_kept_at_the_switch() -> None:
    torch.manual_seed(0)
    model: nn.Module = Pair()
    switch = tdfx.Switch(SIGNAL, when=tdfx.Settled(every=1, window=2, tolerance=0.5))
    for step in range(1, 6):
        shuffled(model, step)
        assert switch.step(model) is model
    assert switch.done
    assert decisions(switch) == [(3, "kept", ("fast", "slow"))]
    assert switch.events[0].why.startswith("no_signal")


def test_a_site_without_signal_is_kept_while_the_others_are_switched() -> None:
    torch.manual_seed(0)
    model: nn.Module = Pair()
    switch = tdfx.Switch(SIGNAL, when=tdfx.Settled(every=1, window=2, tolerance=0.5))
    for step in range(1, 6):
        if not switch.done:
            shuffled(model, step)
            model.get_parameter("fast.weight").data.mul_(0.1).add_(targets()[0])
        model = switch.step(model)
    assert set(factorized(model)) == {"fast"}
    assert decisions(switch) == [(3, "switched", ("fast",)), (3, "kept", ("slow",))]
    assert switch.events[1].why.startswith("no_signal")


def test_at_the_timeout_all_sites_are_switched() -> None:
    when = tdfx.Settled(every=2, window=2, tolerance=1e-12, timeout=31)
    changed, model = run(switch := tdfx.Switch(SIGNAL, when=when), 35)
    assert changed == [31]
    assert set(factorized(model)) == {"fast", "slow"}
    assert switch.events[-1].why == "the timeout"


def test_it_does_not_switch_if_that_does_not_pay_off() -> None:
    def at(total: int) -> tdfx.Switch:
        switch = tdfx.Switch(QUARTER, when=tdfx.AtStep(20), total_steps=total, clock=Ticking(), recompile_seconds=10)
        run(switch, 25)
        return switch

    late, early = at(22), at(10_000)
    assert decisions(late) == [(20, "too_late", ("fast", "slow"))]
    assert late.done
    assert late.plan is None
    # A step takes one tick; at most the two steps that are left can be saved, so no plan is made.
    assert late.events[0].why.startswith(
        "a switch saves at most 2 s in the 2 steps left, and a plan and a rewrite take "
    )
    assert late.spent["planning"] == 0
    assert decisions(early) == [(20, "switched", ("fast", "slow"))]


def test_a_plan_that_factorizes_nothing_is_recorded_with_the_reason() -> None:
    switch = tdfx.Switch(tdfx.Policy(rank=tdfx.Ratio(of=1.0)), when=tdfx.AtStep(2))
    changed, _ = run(switch, 4)
    assert changed == []
    assert switch.done
    assert [event.what for event in switch.events] == ["kept"]
    assert "no_gain" in str(switch) or "too_small" in str(switch)
    empty = tdfx.Switch(when=tdfx.AtStep(1))
    empty.step(nn.ReLU())
    assert "the model has no convolution or linear layer" in str(empty)
    excluded = tdfx.Switch(tdfx.Policy(exclude=("*",)), when=tdfx.Settled())
    excluded.step(Pair())
    assert excluded.done
    assert "wants no site" in str(excluded)


def saved_and_loaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def settled_switch() -> tdfx.Switch:
    return tdfx.Switch(SIGNAL, when=SETTLED, total_steps=10_000, rewarm=5, clock=Ticking())


def test_a_resumed_run_decides_and_computes_the_same() -> None:
    steps = 120
    model, optimizer = build()
    uninterrupted = settled_switch()
    points = {1, 2, 5, *range(10, steps, 10)}
    saved = {}
    for step, now in train(uninterrupted, model, optimizer, range(1, steps + 1)):
        model = now
        if step in points or (uninterrupted.events and uninterrupted.events[-1].step in {step, step - 1}):
            state = {
                "switch": uninterrupted.state_dict(),
                "model": now.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            saved[step] = saved_and_loaded(state)
    assert uninterrupted.done
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert [event.what for event in uninterrupted.events] == ["switched"]
    for step, state in saved.items():
        resumed, resumed_optimizer = build()
        switch = settled_switch()
        switch.load_state_dict(state["switch"], optimizer=resumed_optimizer)
        if switch.plan is not None:
            resumed = tdfx.rewrite(resumed, switch.plan, optimizer=resumed_optimizer)
        resumed.load_state_dict(state["model"])
        resumed_optimizer.load_state_dict(state["optimizer"])
        for _, now in train(switch, resumed, resumed_optimizer, range(step + 1, steps + 1)):
            resumed = now
        assert decisions(switch) == decisions(uninterrupted)
        assert switch.plan == uninterrupted.plan
        assert list(resumed.state_dict()) == list(model.state_dict())
        assert all(map(torch.equal, resumed.state_dict().values(), model.state_dict().values()))


def test_the_steps_before_a_resume_count() -> None:
    first, fresh = tdfx.Switch(QUARTER, when=tdfx.AtStep(4)), tdfx.Switch(QUARTER, when=tdfx.AtStep(4))
    model, _ = build()
    for _ in range(3):
        first.step(model)
    assert fresh.step(model) is model
    fresh.load_state_dict(first.state_dict())
    assert factorized(fresh.step(model))


def test_a_state_of_another_switch_is_refused_and_nothing_is_loaded() -> None:
    switch = tdfx.Switch(QUARTER, when=tdfx.AtStep(4))
    before = switch.state_dict()
    other = tdfx.Switch(SIGNAL, when=tdfx.AtStep(4)).state_dict()
    with pytest.raises(
        tdfx.PolicyError, match=r"saved with policy=Policy\(rank=VBMF.*Make the Switch with the same policy"
    ):
        switch.load_state_dict(other)
    with pytest.raises(tdfx.PolicyError, match=r"saved with when=AtStep\(step=5\), and this switch has when=AtStep"):
        switch.load_state_dict(tdfx.Switch(QUARTER, when=tdfx.AtStep(5)).state_dict())
    with pytest.raises(tdfx.PolicyError, match="not the state of a Switch of this version: 'nothing'"):
        switch.load_state_dict("nothing")  # type: ignore[arg-type]
    for key, value in [("step", "x"), ("events", [{"step": 1}]), ("plan", "{}"), ("times", None)]:
        with pytest.raises(tdfx.PolicyError, match=r"is damaged \("):
            switch.load_state_dict({**before, "step": 2, key: value})
    warming = {**before, "step": 2, "rewarms": [{"steps": 4, "start": 0.1, "taken": 1, "done": False}]}
    with pytest.raises(tdfx.OptimizerError, match="A re-warm-up of 1 optimizers was under way, and 0 are given"):
        switch.load_state_dict(warming)
    assert switch.state_dict() == before


def test_a_step_that_fails_changes_nothing_and_can_be_taken_again() -> None:
    model, optimizer = build()
    switch = tdfx.Switch(QUARTER, when=tdfx.AtStep(2), clock=Ticking())
    switch.step(model, optimizer=optimizer)
    before = switch.state_dict()
    with pytest.raises(tdfx.OptimizerError, match="are in none of the optimizers given"):
        switch.step(model, optimizer=SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    assert switch.state_dict() == before
    assert factorized(switch.step(model, optimizer=optimizer))


def test_a_failed_look_changes_nothing() -> None:
    switch = tdfx.Switch(SIGNAL, when=tdfx.Settled(every=1))
    model = Pair()
    switch.step(model)
    before = switch.state_dict()
    with pytest.raises(tdfx.ModelError, match=r"has no weight 'fast\.weight', the weight of the watched site 'fast'"):
        switch.step(nn.Sequential(nn.Linear(4, 4)))
    after = switch.state_dict()
    assert (after["step"], after["watch"]["looks"]) == (before["step"], before["watch"]["looks"])


def test_a_switch_starts_a_rewarm_and_passes_arguments_on() -> None:
    model, optimizer = build()
    switch = tdfx.Switch(QUARTER, when=tdfx.AtStep(1), rewarm=3)
    rewritten = switch.step(model, optimizer=optimizer, emit="modules", init="variance")
    assert isinstance(rewritten, Pair)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    for step in range(3):
        learn(rewritten, optimizer, step)
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(tdfx.OptimizerError, match=r"rewarm=3 scales learning rates, and step\(\) got no optimizer="):
        tdfx.Switch(QUARTER, when=tdfx.AtStep(1), rewarm=3).step(model)
    with pytest.raises(
        tdfx.PolicyError, match=r"step\(\) got 'inti', which tdfx.rewrite does not take. Nearest: 'init'"
    ):
        tdfx.Switch(QUARTER, when=tdfx.AtStep(9)).step(model, inti="variance")


def test_an_optimizer_without_rates_fails_before_anything_is_changed() -> None:
    model, optimizer = build()
    for group in optimizer.param_groups:
        del group["lr"]
    switch = tdfx.Switch(QUARTER, when=tdfx.AtStep(1), rewarm=3)
    before = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    with pytest.raises(tdfx.OptimizerError, match="SGD has a group without 'lr'"):
        switch.step(model, optimizer=optimizer)
    assert [id(parameter) for group in optimizer.param_groups for parameter in group["params"]] == before
    assert not switch.done


def test_processes_agree_at_looks_and_plans_and_at_no_other_step(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed: list[int] = []
    switch = tdfx.Switch(SIGNAL, when=tdfx.Settled(every=5, timeout=21), total_steps=1000, weigh=False)

    class Agreeing(Solo):
        def broadcast_object(self, value: Any) -> Any:
            agreed.append(switch.steps)
            # The first process finds one settled site of two at the tenth step; this process finds none.
            return 1 if agreed[-1] == 10 and value == 0 else value

    monkeypatch.setattr(
        "tdfx.training.switch.switch.unwrap", lambda model: replace(unwrap(model), processes=Agreeing())
    )
    changed, model = run(switch, 22, slow=0.2)
    assert agreed == [1, 5, 10, 10]
    assert changed == [10]
    assert set(factorized(model)) == {"fast", "slow"}


class Images(nn.Module):
    """Two convolutions, one in groups, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.second = nn.ConvTranspose2d(32, 32, 3, groups=2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_in_any_wrapper_and_dtype_are_watched(compiled: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inner = Images().to(dtype)
    model: nn.Module = torch.compile(inner, backend="eager") if compiled else inner  # type: ignore[assignment]
    switch = tdfx.Switch(QUARTER, when=tdfx.Settled(every=1, window=1, tolerance=0.9, moved=0.0, timeout=5))
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    for _ in range(5):
        model = switch.step(model, example_inputs=(x,))
    assert switch.done
    assert switch.plan is not None
    assert isinstance(model, torch._dynamo.OptimizedModule) == compiled
    assert len(factorized(model)) == len(switch.plan.factorized) > 0
    with torch.no_grad():
        assert model(x).shape == (2, 10)


def test_looks_are_stretched_to_stay_cheap() -> None:
    x = torch.randn(8, SIZE)
    switch = tdfx.Switch(SIGNAL, when=tdfx.Settled(every=2))
    switch.step(Pair(), example_inputs=(x,))
    # 6 reads of a value, at 60 operations, against 6 operations for each of 8 samples: 1 percent is 750 steps.
    assert switch.state_dict()["watch"]["interval"] == 750


def test_the_stable_rank_and_the_turn_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    model = Pair().double()
    watch = RankWatch(SETTLED, 1, {"fast": Watched("fast.weight")})
    with torch.no_grad():
        model.fast.weight += 3 * torch.outer(torch.randn(SIZE), torch.randn(SIZE))
        seen = watch.look(model).sites["fast"]
        values = torch.linalg.svdvals(model.fast.weight)
        assert seen.ranks == pytest.approx([float(values.square().sum() / values[0] ** 2)], rel=1e-6)
        assert seen.turned == pytest.approx(0.0, abs=1e-3)
        model.fast.weight *= 0.5
        later = watch.look(model).look(model).sites["fast"]
        assert later.turned == pytest.approx(0.0, abs=1e-3)
        model.slow.weight.zero_()
        still = RankWatch(SETTLED, 1, {"slow": Watched("slow.weight")}).look(model).look(model)
        assert still.sites["slow"].turned == 0.0
        model.slow.weight.fill_(1.0)
        left = still.look(model).sites["slow"]
        assert left.turned == pytest.approx(1.0)
        assert left.ranks[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tdfx.AtStep(0), "step=0 is not a whole number of at least 1"),
        (lambda: tdfx.AtStep(True), "step=True is not a whole number"),
        (lambda: tdfx.AtEpoch(0, steps_per_epoch=3), "epoch=0 is not a whole number"),
        (lambda: tdfx.AtEpoch(1, steps_per_epoch=2.5), "steps_per_epoch=2.5 is not a whole number"),  # type: ignore[arg-type]
        (lambda: tdfx.Settled(every=0), "every=0 is not"),
        (lambda: tdfx.Settled(window=0), "window=0 is not"),
        (lambda: tdfx.Settled(timeout=0), "timeout=0 is not"),
        (lambda: tdfx.Settled(tolerance=0.0), r"tolerance=0\.0 is not a positive number"),
        (lambda: tdfx.Settled(moved=1.0), r"moved=1\.0 is not in \[0, 1\)"),
        (lambda: tdfx.Switch(when=5), "when=5 does not say when to switch"),  # type: ignore[arg-type]
        (lambda: tdfx.Switch("vbmf", when=tdfx.AtStep(1)), "policy='vbmf' is a str"),  # type: ignore[arg-type]
        (lambda: tdfx.Switch(when=tdfx.AtStep(1), total_steps=0), "total_steps=0 is not"),
        (lambda: tdfx.Switch(when=tdfx.AtStep(1), rewarm=-1), "rewarm=-1 is not"),
        (lambda: tdfx.Switch(when=tdfx.AtStep(1), recompile_seconds=-1), "recompile_seconds=-1 is not a time"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(tdfx.PolicyError, match=message):
        make()


class Uneven(nn.Module):
    """Four layers of one size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def turn(layer: nn.Module) -> None:
    """Turn a weight, after which its rank stays."""
    weight = layer.get_parameter("weight")
    generator = torch.Generator().manual_seed(1)
    columns = torch.randn(SIZE, 4, generator=generator)
    weight.data.add_(columns @ torch.randn(4, SIZE, generator=generator))


def test_a_budget_is_kept_by_one_switch_of_all_sites() -> None:
    policy = tdfx.Policy(parameters=0.5, min_gain=0, round_to=1, cost=COST)
    switch = tdfx.Switch(policy, when=tdfx.Settled(every=1, window=2))
    model: nn.Module = Uneven()
    dense = sum(parameter.numel() for parameter in model.parameters())
    switch.step(model)
    for place in (0, 1):
        turn(model.get_submodule(f"layers.{place}"))
    planned = tdfx.plan(model, policy)
    for _ in range(7):
        model = switch.step(model)
    assert [event.what for event in switch.events] == ["switched"]
    assert switch.plan is not None
    assert [site.ranks for site in switch.plan] == [site.ranks for site in planned]
    assert 0.49 < sum(parameter.numel() for parameter in model.parameters()) / dense <= 0.5
    assert switch.plan.parameters_before == dense


# States that the version wrote which switched one site after another. The model is three linear layers of 16 features
# without bias, and the first layer turned at the second step. In "spare", a budget did not need the first layer, since the
# second layer alone could keep it.
RULE = replace(QUARTER, round_to=1)
EARLIER: dict[str, tuple[tdfx.Policy, When]] = {
    "at a step": (RULE, tdfx.AtStep(4)),
    "watching": (RULE, EARLY := tdfx.Settled(every=1, window=2, tolerance=0.1, timeout=30)),
    "one of three switched": (RULE, EARLY),
    "one of three switched, budget": (tdfx.Policy(parameters=0.5, min_gain=0, round_to=1, cost=COST), EARLY),
    "spare": (tdfx.Policy(parameters=0.8, min_gain=0, round_to=1, cost=COST), EARLY),
}


def go_on(name: str, turned: tuple[int, ...] = (), steps: int = 30) -> tuple[tdfx.Switch, list[int], nn.Module]:
    """Resume from a saved state, turn some layers, and return the steps that gave another model."""
    state = torch.load(Path(__file__).parent / "fixtures" / "switch_states.pt", weights_only=True)[name]
    policy, when = EARLIER[name]
    switch = tdfx.Switch(policy, when=when, rewarm=5 if state["switch"]["rewarms"] else 0)
    model: nn.Module = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    switch.load_state_dict(state["switch"], optimizer=optimizer)
    if switch.plan is not None:
        model = tdfx.rewrite(model, switch.plan, optimizer=optimizer)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for place in turned:
        model.get_parameter(f"{place}.weight").data.add_(torch.outer(torch.ones(16), torch.arange(16.0)))
    changed = []
    while switch.steps < steps:
        after = switch.step(model, optimizer=optimizer)
        changed += [switch.steps] if after is not model else []
        model = after
    assert switch.done
    return switch, changed, model


def test_a_state_from_before_the_first_switch_goes_on_as_any_other() -> None:
    for name, turned, expected in (
        ("at a step", (), 4),
        ("watching", (1,), 6),
        ("watching", (), 30),
        ("spare", (1,), 6),
        ("spare", (), 30),
    ):
        switch, changed, model = go_on(name, turned)
        assert changed == [expected]
        assert switch.plan is not None
        assert set(factorized(model)) == {site.name for site in switch.plan.factorized}


@pytest.mark.parametrize(("turned", "step"), [((1,), 9), ((), 30)], ids=str)
def test_a_state_with_switched_sites_leaves_those_and_switches_the_others_together(
    turned: tuple[int, ...], step: int
) -> None:
    switch, changed, model = go_on("one of three switched", turned)
    assert changed == [step]
    assert decisions(switch) == [(4, "switched", ("0",)), (step, "switched", ("1", "2"))]
    assert {name: layer.origin.ranks for name, layer in factorized(model).items()} == dict.fromkeys("012", (4,))
    assert switch.plan is not None
    assert (switch.plan.parameters_before, switch.plan.parameters_after) == (3 * 16 * 16, 3 * 2 * 16 * 4)


def test_a_state_with_switched_sites_of_a_budget_keeps_the_others() -> None:
    switch, changed, model = go_on("one of three switched, budget")
    assert changed == []
    assert set(factorized(model)) == {"0"}
    assert decisions(switch) == [(4, "switched", ("0",)), (6, "kept", ("1", "2"))]
    assert "an earlier version of tdfx had switched other sites" in str(switch)
