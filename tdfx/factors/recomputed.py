"""Compute a chain so that training keeps only its inputs: what flows between the factors is computed again in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recomputed(compute: Callable[..., T], *inputs: Tensor) -> T:
    """Return ``compute(*inputs)``; the backward pass calls it again, up to the last value that it needs.

    Where no backward pass can follow or a graph is exported, and under ``torch.func``, whose transforms know no such
    thing, it is computed as it is.
    """
    if not (torch.is_grad_enabled() and all(isinstance(x, Tensor) for x in inputs)) or _is_transformed():
        return compute(*inputs)
    return checkpoint(compute, *map(_as_computed, inputs), use_reentrant=False)


def _is_transformed() -> bool:
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return bool(torch._C._is_tracing() or torch._C._are_functorch_transforms_active())


def _as_computed(x: Tensor) -> Tensor:
    """Convert an input as autocast will, so that the narrower copy is kept, as without recomputation."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind)) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x
