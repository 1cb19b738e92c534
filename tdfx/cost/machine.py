"""Describe this machine, as far as it decides how long a computation takes."""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path
from typing import Any

import torch

_VERSION = 4
"""Raise this when what is timed changes, so that older times are not mistaken for current ones."""


@functools.cache
def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def describe_machine(device: str) -> str:
    """Return everything that decides how long a computation of given shapes takes on a device, as one line of text."""
    kind, hardware = torch.device(device).type, processor()
    if kind == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)} cudnn {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    vectors, version = torch.backends.cpu.get_cpu_capability(), f"{torch.__version__} cuda {torch.version.cuda}"
    settings = (torch.get_num_threads(), torch.backends.mkldnn.enabled, *_precisions(), torch.backends.cudnn.benchmark)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return " | ".join(map(str, (_VERSION, kind, hardware, vectors, *settings, deterministic, version)))


def _precisions() -> list[str]:
    """Return the precision in which products of float32 are computed, by both of torch's interfaces for it."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn)
    inner = [getattr(backend, name, None) for backend in backends for name in ("matmul", "conv")]
    precisions = [str(getattr(backend, "fp32_precision", "")) for backend in (*backends, *inner)]
    # After one of the interfaces was used, the other may refuse to be read.
    with contextlib.suppress(RuntimeError):
        precisions.append(torch.get_float32_matmul_precision())
    with contextlib.suppress(RuntimeError):
        precisions.append(str(torch.backends.cudnn.allow_tf32))
    return precisions
