"""In what circumstances a site computes: what decides, beside shapes, how long it takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and how one call of a site computes."""

    device: str = "cpu"
    """The device, as torch writes it."""
    dtype: torch.dtype = torch.float32
    """Of the weight."""
    autocast: torch.dtype | None = None
    """What autocast turns both operands into; None where it is off."""
    channels_last: bool = False
    """True if input or weight have their channels innermost in memory."""
    wants_input_gradient: bool = True
    """False for a site that reads the model's own input, whose gradient nobody asks for."""

    @property
    def computes_in(self) -> torch.dtype:
        """The dtype of the products."""
        return self.autocast or self.dtype

    @property
    def device_type(self) -> str:
        """The kind of device, such as ``"cuda"``."""
        return torch.device(self.device).type
