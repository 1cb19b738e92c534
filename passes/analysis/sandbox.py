"""Running a user's model without a trace: the streams of random numbers stay where they were, and no warning is heard."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Put back what torch, NumPy and Python would draw next, on the CPU and where the module lies; silence warnings."""
    devices = {one.device for one in (*module.parameters(), *module.buffers()) if one.device.type == "cuda"}
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=sorted(one.index for one in devices)):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
