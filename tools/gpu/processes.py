"""Rows of section correctness that need a process group: DDP with SyncBatchNorm under nccl, FSDP2 in bfloat16.

One GPU is one process; that the calls go through nccl and through the device's own collectives is what a CPU cannot show.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import tdfx
from gpu.correctness import HALF, Net
from gpu.rows import Bench, Cases, Outcome


@contextmanager
def _group(bench: Bench) -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if bench.is_cuda else "gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _switch(model: Any, bench: Bench, example: Any) -> Outcome:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    switch = tdfx.Switch(HALF, when=tdfx.AtStep(2), collect=1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(example).float().square().mean()
        loss.backward()
        optimizer.step()
        model = switch.step(model, optimizer=optimizer, example_inputs=(example,))
        losses.append(float(loss.detach()))
    return Outcome({"losses": losses}, switch.plan is not None and losses[-1] < losses[0], "no switch, or no training")


def ddp(bench: Bench) -> Outcome:
    """Switch a model in DistributedDataParallel that has SyncBatchNorm."""
    with _group(bench):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), Flat(), nn.Linear(32, 10))
        if bench.is_cuda:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
        model = DistributedDataParallel(net.to(bench.device))
        return _switch(model, bench, torch.randn(8, 3, 16, 16, device=bench.device))


class Flat(nn.Module):
    """The mean over positions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (n, c, h, w) to (n, c)."""
        return x.mean((2, 3))


def fsdp(bench: Bench) -> Outcome:
    """Switch a model that ``fully_shard`` runs in bfloat16."""
    with _group(bench):
        torch.manual_seed(0)
        mesh = init_device_mesh(torch.device(bench.device).type, (1,))
        model = Net().to(bench.device)
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        return _switch(model, bench, torch.randn(8, 3, 16, 16, device=bench.device))


CASES: Cases = {"DDP with SyncBatchNorm": ddp, "FSDP2 in bfloat16": fsdp}
