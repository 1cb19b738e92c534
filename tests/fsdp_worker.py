"""The checks that two processes run together on models that fully_shard was called on; test_fsdp.py starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import fsdp_averages
import fsdp_boundaries
import fsdp_refusals
import fsdp_sharding
import fsdp_training
import two_processes
from torch.distributed.device_mesh import init_device_mesh

CHECKS = two_processes.checks_of(fsdp_training, fsdp_sharding, fsdp_boundaries, fsdp_averages, fsdp_refusals)

if __name__ == "__main__":
    two_processes.run(Path(sys.argv[1]), lambda: (init_device_mesh("cpu", (2,)),), CHECKS)
