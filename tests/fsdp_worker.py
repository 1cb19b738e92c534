"""The checks that two processes run together on models that fully_shard was called on; test_fsdp.py starts it."""

from __future__ import annotations

import os
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
RARE = (
    "always_resharded",
    "never_resharded",
    "offloaded",
    "sites_settle",
    "weighs",
    "several_modules",
    "single_parameters",
)
"""Words in the names of checks that run only with ``TDFX_LONG_TESTS``."""
if not os.environ.get("TDFX_LONG_TESTS"):
    CHECKS = {name: check for name, check in CHECKS.items() if not any(word in name for word in RARE)}

if __name__ == "__main__":
    two_processes.run(Path(sys.argv[1]), lambda: (init_device_mesh("cpu", (2,)),), CHECKS)
