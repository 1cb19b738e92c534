"""Describe this machine, as far as it decides how long a computation takes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from tdfx.devices import hardware_name, processor

_VERSION = 6
"""Raise this when what is timed changes, so that older times are not mistaken for current ones."""


def describe_machine(device: str) -> str:
    """Return everything that decides how long a computation of given shapes takes on a device, as one line of text."""
    kind, hardware = torch.device(device).type, hardware_name(device)
    vectors, version = torch.backends.cpu.get_cpu_capability(), f"{torch.__version__} cuda {torch.version.cuda}"
    # The CPU launches what another device computes, on one thread: torchrun sets OMP_NUM_THREADS=1, a notebook does not.
    host = (torch.get_num_threads(), torch.backends.mkldnn.enabled) if kind == "cpu" else (processor(),)
    settings = (*host, *_precisions(), torch.backends.cudnn.benchmark)
    deterministic = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic)
    return " | ".join(map(str, (_VERSION, kind, hardware, vectors, *settings, *deterministic, version)))


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
    reduced = (
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    )
    precisions += [str(getattr(torch.backends.cuda.matmul, name, "")) for name in reduced]
    return precisions
