"""What every rank rule is: settings that turn the spectra of a site into ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tdfx.ranks.spectrum import Spectrum

if TYPE_CHECKING:
    from tdfx.ranks.combine import AtLeast, AtMost, Fallback, RoundTo


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
    exact: bool = False
    """True where the policy's rounding must leave the ranks alone."""
    limits: tuple[int, ...] = ()
    """One rank for each spectrum that rounding must not pass; () for the full ranks."""


class RankRule(ABC):
    """A frozen setting with one method; a rule reads singular values and never sees a module.

    A new rule is one file: subclass this as a frozen, keyword-only dataclass, and add it to ``tdfx.ranks.registry``.

    Rules are combined by methods, the last of which has the last word. (``tdfx.ranks.combine`` holds what they return; it
    imports this file, so this file imports it only when it is asked.)

    Example:
        >>> from tdfx import VBMF, Fixed, Ratio
        >>> Fixed({"fc": 32}) | VBMF().at_least(16) | Ratio(of=0.5)
        Fixed(ranks={'fc': 32}) | VBMF(floor=0.25, weaken=1.0).at_least(16) | Ratio(of=0.5)
    """

    __slots__ = ()

    @property
    def exact(self) -> bool:
        """True if the rule may choose ranks that the policy's rounding must leave alone, as ranks given by hand."""
        return False

    @property
    def reads_values(self) -> bool:
        """True if the rule may look at singular values; otherwise it is given full ranks alone, which cost nothing."""
        return True

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

    def at_least(self, least: int | float) -> AtLeast:
        """Return this rule with a floor under its ranks.

        Args:
            least: A whole number of ranks, cut to the full rank; or, as a float in (0, 1], a share of the full rank.
        """
        from tdfx.ranks.combine import AtLeast

        return AtLeast(rule=self, least=least)

    def at_most(self, most: int | float) -> AtMost:
        """Return this rule with a ceiling over its ranks, which rounding does not pass either.

        Args:
            most: A whole number of ranks; or, as a float in (0, 1], a share of the full rank.
        """
        from tdfx.ranks.combine import AtMost

        return AtMost(rule=self, most=most)

    def round_to(self, multiple: int) -> RoundTo:
        """Return this rule with its ranks rounded up to a multiple of its own in place of the policy's."""
        from tdfx.ranks.combine import RoundTo

        return RoundTo(rule=self, multiple=multiple)

    def __or__(self, other: RankRule) -> Fallback:
        """Return a rule by which ``other`` decides where this one keeps the site."""
        if not isinstance(other, RankRule):
            return NotImplemented
        from tdfx.ranks.combine import Fallback

        return Fallback(rules=(self, other))


def round_ranks(ranks: Sequence[int], full: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Round each rank up to a multiple, but never above its full rank.

    >>> round_ranks((5, 30), (64, 27), 8)
    (8, 27)
    """
    return tuple(min(-(-rank // multiple) * multiple, most) for rank, most in zip(ranks, full, strict=True))
