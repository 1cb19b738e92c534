"""Settings of the process that a forward may change: read before it runs, and put back where they differ afterwards."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

AUTOCAST_KINDS = ("cpu", "cuda", "xpu", "mps")
"""The kinds of devices whose autocast a forward may switch."""


def _set_environment(saved: dict[str, str]) -> None:
    for name in os.environ.keys() - saved.keys():
        del os.environ[name]
    os.environ.update(saved)


def _entered_autocasts() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _enter_autocasts(count: int) -> None:
    """Restore the count of entered contexts: with a wrong one, autocast would never forget narrow copies of weights."""
    left = _entered_autocasts()
    for _ in range(abs(left - count)):
        (torch.autocast_decrement_nesting if left > count else torch.autocast_increment_nesting)()
    torch.clear_autocast_cache()


def _autocast() -> list[tuple[str, bool, torch.dtype]]:
    kinds = (kind for kind in AUTOCAST_KINDS if torch.amp.is_autocast_available(kind))
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


def _set_autocast(saved: list[tuple[str, bool, torch.dtype]]) -> None:
    for kind, enabled, dtype in saved:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def _matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by backend, which this function does not tell
        return None


def _set_matmul_precision(saved: str | None) -> None:
    if saved is not None:
        torch.set_float32_matmul_precision(saved)


def _cudnn_flags() -> tuple[bool, bool]:
    return torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic


def _set_cudnn_flags(saved: tuple[bool, bool]) -> None:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = saved


_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (_autocast, _set_autocast),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (_entered_autocasts, _enter_autocasts),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (_matmul_precision, _set_matmul_precision),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (_cudnn_flags, _set_cudnn_flags),
    (np.geterr, lambda saved: np.seterr(**saved)),
    (lambda: dict(os.environ), _set_environment),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (gc.isenabled, lambda enabled: gc.enable() if enabled else gc.disable()),
)
"""How each setting is read, and how it is set."""


@contextmanager
def settings_kept() -> Iterator[None]:
    """Put settings back that code changes meanwhile, such as those of a context that it enters and does not leave."""
    saved = [(read, write, read()) for read, write in _SETTINGS]
    try:
        yield
    finally:
        for read, write, value in saved:
            if read() != value:
                write(value)
