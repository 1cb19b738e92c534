"""The processes that train together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Process:
    """This process among all that train together."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """True for the process that writes files and prints."""
        return self.rank == 0


@contextmanager
def join_processes() -> Iterator[tuple[Process, torch.device]]:
    """Join the processes that torchrun started, if it did; each gets a GPU of its own where there are GPUs."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if "RANK" not in os.environ:
        yield Process(), device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
