"""Checks that a rewrite wraps the new model as the old one was wrapped: settings, communication hooks, compiled code."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ddp_runs import DDP, HALF, assert_same_bits, batches, half, net, sgd, train
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from two_processes import refused

import tdfx
from tdfx.layers.factorized import Factorized


def check_settings_are_as_before() -> None:
    outputs = []
    model = DDP(net(), find_unused_parameters=True, gradient_as_bucket_view=True, bucket_cap_mb=1)
    model.register_comm_hook(None, default_hooks.bf16_compress_hook)
    model.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    model.eval()
    small = tdfx.rewrite(model, HALF)
    assert isinstance(small, DistributedDataParallel)
    for name in ("find_unused_parameters", "gradient_as_bucket_view", "bucket_bytes_cap", "device_ids", "training"):
        assert getattr(small, name) == getattr(model, name), name
    assert small.process_group is model.process_group
    assert [hook for hook, *_ in small._comm_hooks] == [default_hooks.bf16_compress_hook]
    small(next(batches(1, 1))[0])
    assert len(outputs) == 1
    static: Any = tdfx.rewrite(DDP(net(), static_graph=True), HALF)
    assert static.static_graph
    assert not static.find_unused_parameters
    assert static.bucket_bytes_cap == DDP(net()).bucket_bytes_cap


def check_powersgd_starts_again_for_other_buckets() -> None:
    model = DDP(net())
    state = PowerSGDState(None, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook)
    optimizer = sgd(model.parameters())
    train(model, optimizer, 1, 5)
    assert state.error_dict
    small: Any = tdfx.rewrite(model, HALF, optimizer=optimizer)
    ((_, state_of_small),) = small._comm_hooks
    assert not state_of_small.error_dict
    assert state.error_dict
    train(small, optimizer, 2)
    assert_same_bits(small, sgd(small.parameters()))


def check_builtin_hooks_stay() -> None:
    model = DDP(net())
    model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)  # type: ignore[attr-defined]
    small: Any = tdfx.rewrite(model, HALF)
    before, after = (wrapped._get_ddp_logging_data().get("comm_hook") for wrapped in (model, small))
    assert before == after != DDP(net())._get_ddp_logging_data().get("comm_hook")


def check_one_process_saves_by_itself() -> None:
    model = DDP(net())
    optimizer = sgd(model.parameters())
    small: Any = tdfx.rewrite(model, HALF, optimizer=optimizer)
    compiled: Any = torch.compile(small, backend="eager")
    for wrapped in (small, compiled):
        if dist.get_rank() == 0:  # a collective would wait for the other process
            saved = tdfx.state(wrapped, optimizer=optimizer)
            assert saved["tensors"].keys() == small.module.state_dict().keys()
        dist.barrier()


def check_ignored_parameters_stay_ignored_or_are_refused() -> None:
    model = net()
    DDP._set_params_and_buffers_to_ignore_for_model(model, ["5.weight"])
    wrapped = DDP(model)
    with refused(tdfx.ModelError, "DistributedDataParallel ignores '5.weight'"):
        tdfx.rewrite(wrapped, HALF)
    small: Any = tdfx.rewrite(wrapped, tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, include=("3",)))
    assert small.parameters_to_ignore == {"5.weight"}


def check_compiled_inside_and_outside() -> None:
    x = half(next(batches(1, 1))[0])

    def inside(wrapper: Any) -> Any:
        return wrapper._orig_mod if hasattr(wrapper, "_orig_mod") else wrapper.module

    outside: Any = torch.compile(DDP(net()), backend="eager")
    for wrapped in (outside, DDP(torch.compile(net(), backend="eager"))):
        small: Any = tdfx.rewrite(wrapped, HALF)
        assert type(small) is type(wrapped)
        assert type(inside(small)) is type(inside(wrapped))
        small(x).sum().backward()
        assert all(parameter.grad is not None for parameter in small.parameters())


def check_compiled_in_place() -> None:
    x = half(next(batches(1, 1))[0])
    compilations = [0]

    def backend(graph: Any, inputs: Any) -> Any:
        compilations[0] += 1
        return graph.forward

    model: Any = DDP(net())
    model.compile(backend=backend)
    small: Any = tdfx.rewrite(model, HALF)
    model.module = nn.Identity()  # a call of the former wrapper's code would show
    small(x).sum().backward()
    assert compilations[0] > 0
    assert all(parameter.grad is not None for parameter in small.parameters())
    with_compiled_parts = net()
    with_compiled_parts[3].compile(backend=backend)
    with_compiled_parts[5] = torch.compile(with_compiled_parts[5], backend=backend)
    small = tdfx.rewrite(DDP(with_compiled_parts), HALF)
    assert isinstance(small, DistributedDataParallel)
    compilations[0] = 0
    small(x).sum().backward()
    assert compilations[0] == 2
    assert isinstance(small.module[3], Factorized)
    assert isinstance(small.module[5], torch._dynamo.OptimizedModule)
    assert list(tdfx.merge(small).state_dict()) == list(DDP(with_compiled_parts).state_dict())
