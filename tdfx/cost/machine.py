"""What this machine is, as far as it decides how long a computation takes."""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path
from typing import Any

import torch

_VERSION = 3
"""To be raised when what is timed changes, so that times of before are not taken for times of now."""


@functools.cache
def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def describe_machine(device: str) -> str:
    """Return all that decides how long a computation of given shapes takes here, as one line of text.

    Args:
        device: As torch writes it; of a GPU the model counts, not the number.
    """
    kind = torch.device(device).type
    where = processor()
    if kind == "cuda":
        where = f"{torch.cuda.get_device_name(device)} cudnn {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    switches = (
        torch.get_num_threads(),
        torch.backends.mkldnn.enabled,
        *_precisions(),
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )
    version = f"{torch.__version__} cuda {torch.version.cuda}"
    return " | ".join(map(str, (_VERSION, kind, where, torch.backends.cpu.get_cpu_capability(), *switches, version)))


def _precisions() -> list[str]:
    """Return in which precision products of float32 are computed, by whichever of torch's two ways that was said."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn)
    inner = [getattr(one, name, None) for one in backends for name in ("matmul", "conv")]
    found = [str(getattr(one, "fp32_precision", "")) for one in (*backends, *inner)]
    # Where one of the ways was used, the other may refuse to be read.
    with contextlib.suppress(RuntimeError):
        found.append(torch.get_float32_matmul_precision())
    with contextlib.suppress(RuntimeError):
        found.append(str(torch.backends.cudnn.allow_tf32))
    return found
