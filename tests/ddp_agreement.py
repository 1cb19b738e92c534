"""Checks that two processes make one plan and one switch, and that what fails on one is raised on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp_runs import DDP, HALF, assert_same_bits, batches, net, sgd, train
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel
from two_processes import on_both, refused, refused_promptly

import tdfx
from tdfx.distributed.processes import Task
from tdfx.distributed.ranks import Ranks
from tdfx.factors.svd import Svd

INPUTS_REFUSED = "does not accept the example inputs (float64 (8, 1, 3, 3)"
NO_OPTIMIZER = "are in none of the optimizers given"


def assert_one_plan(plan: tdfx.Plan) -> None:
    first, second = on_both(plan.to_json())
    assert first == second


def parameters_of(optimizer: Optimizer) -> list[int]:
    return [id(parameter) for parameter in optimizer.param_groups[0]["params"]]


def check_plan_is_one_for_all() -> None:
    plan = tdfx.plan(DDP(net()), HALF)
    assert_one_plan(plan)
    single = tdfx.plan(net(), HALF)
    assert [site.ranks for site in plan] == [site.ranks for site in single]
    small: Any = tdfx.rewrite(DDP(net()), plan)
    assert plan.factorized
    assert all(small.module.get_submodule(site.name).origin.ranks == site.ranks for site in plan.factorized)


class TwoHeads(nn.Module):
    """A model that no graph shows; in train mode it has a second head, and needs two samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.auxiliary = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.body(x if float(x.sum()) < 1e9 else x + 1))
        return (x, self.auxiliary(x)) if self.training else x


def check_plans_agree_where_the_run_in_train_mode_fails_on_one_process() -> None:
    x = torch.ones(8 if dist.get_rank() == 0 else 1, 64)
    plan = tdfx.plan(DDP(TwoHeads()), HALF, example_inputs=(x,))
    assert_one_plan(plan)
    assert [site.name for site in plan.factorized] == ["body", "auxiliary"]


def check_a_switch_pays_for_both_or_for_none() -> None:
    """On their own batches, the switch would save 40 s for one process and 43 s for the other; it takes 42 s."""
    now = [0.0]
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, cost=tdfx.Modelled())
    switch = tdfx.Switch(policy, when=tdfx.AtStep(3), total_steps=103, recompile_seconds=37, clock=lambda: now[0])
    model = DDP(nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8)))
    x = torch.ones(1024 if dist.get_rank() == 0 else 4, 1024)
    for _ in range(3):
        now[0] += 1
        model = switch.step(model, example_inputs=(x,))
    first, second = on_both(str(switch))
    assert first == second
    assert "in the 100 steps left and still takes 42" in first


def check_each_weight_is_split_on_one_process() -> None:
    splits = []
    split = Svd.split

    def counted(*arguments: Any) -> Any:
        splits.append(1)
        return split(*arguments)

    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, scheme="svd", include=("3", "5"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Svd, "split", counted)
        tdfx.rewrite(DDP(net()), policy)
    assert on_both(len(splits)) == [1, 1]


def check_the_first_process_measures_for_both() -> None:
    measurements: list[int] = []
    measure = tdfx.Measured.measure

    def counted(*arguments: Any, **settings: Any) -> Any:
        measurements.append(1)
        return measure(*arguments, **settings)

    cost = tdfx.Measured(rounds=1, cache=False)
    x = next(batches(1, 1))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tdfx.Measured, "measure", counted)
        for policy in (
            tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0.01, cost=cost),
            tdfx.Policy(parameters=0.8, min_gain=0.01, round_to=1, cost=cost),
            tdfx.Policy(seconds=10.0, cost=cost),
        ):
            measurements.clear()
            plan = tdfx.plan(DDP(net()), policy, example_inputs=x)
            assert bool(measurements) == (dist.get_rank() == 0)
            assert any(site.seconds_before is not None for site in plan.sites)
            assert_one_plan(plan)


def check_the_first_process_solves_a_budget_for_both() -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("only the first process solves the knapsack")

    policy = tdfx.Policy(parameters=0.6, min_gain=0, round_to=1, cost=tdfx.Modelled())
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr("tdfx.passes.planning.budget.solve_knapsack", refuse)
        plan = tdfx.plan(DDP(net()), policy)
        assert_one_plan(plan)
        assert plan.factorized
        patch.setattr("tdfx.passes.planning.knapsack.TIME_LIMIT", 0.0)
        with refused(tdfx.PolicyError, "No choice for the 3 sites was found in 20 s that keeps Budget"):
            tdfx.plan(DDP(net()), policy)


def check_a_failure_on_one_process_is_raised_on_both_and_changes_nothing() -> None:
    model = DDP(net())
    optimizer = sgd(model.parameters())
    train(model, optimizer, 1)
    before = parameters_of(optimizer), set(map(id, optimizer.state))

    def failing(*_: Any) -> Any:
        raise ValueError("no memory left, say")

    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, scheme="svd")
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(Svd, "split", failing)
        with refused(ValueError, "no memory left"):
            tdfx.rewrite(model, policy, optimizer=optimizer)
    assert before == (parameters_of(optimizer), set(map(id, optimizer.state)))
    train(model, optimizer, 2)
    assert_same_bits(model, optimizer)


def check_what_one_process_is_refused_is_raised_on_both() -> None:
    model: Any = DDP(net())
    optimizer, foreign = sgd(model.parameters()), sgd(net().parameters())
    average = AveragedModel(model.module)
    train(model, optimizer, 1)
    second = dist.get_rank() == 1
    x = next(batches(1, 1))[0]
    before = parameters_of(optimizer), average.module
    for call in (tdfx.plan, tdfx.rewrite):
        with refused_promptly(tdfx.InputError, INPUTS_REFUSED):
            call(model, HALF, example_inputs=x[:, :1] if second else x)
    wrong: Any = foreign if second else optimizer
    with refused_promptly(tdfx.OptimizerError, NO_OPTIMIZER):
        tdfx.rewrite(model, HALF, example_inputs=x, optimizer=wrong, averaged=average)
    with refused_promptly(tdfx.OptimizerError, "is a str, not a torch.optim.Optimizer"):
        tdfx.rewrite(model, HALF, optimizer="sgd" if second else optimizer)  # type: ignore[arg-type]
    with refused_promptly(tdfx.ModelError, "averaged=Linear holds no averaged copy"):
        tdfx.rewrite(model, HALF, optimizer=optimizer, averaged=nn.Linear(2, 2) if second else average)
    with refused_promptly(tdfx.PolicyError, "init='random' is not known"):
        tdfx.rewrite(model, HALF, init="random" if second else "weight")  # type: ignore[arg-type]
    masters = {parameter: nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()}
    with refused(tdfx.ModelError, "processes pass different optimizers, averages or masters"):
        tdfx.rewrite(model, HALF, masters={} if second else masters)
    assert before == (parameters_of(optimizer), average.module)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=x, optimizer=optimizer, averaged=average)
    with refused_promptly(tdfx.OptimizerError, NO_OPTIMIZER):
        tdfx.merge(small, optimizer=wrong)
    with refused(tdfx.ModelError, "processes pass different optimizers, averages or masters"):
        tdfx.merge(small, optimizer=None if second else optimizer)
    dense = tdfx.merge(small, optimizer=optimizer, averaged=average)
    train(dense, optimizer, 2)
    assert_same_bits(dense, optimizer)
    assert_same_bits(average, optimizer)


def check_a_switch_that_fails_on_one_process_fails_on_both() -> None:
    model: Any = DDP(net())
    x = next(batches(1, 1))[0]
    wrong = x[:, :1] if dist.get_rank() == 1 else x
    switch = tdfx.Switch(HALF, when=tdfx.Settled(every=1))
    with refused_promptly(tdfx.InputError, INPUTS_REFUSED):
        switch.step(model, example_inputs=wrong)
    assert switch.step(model, example_inputs=x) is model


def check_a_step_that_the_first_process_cannot_time_is_refused_on_both() -> None:
    # Batch norm in train mode has no statistics of a single sample.
    model = DDP(nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Linear(64, 4)))
    with refused(tdfx.InputError, "does not run on the example inputs in train mode"):
        tdfx.plan(model, tdfx.Policy(speedup=1.1), example_inputs=torch.randn(1, 4))


def check_a_wrapper_that_is_set_otherwise_on_one_process_is_refused_on_both() -> None:
    model: Any = DDP(net())
    if dist.get_rank() == 0:
        model._use_python_reducer = True
    with refused_promptly(tdfx.ModelError, "the Python reducer", rank=0):
        tdfx.plan(model, HALF)


def check_a_task_that_fails_is_reported_once() -> None:
    ranks = Ranks([dist.group.WORLD], "cpu")  # type: ignore[list-item]

    def failing() -> tuple[Tensor, ...]:
        raise KeyError("only where it runs")

    with refused(KeyError, "only where it runs"), ranks.raise_on_all():
        list(ranks.map_tasks([Task(tuple, ()), Task(failing, ())]))
    with refused(tdfx.PolicyError, "because of it"), ranks.raise_on_all():
        try:
            list(ranks.map_tasks([Task(failing, ())]))
        except KeyError as error:
            raise tdfx.PolicyError("because of it") from error
    assert ranks.broadcast_object(dist.get_rank()) == 0, "no process waits any more"


def check_different_policies_are_refused_on_both() -> None:
    rank = tdfx.Ratio(of=0.5 if dist.get_rank() else 0.25)
    with refused(tdfx.ModelError, "processes pass different policies"):
        tdfx.rewrite(DDP(net()), tdfx.Policy(rank=rank, min_gain=0))


def check_different_modes_are_refused_on_both() -> None:
    model = DDP(net()).train(dist.get_rank() == 0)
    with refused(tdfx.ModelError, "different structure or mode"):
        tdfx.rewrite(model, HALF)


def check_an_optimizer_in_parts_is_refused() -> None:
    model = DDP(net())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), SGD, lr=0.1)
    with refused(tdfx.OptimizerError, "ZeroRedundancyOptimizer keeps each process's part"):
        tdfx.rewrite(model, HALF, optimizer=optimizer)
