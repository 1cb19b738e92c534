"""What every rank rule is: settings that turn the spectra of a site into ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tdfx.errors import PolicyError
from tdfx.ranks.spectrum import Spectrum


@dataclass(frozen=True, slots=True)
class Choice:
    """The ranks that a rule chose for one site."""

    ranks: tuple[int, ...]
    """One rank for each spectrum, each in [1, full rank]; empty where ``kept`` says why there is none."""
    note: str = ""
    """What the user should know of the choice, such as that a floor was applied."""
    kept: str = ""
    """Why there are no ranks: the site shows no signal above the noise yet, or the rule does not speak of it."""
    signal: bool = True
    """False where the weight shows nothing above the noise, so that any rank read from it would be meaningless."""


class RankRule(ABC):
    """A frozen setting with one method; a rule reads singular values and never sees a module.

    A new rule is one file: subclass this as a frozen, keyword-only dataclass, and add it to ``tdfx.ranks.registry``.
    """

    __slots__ = ()

    exact: ClassVar[bool] = False
    """True if ranks were given by hand, so that rounding to a hardware multiple must leave them alone."""

    @abstractmethod
    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Return the ranks of one site.

        Args:
            site: The site's name, for rules that speak of sites by name.
            spectra: One spectrum for each rank that the scheme asks for.
        """

    def patterns(self) -> tuple[str, ...]:
        """Return the site patterns that the rule mentions, so that one which matches nothing can be reported."""
        return ()


def check_share(name: str, value: float, meaning: str, example: str, *, zero_allowed: bool = False) -> None:
    """Raise PolicyError unless ``value`` is a share in (0, 1], or in [0, 1] where zero is allowed."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value > 1 or value < 0 or (value == 0 and not zero_allowed):
        interval = "[0, 1]" if zero_allowed else "(0, 1]"
        raise PolicyError(f"{name}={value!r} is not in {interval}: it is {meaning}. {example}")


def round_ranks(ranks: Sequence[int], full: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Round each rank up to a multiple, but never above its full rank.

    >>> round_ranks((5, 30), (64, 27), 8)
    (8, 27)
    """
    return tuple(min(-(-rank // multiple) * multiple, most) for rank, most in zip(ranks, full, strict=True))
