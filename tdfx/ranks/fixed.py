"""Ranks given by hand, by site name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tdfx.checks import is_count
from tdfx.errors import PolicyError
from tdfx.ranks.rule import Choice, RankRule
from tdfx.ranks.spectrum import Spectrum


@dataclass(frozen=True, slots=True)
class Fixed(RankRule):
    """Use the ranks given for each site; a site that no pattern names is kept.

    Example:
        >>> Fixed({"layer4.*": 64, "fc": (16,)}).patterns()
        ('layer4.*', 'fc')
    """

    ranks: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    """Glob over site names -> one rank for every mode, or a tuple of one for each mode (tucker2: output, input); at least
    1. The first pattern that matches a site is used. Ranks are never rounded."""
    exact = True

    def __post_init__(self) -> None:
        if not isinstance(self.ranks, Mapping) or not self.ranks:
            raise PolicyError(
                f"Fixed({self.ranks!r}) names no site: it takes a mapping from site patterns to ranks. "
                f"For example Fixed({{'layer4.*': 64}})."
            )
        # The rule is frozen, and the caller's dictionary is not.
        ranks = {pattern: tuple(given) if isinstance(given, list) else given for pattern, given in self.ranks.items()}
        for pattern, given in ranks.items():
            each = given if isinstance(given, tuple) else (given,)
            if not each or not all(map(is_count, each)):
                raise PolicyError(
                    f"Fixed rank {given!r} for {pattern!r} is not a whole number of at least 1, nor a tuple of them. "
                    f"To keep a site as it is, name it in Policy(exclude=...) instead."
                )
        object.__setattr__(self, "ranks", ranks)

    def __hash__(self) -> int:
        return hash(tuple(self.ranks.items()))

    @property
    def reads_values(self) -> bool:
        """False, unless a subclass has a ``choose`` of its own."""
        return type(self).choose is not Fixed.choose

    def patterns(self) -> tuple[str, ...]:
        """Return the patterns that ranks were given for."""
        return tuple(self.ranks)

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Return the ranks of the first pattern that matches ``site``.

        Raises:
            PolicyError: The number of ranks is not the scheme's, or a rank is above the full rank.
        """
        given = next((ranks for pattern, ranks in self.ranks.items() if fnmatchcase(site, pattern)), None)
        if given is None:
            return Choice((), kept="no pattern of Fixed matches it")
        full = tuple(spectrum.full_rank for spectrum in spectra)
        ranks = given if isinstance(given, tuple) else tuple(min(given, most) for most in full)
        if len(ranks) != len(full):
            raise PolicyError(
                f"Fixed gives {len(ranks)} ranks {ranks} for site {site!r}, whose scheme takes {len(full)}. "
                f"Its full ranks are {full}: give one number for all modes, or a tuple of {len(full)}."
            )
        if any(rank > most for rank, most in zip(ranks, full, strict=True)):
            raise PolicyError(
                f"Fixed ranks {ranks} for site {site!r} are above its full ranks {full}. Give ranks of at most {full}."
            )
        return Choice(ranks, exact=True)
