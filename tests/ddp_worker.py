"""The checks that two processes run together on models in DistributedDataParallel; test_ddp.py starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import ddp_agreement
import ddp_collectives
import ddp_training
import ddp_wrapper
import two_processes

CHECKS = two_processes.checks_of(ddp_training, ddp_wrapper, ddp_agreement, ddp_collectives)

if __name__ == "__main__":
    two_processes.run(Path(sys.argv[1]), tuple, CHECKS)
