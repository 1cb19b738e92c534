"""Checks that training in DistributedDataParallel goes on over a rewrite and a merge as it does on one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ddp_runs import (
    DDP,
    HALF,
    ROUNDING,
    adamw,
    assert_same_bits,
    assert_whole_batch_gradients,
    batches,
    distance,
    half,
    loss_of,
    net,
    sgd,
    train,
    training_run,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import tdfx


def assert_like_a_single_process(build_optimizer: Callable[[Any], Optimizer]) -> None:
    small, dense = training_run(DDP(net()), build_optimizer)
    single_small, single_dense = training_run(net(), build_optimizer)
    assert isinstance(small, DistributedDataParallel)
    assert isinstance(dense, DistributedDataParallel)
    assert distance(small.module, single_small) < ROUNDING
    assert distance(dense.module, single_dense) < ROUNDING
    without_state, _ = training_run(net(), build_optimizer, carry=False)
    assert distance(small.module, without_state) > 1e-4, "without its state the optimizer goes elsewhere"


def check_sgd_is_the_single_process_run() -> None:
    assert_like_a_single_process(sgd)


def check_adamw_is_the_single_process_run() -> None:
    assert_like_a_single_process(adamw)


def check_different_numbers_of_threads_give_the_same_bits() -> None:
    torch.set_num_threads(1 + torch.distributed.get_rank())
    try:
        training_run(DDP(net()), adamw)
    finally:
        torch.set_num_threads(1)


def control_a_difference_of_bits_is_seen() -> None:
    model = net()
    with torch.no_grad():
        model[0].bias.add_(1e-12 * torch.distributed.get_rank())
    assert_same_bits(model, sgd(model.parameters()))


def check_masters_are_the_bits_of_the_wide_run() -> None:
    """The masters of a float32 model take the same steps as a float64 model on one process."""
    wide = net()
    narrow = net().float()
    model: Any = DDP(narrow)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.add_(torch.full_like(parameter, 1e-10))  # digits that the model lacks
    masters: Any = {
        parameter: nn.Parameter(wide_parameter.detach().clone())
        for parameter, wide_parameter in zip(narrow.parameters(), wide.parameters(), strict=True)
    }
    optimizer, wide_optimizer = adamw(masters.values()), adamw(wide.parameters())

    def step(model: Any, wide: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter, wide_parameter in zip(model.module.parameters(), wide.parameters(), strict=True):
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            masters[parameter].grad, wide_parameter.grad = gradient, gradient.clone()
        optimizer.step()
        wide_optimizer.step()

    step(model, wide, 1)
    plan = tdfx.plan(model, HALF)
    small: Any = tdfx.rewrite(model, plan, optimizer=optimizer, masters=masters)
    wide = tdfx.rewrite(wide, plan, optimizer=wide_optimizer)
    step(small, wide, 2)
    dense: Any = tdfx.merge(small, optimizer=optimizer, masters=masters)
    wide = tdfx.merge(wide, optimizer=wide_optimizer)
    step(dense, wide, 3)
    assert isinstance(dense, DistributedDataParallel)
    assert set(masters) == set(dense.parameters())
    for name, parameter in dense.module.named_parameters():
        assert torch.equal(masters[parameter], wide.get_parameter(name)), name
    assert_same_bits(nn.ParameterList(masters.values()), optimizer)
    x, y = (half(tensor).float() for tensor in next(batches(5, 1)))
    loss_of(dense, x, y).backward()
    assert all(parameter.grad is not None for parameter in dense.parameters())


def check_the_former_wrapper_stays_silent_where_it_is_kept() -> None:
    former = DDP(net())
    optimizer = sgd(former.parameters())
    train(former, optimizer, 1)
    small = tdfx.rewrite(former, HALF, optimizer=optimizer)
    optimizer.zero_grad()
    assert_whole_batch_gradients(small, 5)
    assert isinstance(former, DistributedDataParallel)


def check_a_former_wrapper_that_waits_for_a_backward_lets_go() -> None:
    former = DDP(net(), gradient_as_bucket_view=True)
    optimizer = sgd(former.parameters())
    train(former, optimizer, 1)
    former(half(next(batches(4, 1))[0]))  # a forward pass without a backward
    small = tdfx.rewrite(former, HALF, optimizer=optimizer)
    optimizer.zero_grad()
    assert_whole_batch_gradients(small, 5)


def check_accumulation_goes_on_over_the_switch() -> None:
    model = DDP(net())
    optimizer = sgd(model.parameters())
    policy = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
    (x1, y1), (x2, y2) = batches(5, 2)
    with model.no_sync():
        loss_of(model, half(x1), half(y1)).backward()
    small = tdfx.rewrite(model, policy, optimizer=optimizer)
    loss_of(small, half(x2), half(y2)).backward()
    single = tdfx.rewrite(net(), policy)
    (loss_of(single, x1, y1) + loss_of(single, x2, y2)).backward()
    for parameter, expected in zip(small.parameters(), single.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        assert (parameter.grad - expected.grad).abs().max() < 1e3 * ROUNDING
