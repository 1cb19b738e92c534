"""What two processes check together of models in DistributedDataParallel; test_ddp.py starts it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import two_processes
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

import tdfx
from tdfx.distributed.processes import Task
from tdfx.distributed.ranks import Ranks
from tdfx.factors.svd import Svd
from tdfx.layers.factorized import Factorized

DDP: Any = DistributedDataParallel

HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
ROUNDING = 1e-11
"""A dozen steps in float64 on numbers about 1: some 1e4 roundings of 1e-16, and room for what training amplifies."""


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(72, 24), nn.Tanh(), nn.Linear(24, 5)
    ).double()


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=3e-3)


def batches(seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(8, 3, 3, 3, generator=generator, dtype=torch.float64),
            torch.randn(8, 5, generator=generator, dtype=torch.float64),
        )


def half(x: Tensor) -> Tensor:
    return x[4 * dist.get_rank() : 4 * dist.get_rank() + 4]


def train(model: nn.Module, optimizer: Optimizer, seed: int, count: int = 4) -> None:
    """Train on whole batches, or each process on its half: the mean of the halves' gradients is the whole's."""
    for x, y in batches(seed, count):
        if isinstance(model, DistributedDataParallel):
            x, y = half(x), half(y)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def whole_run(model: nn.Module, make: Callable[[Any], Optimizer], *, carry: bool = True) -> tuple[Any, Any, Optimizer]:
    optimizer = make(model.parameters())
    train(model, optimizer, 1)
    small = tdfx.rewrite(model, HALF, example_inputs=next(batches(9, 1))[0], optimizer=optimizer)
    check_bits(small, optimizer)
    if not carry:
        optimizer.state.clear()
    train(small, optimizer, 2, 10)
    check_bits(small, optimizer)
    dense = tdfx.merge(small, optimizer=optimizer)
    check_bits(dense, optimizer)
    train(dense, optimizer, 3)
    return small, dense, optimizer


def check_bits(model: nn.Module, optimizer: Optimizer) -> None:
    """Hold parameters, buffers and optimizer state to be the same bits on both processes."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [one for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor)]
    both: list[Any] = [None, None]
    dist.all_gather_object(both, [one.detach().numpy().tobytes() for one in tensors])
    assert both[0] == both[1]


def control_check_bits_sees_a_difference() -> None:
    model = net()
    with torch.no_grad():
        model[0].bias.add_(1e-12 * dist.get_rank())
    check_bits(model, sgd(model.parameters()))


def apart(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@contextmanager
def refused(kind: type[Exception], message: str) -> Iterator[None]:
    with pytest.raises(kind, match=f"(?s){message}"):
        yield


def compare(make: Callable[[Any], Optimizer], wrap: Callable[[nn.Module], nn.Module] = DDP) -> None:
    small, dense, _ = whole_run(wrap(net()), make)
    alone_small, alone_dense, _ = whole_run(net(), make)
    assert isinstance(small, DistributedDataParallel)
    assert isinstance(dense, DistributedDataParallel)
    assert apart(small.module, alone_small) < ROUNDING
    assert apart(dense.module, alone_dense) < ROUNDING
    other, _, _ = whole_run(net(), make, carry=False)
    assert apart(small.module, other) > 1e-4, "without its state the optimizer goes elsewhere"


def check_sgd_is_the_single_process_run() -> None:
    compare(sgd)


def check_adamw_is_the_single_process_run() -> None:
    compare(adamw)


def check_masters_are_the_bits_of_the_wide_run() -> None:
    wide = net()
    plain = net().float()
    model: Any = DDP(plain)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.add_(torch.full_like(parameter, 1e-10))  # digits that the model lacks
    masters: Any = {
        one: nn.Parameter(other.detach().clone())
        for one, other in zip(plain.parameters(), wide.parameters(), strict=True)
    }
    optimizer, there = adamw(masters.values()), adamw(wide.parameters())

    def push(current: Any, alone: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for one, other in zip(current.module.parameters(), alone.parameters(), strict=True):
            gradient = torch.randn(one.shape, generator=generator, dtype=torch.float64)
            masters[one].grad, other.grad = gradient, gradient.clone()
        optimizer.step()
        there.step()

    push(model, wide, 1)
    wish = tdfx.plan(model, HALF)
    small: Any = tdfx.rewrite(model, wish, optimizer=optimizer, masters=masters)
    alone = tdfx.rewrite(wide, wish, optimizer=there)
    push(small, alone, 2)
    dense: Any = tdfx.merge(small, optimizer=optimizer, masters=masters)
    alone = tdfx.merge(alone, optimizer=there)
    push(dense, alone, 3)
    assert isinstance(dense, DistributedDataParallel)
    assert set(masters) == set(dense.parameters())
    for name, one in dense.module.named_parameters():
        assert torch.equal(masters[one], alone.get_parameter(name)), name
    holder = nn.ParameterList(masters.values())
    check_bits(holder, optimizer)
    x, y = (half(one).float() for one in next(batches(5, 1)))
    dense(x).sub(y).square().mean().backward()
    assert all(one.grad is not None for one in dense.parameters())


def check_different_numbers_of_threads_give_the_same_bits() -> None:
    torch.set_num_threads(1 + dist.get_rank())
    try:
        whole_run(DDP(net()), adamw)
    finally:
        torch.set_num_threads(1)


def check_the_former_wrapper_stays_silent_where_it_is_kept() -> None:
    old = DDP(net())
    optimizer = sgd(old.parameters())
    train(old, optimizer, 1)
    small: Any = tdfx.rewrite(old, HALF, optimizer=optimizer)
    x, y = next(batches(5, 1))
    optimizer.zero_grad()
    (small(half(x)) - half(y)).square().mean().backward()
    expected = torch.autograd.grad((small.module(x) - y).square().mean(), list(small.parameters()))
    for parameter, gradient in zip(small.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - gradient).abs().max() < ROUNDING
    assert isinstance(old, DistributedDataParallel)


def check_accumulation_goes_on_over_the_switch() -> None:
    model = DDP(net())
    reference = net()
    optimizer = sgd(model.parameters())
    policy = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
    (x1, y1), (x2, y2) = batches(5, 2)
    with model.no_sync():
        (model(half(x1)) - half(y1)).square().mean().backward()
    small = tdfx.rewrite(model, policy, optimizer=optimizer)
    (small(half(x2)) - half(y2)).square().mean().backward()
    alone = tdfx.rewrite(reference, policy)
    ((alone(x1) - y1).square().mean() + (alone(x2) - y2).square().mean()).backward()
    for one, other in zip(small.parameters(), alone.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).abs().max() < 1e3 * ROUNDING


def check_each_weight_is_split_on_one_process() -> None:
    model = DDP(net())
    calls, split = [], Svd.split

    def counted(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        return split(self, *arguments)

    Svd.split = counted  # type: ignore[assignment, method-assign]
    try:
        tdfx.rewrite(model, tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, scheme="svd", include=("3", "5")))
    finally:
        Svd.split = split  # type: ignore[method-assign]
    both: list[Any] = [None, None]
    dist.all_gather_object(both, len(calls))
    assert both == [1, 1]


def check_settings_are_as_before() -> None:
    seen = []

    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        seen.append(1)

    model = DDP(net(), find_unused_parameters=True, gradient_as_bucket_view=True, bucket_cap_mb=1)
    model.register_comm_hook(None, default_hooks.bf16_compress_hook)
    model.register_forward_hook(hook)
    model.eval()
    small = tdfx.rewrite(model, HALF)
    assert isinstance(small, DistributedDataParallel)
    for name in ("find_unused_parameters", "gradient_as_bucket_view", "bucket_bytes_cap", "device_ids", "training"):
        assert getattr(small, name) == getattr(model, name), name
    assert small.process_group is model.process_group
    assert [one[0] for one in small._comm_hooks] == [default_hooks.bf16_compress_hook]
    small(next(batches(1, 1))[0])
    assert seen == [1]
    plain: Any = tdfx.rewrite(DDP(net(), static_graph=True), HALF)
    assert plain.static_graph
    assert not plain.find_unused_parameters
    assert plain.bucket_bytes_cap == DDP(net()).bucket_bytes_cap


def check_powersgd_starts_anew_for_other_buckets() -> None:
    model = DDP(net())
    state = PowerSGDState(None, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook)
    optimizer = sgd(model.parameters())
    train(model, optimizer, 1, 5)
    assert state.error_dict
    small: Any = tdfx.rewrite(model, HALF, optimizer=optimizer)
    ((_, other),) = small._comm_hooks
    assert not other.error_dict
    assert state.error_dict
    train(small, optimizer, 2)
    check_bits(small, sgd(small.parameters()))


def check_builtin_hooks_stay() -> None:
    model = DDP(net())
    model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)  # type: ignore[attr-defined]
    small: Any = tdfx.rewrite(model, HALF)
    names = [one._get_ddp_logging_data().get("comm_hook") for one in (model, small)]
    assert names[0] == names[1] != DDP(net())._get_ddp_logging_data().get("comm_hook")


def check_a_former_wrapper_that_waits_lets_go() -> None:
    old = DDP(net(), gradient_as_bucket_view=True)
    optimizer = sgd(old.parameters())
    train(old, optimizer, 1)
    old(half(next(batches(4, 1))[0]))  # a forward pass without a backward
    small: Any = tdfx.rewrite(old, HALF, optimizer=optimizer)
    x, y = next(batches(5, 1))
    optimizer.zero_grad()
    (small(half(x)) - half(y)).square().mean().backward()
    expected = torch.autograd.grad((small.module(x) - y).square().mean(), list(small.parameters()))
    for parameter, gradient in zip(small.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - gradient).abs().max() < ROUNDING


def check_ignored_parameters_stay_ignored_or_are_spoken_of() -> None:
    model = net()
    DDP._set_params_and_buffers_to_ignore_for_model(model, ["5.weight"])
    wrapped = DDP(model)
    with refused(tdfx.ModelError, r"was told to leave '5\.weight' alone"):
        tdfx.rewrite(wrapped, HALF)
    kept: Any = tdfx.rewrite(wrapped, tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, include=("3",)))
    assert kept.parameters_to_ignore == {"5.weight"}


def check_plan_is_one_for_all() -> None:
    made = tdfx.plan(DDP(net()), HALF)
    both: list[Any] = [None, None]
    dist.all_gather_object(both, made.to_json())
    assert both[0] == both[1]
    alone = tdfx.plan(net(), HALF)
    assert [one.ranks for one in made] == [one.ranks for one in alone]
    small: Any = tdfx.rewrite(DDP(net()), made)
    assert made.factorized
    assert all(small.module.get_submodule(one.name).origin.ranks == one.ranks for one in made.factorized)


class TwoHeads(nn.Module):
    """No graph shows it; in train mode it has a head more, and needs two samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.auxiliary = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.body(x if float(x.sum()) < 1e9 else x + 1))
        return (x, self.auxiliary(x)) if self.training else x


def check_a_run_in_train_mode_that_fails_on_one_process_parts_no_plans() -> None:
    x = torch.ones(8 if dist.get_rank() == 0 else 1, 64)
    plans: list[Any] = [None, None]
    dist.all_gather_object(plans, tdfx.plan(DDP(TwoHeads()), HALF, example_inputs=(x,)).to_json())
    assert plans[0] == plans[1]
    assert [one.name for one in tdfx.Plan.from_json(plans[1]).factorized] == ["body", "auxiliary"]


def check_a_switch_pays_for_both_or_for_none() -> None:
    """What it saves on batches of their own would be 40 s for the one and 43 s for the other, and it takes 42."""
    now = [0.0]
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, cost=tdfx.Modelled())
    switch = tdfx.Switch(policy, when=tdfx.AtStep(3), total_steps=103, recompile_seconds=42, clock=lambda: now[0])
    model = DDP(nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8)))
    x = torch.ones(1024 if dist.get_rank() == 0 else 4, 1024)
    for _ in range(3):
        now[0] += 1
        model = switch.step(model, example_inputs=(x,))
    said: list[Any] = [None, None]
    dist.all_gather_object(said, str(switch))
    assert said[0] == said[1]
    assert "in the 100 steps left and takes 42 s" in said[0]


def check_a_failure_on_one_process_is_raised_on_both_and_changes_nothing() -> None:
    model = DDP(net())
    optimizer = sgd(model.parameters())
    train(model, optimizer, 1)
    before = [id(one) for one in optimizer.param_groups[0]["params"]], set(map(id, optimizer.state))
    split = Svd.split
    if dist.get_rank() == 1:

        def broken(self: Any, *arguments: Any) -> Any:
            raise ValueError("no memory left, say")

        Svd.split = broken  # type: ignore[assignment, method-assign]
    try:
        with refused(ValueError, "no memory left"):
            tdfx.rewrite(model, tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, scheme="svd"), optimizer=optimizer)
    finally:
        Svd.split = split  # type: ignore[method-assign]
    assert before == ([id(one) for one in optimizer.param_groups[0]["params"]], set(map(id, optimizer.state)))
    train(model, optimizer, 2)
    check_bits(model, optimizer)


def check_what_one_process_is_refused_is_raised_on_both() -> None:
    model: Any = DDP(net())
    optimizer, other = sgd(model.parameters()), sgd(net().parameters())
    average = AveragedModel(model.module)
    train(model, optimizer, 1)
    second = dist.get_rank() == 1
    x = next(batches(1, 1))[0]
    wrong = x[:, :1] if second else x
    before = [id(one) for one in optimizer.param_groups[0]["params"]], average.module
    for call in (tdfx.plan, tdfx.rewrite):
        with two_processes.refused_promptly(
            tdfx.InputError, "does not accept the example inputs (float64 (8, 1, 3, 3)"
        ):
            call(model, HALF, example_inputs=wrong)
    foreign: Any = other if second else optimizer
    with two_processes.refused_promptly(tdfx.OptimizerError, "are in none of the optimizers given"):
        tdfx.rewrite(model, HALF, example_inputs=x, optimizer=foreign, averaged=average)
    with two_processes.refused_promptly(tdfx.OptimizerError, "is a str, not a torch.optim.Optimizer"):
        tdfx.rewrite(model, HALF, optimizer="sgd" if second else optimizer)  # type: ignore[arg-type]
    with two_processes.refused_promptly(tdfx.ModelError, "averaged=Linear holds no averaged copy"):
        tdfx.rewrite(model, HALF, optimizer=optimizer, averaged=nn.Linear(2, 2) if second else average)
    with two_processes.refused_promptly(tdfx.PolicyError, "init='random' is not known"):
        tdfx.rewrite(model, HALF, init="random" if second else "weight")  # type: ignore[arg-type]
    masters = {} if second else {one: nn.Parameter(one.detach().clone()) for one in model.parameters()}
    with refused(tdfx.ModelError, "processes pass different optimizers, averages or masters"):
        tdfx.rewrite(model, HALF, masters=masters)
    assert before == ([id(one) for one in optimizer.param_groups[0]["params"]], average.module)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=x, optimizer=optimizer, averaged=average)
    with two_processes.refused_promptly(tdfx.OptimizerError, "are in none of the optimizers given"):
        tdfx.merge(small, optimizer=foreign)
    with refused(tdfx.ModelError, "processes pass different optimizers, averages or masters"):
        tdfx.merge(small, optimizer=None if second else optimizer)
    dense = tdfx.merge(small, optimizer=optimizer, averaged=average)
    train(dense, optimizer, 2)
    check_bits(dense, optimizer)
    check_bits(average, optimizer)


def check_a_switch_that_one_process_is_refused_fails_on_both() -> None:
    model: Any = DDP(net())
    x = next(batches(1, 1))[0]
    wrong = x[:, :1] if dist.get_rank() == 1 else x
    switch = tdfx.Switch(HALF, when=tdfx.Settled(every=1))
    with two_processes.refused_promptly(tdfx.InputError, "does not accept the example inputs (float64 (8, 1, 3, 3)"):
        switch.step(model, example_inputs=wrong)
    assert switch.step(model, example_inputs=x) is model


def check_the_first_process_measures_for_both() -> None:
    timed: list[int] = []
    measure = tdfx.Measured.measure

    def counted(self: Any, groups: Any, **settings: Any) -> Any:
        timed.append(1)
        return measure(self, groups, **settings)

    tdfx.Measured.measure = counted  # type: ignore[method-assign]
    try:
        cost = tdfx.Measured(rounds=1, cache=False)
        x = next(batches(1, 1))[0]
        for policy in (
            tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0.01, cost=cost),
            tdfx.Policy(parameters=0.8, min_gain=0.01, round_to=1, cost=cost),
            tdfx.Policy(seconds=10.0, cost=cost),
        ):
            timed.clear()
            plan = tdfx.plan(DDP(net()), policy, example_inputs=x)
            assert bool(timed) == (dist.get_rank() == 0)
            assert any(site.seconds_before is not None for site in plan.sites)
            plans: list[Any] = [None, None]
            dist.all_gather_object(plans, plan.to_json())
            assert plans[0] == plans[1]
    finally:
        tdfx.Measured.measure = measure  # type: ignore[method-assign]


def check_a_budget_is_solved_by_the_first_process_alone() -> None:
    def unasked(*_: Any) -> Any:
        raise AssertionError("this process need not solve it")

    policy = tdfx.Policy(parameters=0.6, min_gain=0, round_to=1, cost=tdfx.Modelled())
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr("tdfx.passes.planning.budget.best_choice", unasked)
        plans: list[Any] = [None, None]
        dist.all_gather_object(plans, tdfx.plan(DDP(net()), policy).to_json())
        assert plans[0] == plans[1]
        assert tdfx.Plan.from_json(plans[0]).factorized
        patch.setattr("tdfx.passes.planning.knapsack.SECONDS", 0.0)
        with refused(tdfx.PolicyError, "No choice for the 3 sites was found in 20 s that keeps Budget"):
            tdfx.plan(DDP(net()), policy)


def check_a_step_that_the_first_process_cannot_time_is_refused_on_both() -> None:
    # Of one sample, batch norm has no statistics in train mode.
    model = DDP(nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Linear(64, 4)))
    with refused(tdfx.InputError, "does not run on the example inputs in train mode"):
        tdfx.plan(model, tdfx.Policy(speedup=1.1), example_inputs=torch.randn(1, 4))


def check_a_wrapper_that_one_process_uses_otherwise_is_refused_on_both() -> None:
    model: Any = DDP(net())
    if dist.get_rank() == 0:
        model._use_python_reducer = True
    with two_processes.refused_promptly(tdfx.ModelError, "the Python reducer", rank=0):
        tdfx.plan(model, HALF)


def check_a_task_that_fails_is_told_once() -> None:
    ranks = Ranks([dist.group.WORLD], "cpu")  # type: ignore[list-item]

    def work() -> tuple[Tensor, ...]:
        raise KeyError("only where it is done")

    with refused(KeyError, "only where it is done"), ranks.raise_on_all():
        list(ranks.map_tasks([Task(tuple, ()), Task(work, ())]))
    with refused(tdfx.PolicyError, "because of it"), ranks.raise_on_all():
        try:
            list(ranks.map_tasks([Task(work, ())]))
        except KeyError as error:
            raise tdfx.PolicyError("because of it") from error
    assert ranks.broadcast_object(dist.get_rank()) == 0, "nobody waits any more"


def check_different_policies_are_refused_on_both() -> None:
    rank = tdfx.Ratio(of=0.5 if dist.get_rank() else 0.25)
    with refused(tdfx.ModelError, "processes pass different policies"):
        tdfx.rewrite(DDP(net()), tdfx.Policy(rank=rank, min_gain=0))


def check_different_modes_are_refused_on_both() -> None:
    model = DDP(net()).train(dist.get_rank() == 0)
    with refused(tdfx.ModelError, "different structure or mode"):
        tdfx.rewrite(model, HALF)


def check_what_is_refused() -> None:
    model = DDP(net())
    zero = ZeroRedundancyOptimizer(model.parameters(), SGD, lr=0.1)
    with refused(tdfx.OptimizerError, "ZeroRedundancyOptimizer keeps each process's part"):
        tdfx.rewrite(model, HALF, optimizer=zero)


def check_compiled_inside_and_outside() -> None:
    x = half(next(batches(1, 1))[0])
    both: list[Any] = [torch.compile(DDP(net()), backend="eager"), DDP(torch.compile(net(), backend="eager"))]
    for wrapped in both:
        small: Any = tdfx.rewrite(wrapped, HALF)
        assert type(small) is type(wrapped)
        inner = small._orig_mod if hasattr(small, "_orig_mod") else small.module
        assert type(inner) is type(wrapped._orig_mod if hasattr(wrapped, "_orig_mod") else wrapped.module)
        small(x).sum().backward()
        assert all(one.grad is not None for one in small.parameters())


def check_compiled_in_place() -> None:
    x = half(next(batches(1, 1))[0])
    count = [0]

    def backend(graph: Any, inputs: Any) -> Any:
        count[0] += 1
        return graph.forward

    model: Any = DDP(net())
    model.compile(backend=backend)
    small: Any = tdfx.rewrite(model, HALF)
    model.module = nn.Identity()  # whoever called the former wrapper's code would see it
    small(x).sum().backward()
    assert count[0] > 0
    assert all(one.grad is not None for one in small.parameters())
    inner = net()
    inner[3].compile(backend=backend)
    inner[5] = torch.compile(inner[5], backend=backend)
    parts: Any = tdfx.rewrite(DDP(inner), HALF)
    assert isinstance(parts, DistributedDataParallel)
    count[0] = 0
    parts(x).sum().backward()
    assert count[0] == 2
    assert isinstance(parts.module[3], Factorized)
    assert isinstance(parts.module[5], torch._dynamo.OptimizedModule)
    assert list(tdfx.merge(parts).state_dict()) == list(DDP(inner).state_dict())


CHECKS: dict[str, Callable[..., None]] = {
    name: one
    for name, one in list(globals().items())
    if name.startswith(("check_", "control_")) and name != "check_bits"
}

if __name__ == "__main__":
    two_processes.run(Path(sys.argv[1]), tuple, CHECKS)
