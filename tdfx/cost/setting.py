"""The circumstances in which a site computes, which decide beside its shapes how long it takes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and how one call of a site computes."""

    device: str = "cpu"
    """The kind of device, such as ``"cuda"``, with an index where it is not the current one of its kind."""
    dtype: torch.dtype = torch.float32
    """The weight's dtype."""
    autocast: torch.dtype | None = None
    """The dtype to which autocast converts both operands; None where it is off."""
    channels_last: bool = False
    """True if input or weight have their channels innermost in memory."""
    wants_input_gradient: bool = True
    """False for a site that reads the model's own input, whose gradient is not needed."""

    @property
    def computes_in(self) -> torch.dtype:
        """The dtype of the products."""
        return self.autocast or self.dtype

    @property
    def device_type(self) -> str:
        """The kind of device, such as ``"cuda"``."""
        return torch.device(self.device).type


def autocast_now(kind: str) -> torch.dtype | None:
    """Return the dtype in which autocast computes on a kind of device now; None where it is off or unavailable."""
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def computing_in(autocast: torch.dtype | None, kind: str) -> AbstractContextManager[object]:
    """Return a context in which autocast computes in a dtype, or is off for None, whatever is in force outside of it."""
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=autocast, enabled=autocast is not None)
