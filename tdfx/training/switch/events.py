"""The record of a decision that a ``Switch`` made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

What = Literal["switched", "waiting", "kept", "too_late"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchEvent:
    """One decision of a ``Switch``."""

    step: int
    """Training steps taken by then."""
    what: What
    """``"switched"``; ``"kept"`` for good; ``"too_late"``, kept since too few steps are left for a switch to pay off;
    ``"waiting"`` occurs only in states that earlier versions saved."""
    sites: tuple[str, ...]
    """The sites that the decision concerns."""
    why: str
    """The reason in words."""

    def __str__(self) -> str:
        named = ", ".join(site or "the model itself" for site in self.sites[:3])
        more = ", ..." if len(self.sites) > 3 else ""
        which = f"{len(self.sites)} site{'s' * (len(self.sites) != 1)} ({named}{more})" if self.sites else "no site"
        return f"step {self.step}: {self.what.replace('_', ' ')}, {which}: {self.why}"
