"""What a ``Switch`` says of each of its decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

What = Literal["switched", "waiting", "kept", "too_late"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchEvent:
    """One thing that a ``Switch`` decided."""

    step: int
    """Training steps taken by then."""
    what: What
    """``"switched"``; ``"waiting"``, to be asked again later; ``"kept"`` for good; ``"too_late"``, kept since too few steps
    are left for a switch to pay."""
    sites: tuple[str, ...]
    """The sites it concerns."""
    why: str
    """The reason in words."""

    def __str__(self) -> str:
        named = ", ".join(one or "the model itself" for one in self.sites[:3]) + (
            ", ..." if len(self.sites) > 3 else ""
        )
        which = f"{len(self.sites)} site{'s' * (len(self.sites) != 1)} ({named})" if self.sites else "no site"
        return f"step {self.step}: {self.what.replace('_', ' ')}, {which}: {self.why}"
