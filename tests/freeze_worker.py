"""Checks of Freeze on two processes; test_freeze_processes.py starts them.

Each function whose name starts with ``check_`` runs on both processes, with a mesh of both.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ddp_runs as ddp
import fsdp_runs as fsdp
import pytest
import torch
import torch.distributed as dist
import two_processes
from ddp_runs import DDP, HALF, ROUNDING, adamw, assert_same_bits, distance, sgd
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.optim import SGD, AdamW, Optimizer
from two_processes import refused

import tdfx
import tdfx.distributed.ddp
from tdfx.training.methods.factor_groups import Train


def frozen(model: nn.Module, optimizer: Optimizer, **settings: Any) -> tdfx.Freeze:
    """Freeze a model without the warning about a missing wrapper, since single-process models are compared here too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tdfx.TdfxWarning)
        return tdfx.Freeze(model, optimizer, **settings)


def by_turns(
    model: nn.Module, make: Callable[[Any], Optimizer], train: Train = "alternate", steps: int = 7
) -> tuple[Any, Any, Optimizer]:
    """Train dense, factorized by turns of two steps, and dense again, merged in the middle of a turn."""
    optimizer = make(model.parameters())
    ddp.train(model, optimizer, 1, 2)
    small = tdfx.rewrite(model, HALF, example_inputs=next(ddp.batches(9, 1))[0], optimizer=optimizer)
    freeze = frozen(small, optimizer, every=2, train=train)
    ddp.train(small, optimizer, 2, steps)
    assert freeze.frozen
    dense = tdfx.merge(small, optimizer=optimizer)
    assert all(parameter.requires_grad for parameter in dense.parameters())
    ddp.train(dense, optimizer, 3, 3)
    assert freeze.done
    return small, dense, optimizer


def compare(make: Callable[[Any], Optimizer], train: Train = "alternate", **settings: Any) -> None:
    small, dense, optimizer = by_turns(DDP(ddp.net(), **settings), make, train)
    assert_same_bits(dense, optimizer)
    alone_small, alone_dense, _ = by_turns(ddp.net(), make, train)
    assert distance(small.module, alone_small) < ROUNDING
    assert distance(dense.module, alone_dense) < ROUNDING
    other, _, _ = by_turns(ddp.net(), make, "each" if train == "alternate" else "alternate")
    assert distance(small.module, other) > 1e-5, "other turns go elsewhere"


def check_sgd_in_ddp_is_the_single_process_run(mesh: DeviceMesh) -> None:
    compare(sgd)


def check_adamw_in_ddp_is_the_single_process_run(mesh: DeviceMesh) -> None:
    compare(adamw, "each")


def check_gradients_that_are_views_of_buckets(mesh: DeviceMesh) -> None:
    compare(sgd, gradient_as_bucket_view=True)


def check_unused_parameters_may_be_looked_for(mesh: DeviceMesh) -> None:
    compare(sgd, find_unused_parameters=True)


def check_a_static_graph_is_static_for_each_turn(mesh: DeviceMesh) -> None:
    compare(sgd, static_graph=True)


def check_compiled_around_ddp(mesh: DeviceMesh) -> None:
    model: Any = torch.compile(DDP(ddp.net()), backend="eager")
    alone = ddp.net()
    for trained in (model, alone):
        optimizer = sgd(trained.parameters())
        small: Any = tdfx.rewrite(trained, HALF, optimizer=optimizer)
        frozen(small, optimizer, every=1)
        for x, y in ddp.batches(2, 4):
            if trained is model:
                x, y = ddp.half(x), ddp.half(y)
            optimizer.zero_grad()
            (small(x) - y).square().mean().backward()
            optimizer.step()
        if trained is model:
            assert_same_bits(small, optimizer)
            model = small
    assert distance(model._orig_mod.module, small) < ROUNDING


def check_without_setting_up_the_wrapper_again_torch_raises(mesh: DeviceMesh) -> None:
    """The negative control of the checks above."""
    real = tdfx.distributed.ddp.rebuild_reducer
    tdfx.distributed.ddp.rebuild_reducer = lambda model: None
    try:
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
            by_turns(DDP(ddp.net()), sgd)
    finally:
        tdfx.distributed.ddp.rebuild_reducer = real


def check_gradients_of_frozen_factors_are_not_sent(mesh: DeviceMesh) -> None:
    sent: list[int] = []

    def counting(bucket: Any) -> Any:
        sent.append(bucket.buffer().numel())
        return default_hooks.allreduce_hook(model.process_group, bucket)

    model = DDP(ddp.net())
    model.register_comm_hook(None, lambda state, bucket: counting(bucket))
    optimizer = sgd(model.parameters())
    small: Any = tdfx.rewrite(model, HALF, optimizer=optimizer)
    freeze = tdfx.Freeze(small, optimizer, every=1)
    for _ in range(4):
        sent.clear()
        expected = sum(parameter.numel() for name, parameter in small.named_parameters() if name not in freeze.frozen)
        ddp.train(small, optimizer, 2, 1)
        assert sum(sent) == expected < sum(parameter.numel() for parameter in small.parameters())
    freeze.remove()
    sent.clear()
    ddp.train(small, optimizer, 2, 1)
    assert sum(sent) == sum(parameter.numel() for parameter in small.parameters())


def check_turns_change_in_the_wrapper_of_a_later_rewrite(mesh: DeviceMesh) -> None:
    model = DDP(ddp.net())
    optimizer = sgd(model.parameters())
    first = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1, include=("3",))
    small = tdfx.rewrite(model, first, optimizer=optimizer)
    freeze = tdfx.Freeze(small, optimizer, every=2)
    ddp.train(small, optimizer, 1, 1)
    later: Any = tdfx.rewrite(small, HALF, optimizer=optimizer)
    assert later is not small
    ddp.train(later, optimizer, 2, 5)
    assert freeze.frozen == ("module.3.factors.0.weight",) or freeze.frozen == ("module.3.factors.1.weight",)
    assert_same_bits(later, optimizer)


def check_accumulation_without_sync(mesh: DeviceMesh) -> None:
    ends = []
    for model in (DDP(ddp.net()), ddp.net()):
        optimizer = sgd(model.parameters())
        small: Any = tdfx.rewrite(model, HALF, optimizer=optimizer)
        frozen(small, optimizer, every=1)
        for seed in range(4):
            (x1, y1), (x2, y2) = ddp.batches(seed, 2)
            optimizer.zero_grad()
            if isinstance(small, DDP):
                with small.no_sync():
                    (small(ddp.half(x1)) - ddp.half(y1)).square().mean().backward()
                (small(ddp.half(x2)) - ddp.half(y2)).square().mean().backward()
            else:
                ((small(x1) - y1).square().mean() + (small(x2) - y2).square().mean()).backward()
            optimizer.step()
        ends.append(small.module if isinstance(small, DDP) else small)
    assert distance(*ends) < ROUNDING


def check_processes_that_disagree_are_refused_on_both(mesh: DeviceMesh) -> None:
    model = DDP(ddp.net())
    optimizer = sgd(model.parameters())
    small = tdfx.rewrite(model, HALF, optimizer=optimizer)
    with refused(tdfx.ModelError, "The processes pass different settings to tdfx.Freeze"):
        tdfx.Freeze(small, optimizer, every=1 + dist.get_rank())
    assert all(parameter.requires_grad for parameter in small.parameters())
    freeze = tdfx.Freeze(small, optimizer, every=2)
    with refused(tdfx.ModelError, "The processes pass different states to tdfx.Freeze"):
        freeze.load_state_dict({**freeze.state_dict(), "taken": dist.get_rank()})
    assert freeze.state_dict()["taken"] == 0


def check_a_model_without_its_wrapper_warns(mesh: DeviceMesh) -> None:
    small = tdfx.rewrite(ddp.net(), HALF)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tdfx.Freeze(small, sgd(small.parameters()), every=1)
    (warning,) = caught
    assert "is not wrapped, and 2 processes run" in str(warning.message)
    assert Path(warning.filename).name == "freeze_worker.py"


def shards_by_turns(model: nn.Module, make: Callable[[Any], Optimizer], *, parts: bool, look: bool) -> Any:
    optimizer = make(model.parameters())
    fsdp.train(model, optimizer, 1, halves=parts, count=2)
    small = tdfx.rewrite(model, HALF, example_inputs=fsdp.X, optimizer=optimizer, emit="modules")
    freeze = frozen(small, optimizer, every=2)
    for seed in range(7):
        fsdp.train(small, optimizer, 10 + seed, halves=parts, count=1)
        if look:
            with torch.no_grad():
                small(fsdp.X)  # parameters that are not resharded stay gathered
    assert freeze.frozen
    assert all(parameter.grad is None for name, parameter in small.named_parameters() if name in freeze.frozen)
    if look:
        freeze.remove()
        fsdp.train(small, optimizer, 20, halves=parts, count=1)
    factorized = fsdp.values(small)
    dense = tdfx.merge(small, optimizer=optimizer)
    assert all(one.requires_grad for one in dense.parameters())
    fsdp.train(dense, optimizer, 3, halves=parts)
    return factorized, fsdp.values(dense)


def compare_shards(mesh: DeviceMesh, make: Callable[[Any], Optimizer], *, look: bool = False, **settings: Any) -> None:
    here = shards_by_turns(fsdp.sharded(mesh=mesh, **settings), make, parts=True, look=look)
    there = shards_by_turns(fsdp.net(), make, parts=False, look=look)
    assert fsdp.distance(here[0], there[0]) < ROUNDING
    assert fsdp.distance(here[1], there[1]) < ROUNDING


def check_shards_are_the_single_process_run(mesh: DeviceMesh) -> None:
    compare_shards(mesh, lambda parameters: SGD(parameters, lr=0.05, momentum=0.9))
    compare_shards(mesh, lambda parameters: AdamW(parameters, lr=0.01))


def check_shards_that_stay_gathered(mesh: DeviceMesh) -> None:
    compare_shards(
        mesh, lambda parameters: SGD(parameters, lr=0.05, momentum=0.9), look=True, reshard_after_forward=False
    )


def check_shards_that_never_stay_gathered(mesh: DeviceMesh) -> None:
    compare_shards(mesh, lambda parameters: SGD(parameters, lr=0.05, momentum=0.9), reshard_after_forward=True)


def check_shards_that_are_offloaded_or_hybrid(mesh: DeviceMesh) -> None:
    compare_shards(mesh, lambda parameters: SGD(parameters, lr=0.05), offload_policy=CPUOffloadPolicy(pin_memory=False))
    hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    compare_shards(hybrid, lambda parameters: SGD(parameters, lr=0.05, momentum=0.9))


def check_shards_of_low_precision_that_are_frozen_from_the_first_step(mesh: DeviceMesh) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fsdp.net().float()
    fully_shard(model, mesh=mesh, mp_policy=policy)
    small: Any = tdfx.rewrite(model, HALF)
    optimizer = SGD(small.parameters(), lr=0.01, momentum=0.9)
    freeze = tdfx.Freeze(small, optimizer, every=1)
    for _ in range(4):
        optimizer.zero_grad()
        small(fsdp.X.float()).square().mean().backward()
        grads = {name: parameter.grad for name, parameter in small.named_parameters()}
        assert {name for name, gradient in grads.items() if gradient is None} == set(freeze.frozen)
        assert {gradient.dtype for gradient in grads.values() if gradient is not None} == {torch.float32}
        optimizer.step()


def check_sharding_that_disagrees_is_refused_on_both(mesh: DeviceMesh) -> None:
    model = fsdp.sharded(mesh=mesh)
    small = tdfx.rewrite(model, HALF)
    with refused(tdfx.ModelError, "The processes pass different settings to tdfx.Freeze"):
        tdfx.Freeze(small, SGD(small.parameters(), lr=0.1), every=1 + dist.get_rank())


CHECKS: dict[str, Callable[..., None]] = {
    name: check
    for name, check in list(globals().items())
    if name.startswith("check_") and getattr(check, "__module__", "") == __name__
}

if __name__ == "__main__":
    two_processes.run(Path(sys.argv[1]), lambda: (init_device_mesh("cpu", (2,)),), CHECKS)
