"""Checks of averages of models in shards."""

from __future__ import annotations

from typing import Any

import torch
from fsdp_runs import (
    HALF,
    QUARTER,
    ROUNDING,
    Deep,
    PeakBytes,
    X,
    distance,
    net,
    sgd,
    sharded,
    train,
    values,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel
from two_processes import on_both, refused

import tdfx


class Average:
    """A user's own average: AveragedModel would copy the model, which FSDP2 does not allow."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for mean, parameter in zip(self.module.parameters(), model.parameters(), strict=True):
            mean.lerp_(parameter, 0.1)


def averaged_run(model: Any, average: Average, *, halves: bool) -> list[dict[str, Tensor]]:
    """Train, rewrite twice and merge; return the values of the average after each of these."""
    optimizer = sgd(model.parameters())
    states = []

    def train_and_average(model: nn.Module, seed: int) -> None:
        for step in range(3):
            train(model, optimizer, 10 * seed + step, halves=halves, count=1)
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            average.update(model)
        states.append(values(average.module))

    train_and_average(model, 1)
    for seed, policy in ((2, HALF), (3, QUARTER)):
        model = tdfx.rewrite(model, policy, optimizer=optimizer, averaged=average, emit="modules")
        states.append(values(average.module))
        train_and_average(model, seed)
    model = tdfx.merge(model, optimizer=optimizer, averaged=average)
    states.append(values(average.module))
    train_and_average(model, 4)
    return states


def check_averages_in_shards_are_those_of_the_single_process_run(mesh: DeviceMesh) -> None:
    average = Average(sharded(mesh=mesh))
    norm = average.module.blocks[0].norm.weight
    states = averaged_run(sharded(mesh=mesh), average, halves=True)
    single_states = averaged_run(net(), Average(net()), halves=False)
    assert all(
        distance(state, single_state) < 100 * ROUNDING
        for state, single_state in zip(states, single_states, strict=True)
    )
    assert distance(states[-1], states[0]) > 1e-3
    assert any(".factors." in name for name in states[1])
    assert average.module.blocks[0].norm.weight is norm, "what is kept is the same parameter"
    assert issubclass(type(average.module), FSDPModule)
    assert all(isinstance(parameter, DTensor) for parameter in average.module.parameters())
    first, second = on_both([value.numpy().tobytes() for value in states[-1].values()])
    assert first == second
    assert average.module(X).shape == (4, 5)


def check_an_average_may_be_sharded_otherwise_or_not_at_all(mesh: DeviceMesh) -> None:
    plain = Average(net())
    sharded_as_one: Any = net()
    otherwise = Average(fully_shard(sharded_as_one, mesh=mesh, reshard_after_forward=False))
    swa = AveragedModel(net())
    fully_shard(swa.module, mesh=mesh)
    states = []
    for average in (plain, otherwise, swa):
        model = sharded(mesh=mesh)
        small: Any = tdfx.rewrite(model, HALF, averaged=average)
        states.append(values(average.module))
        if average is not plain:
            averaged: Any = average.module
            addresses, averaged_addresses = (
                {parameter.to_local().data_ptr() for parameter in module.parameters()} for module in (small, averaged)
            )
            assert not addresses & averaged_addresses
    assert distance(states[0], states[1]) == distance(states[0], states[2]) == 0.0
    assert not any(isinstance(parameter, DTensor) for parameter in plain.module.parameters())
    assert isinstance(swa.module, FSDPModule)
    swa.update_parameters(small)
    with refused(tdfx.ModelError, "averaged copy in Average is not one of this model: 'bias' is (2,)"):
        tdfx.rewrite(sharded(mesh=mesh), HALF, averaged=Average(nn.Linear(2, 2)))


def check_no_process_ever_holds_an_average(mesh: DeviceMesh) -> None:
    model, average = sharded(Deep().double(), mesh), Average(sharded(Deep().double(), mesh))
    policy = tdfx.Policy(rank=tdfx.Ratio(of=1 / 8), min_gain=0)
    with PeakBytes() as rewriting:
        small = tdfx.rewrite(model, policy, averaged=average)
    assert 0 < rewriting.peak < Deep.bytes_in_float64 / 4, rewriting.peak / Deep.bytes_in_float64
    with PeakBytes() as merging:
        tdfx.merge(small, averaged=average)
    assert 0 < merging.peak < Deep.bytes_in_float64 / 4, merging.peak / Deep.bytes_in_float64
