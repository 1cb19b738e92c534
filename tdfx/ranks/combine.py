"""Rules made of other rules: bounds on their ranks, a rounding of their own, and one rule where another has no answer."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tdfx.errors import PolicyError
from tdfx.ranks.rule import Choice, RankRule, round_ranks
from tdfx.ranks.spectrum import Spectrum


@dataclass(frozen=True, slots=True, kw_only=True)
class _Around(RankRule):
    """A rule that changes what another one chose, and keeps the sites that it keeps."""

    rule: RankRule
    """The rule that chooses first."""

    @property
    def exact(self) -> bool:
        """As the rule inside."""
        return self.rule.exact

    @property
    def reads_values(self) -> bool:
        """As the rule inside."""
        return self.rule.reads_values

    def patterns(self) -> tuple[str, ...]:
        """Return the patterns of the rule inside."""
        return self.rule.patterns()

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Return the changed choice of the rule inside, or its reason to keep the site."""
        choice = self.rule.choose(site, spectra)
        return choice if choice.kept else self._change(choice, tuple(one.full_rank for one in spectra))

    @abstractmethod
    def _change(self, choice: Choice, full: tuple[int, ...]) -> Choice:
        """Return a choice that has ranks with others in their place."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class AtLeast(_Around):
    """A floor under the ranks that a rule chooses; what ``rule.at_least(...)`` returns."""

    least: int | float
    """A whole number of ranks, at least 1, cut to the full rank; or, as a float, a share of the full rank in (0, 1]."""
    is_share: bool = field(init=False)
    """True if ``least`` is a share: 1 is one rank, 1.0 is every rank, and Python holds the two for equal."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_share", _is_share("at_least", self.least))

    def __repr__(self) -> str:
        return f"{_inside(self.rule)}.at_least({self.least!r})"

    def _change(self, choice: Choice, full: tuple[int, ...]) -> Choice:
        least = [math.ceil(self.least * one) if self.is_share else min(int(self.least), one) for one in full]
        ranks = tuple(max(pair) for pair in zip(choice.ranks, least, strict=True))
        # A ceiling set before must not take back what this floor gives.
        limits = tuple(max(pair) for pair in zip(choice.limits, least, strict=True)) if choice.limits else ()
        return replace(choice, ranks=ranks, limits=limits, note=_told(choice, "raised", ranks))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class AtMost(_Around):
    """A ceiling over the ranks that a rule chooses; what ``rule.at_most(...)`` returns."""

    most: int | float
    """A whole number of ranks, at least 1; or, as a float, a share of the full rank in (0, 1], of which at least one rank
    is left. Rounding stops at it, as it does at the full rank."""
    is_share: bool = field(init=False)
    """True if ``most`` is a share."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_share", _is_share("at_most", self.most))

    def __repr__(self) -> str:
        return f"{_inside(self.rule)}.at_most({self.most!r})"

    @property
    def exact(self) -> bool:
        """True: the policy's rounding does not go above the ceiling."""
        return True

    def _change(self, choice: Choice, full: tuple[int, ...]) -> Choice:
        most = [max(math.floor(self.most * one), 1) if self.is_share else int(self.most) for one in full]
        ranks = tuple(min(pair) for pair in zip(choice.ranks, most, strict=True))
        limits = tuple(min(pair) for pair in zip(choice.limits or full, most, strict=True))
        return replace(choice, ranks=ranks, limits=limits, note=_told(choice, "lowered", ranks))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RoundTo(_Around):
    """A rounding that goes with a rule, in place of the policy's; what ``rule.round_to(...)`` returns."""

    multiple: int
    """Ranks are rounded up to a multiple of this, at least 1, but not above the full rank; 1 leaves them alone."""

    def __post_init__(self) -> None:
        if not isinstance(self.multiple, int) or isinstance(self.multiple, bool) or self.multiple < 1:
            raise PolicyError(
                f"round_to({self.multiple!r}) is not a whole number of at least 1: ranks are rounded up to a multiple of "
                f"it. Pass 1 for no rounding."
            )

    def __repr__(self) -> str:
        return f"{_inside(self.rule)}.round_to({self.multiple!r})"

    @property
    def exact(self) -> bool:
        """True: the policy's rounding does not come after this one."""
        return True

    def _change(self, choice: Choice, full: tuple[int, ...]) -> Choice:
        return replace(choice, ranks=round_ranks(choice.ranks, choice.limits or full, self.multiple), exact=True)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Fallback(RankRule):
    """The first of several rules that gives ranks for a site; what ``one | other`` returns."""

    rules: tuple[RankRule, ...]
    """The rules in the order in which they are asked."""

    def __post_init__(self) -> None:
        flat = (one.rules if isinstance(one, Fallback) else (one,) for one in self.rules)
        object.__setattr__(self, "rules", tuple(rule for some in flat for rule in some))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.rules))

    @property
    def exact(self) -> bool:
        """True if any of the rules may choose ranks that rounding must leave alone."""
        return any(rule.exact for rule in self.rules)

    @property
    def reads_values(self) -> bool:
        """True if any of the rules may look at singular values."""
        return any(rule.reads_values for rule in self.rules)

    def patterns(self) -> tuple[str, ...]:
        """Return the patterns of all rules, in their order."""
        return tuple(pattern for rule in self.rules for pattern in rule.patterns())

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Return the first choice that has ranks; without one, the first that misses a signal, or the last."""
        choices: list[Choice] = []
        for rule in self.rules:
            choice = rule.choose(site, spectra)
            if not choice.kept:
                return choice if not choices else replace(choice, note=_join(f"by {rule!r}", choice.note))
            choices.append(choice)
        return next((one for one in choices if not one.signal), choices[-1])


def _is_share(name: str, value: int | float) -> bool:
    """Return True for a share of the full rank, False for a number of ranks.

    Raises:
        PolicyError: The value is neither.
    """
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    share = isinstance(value, float) and 0 < value <= 1
    if not whole and not share:
        raise PolicyError(
            f"{name}({value!r}) is neither a whole number of ranks of at least 1 nor a share of the full rank in (0, 1]. "
            f"Pass for example {name}(8) for eight ranks, or {name}(0.25) for a quarter of each full rank."
        )
    return share


def _inside(rule: RankRule) -> str:
    """Return a rule as it stands before the dot of a method."""
    return f"({rule!r})" if isinstance(rule, Fallback) else repr(rule)


def _told(choice: Choice, verb: str, ranks: tuple[int, ...]) -> str:
    return (
        choice.note if ranks == choice.ranks else _join(choice.note, f"{verb} from {'/'.join(map(str, choice.ranks))}")
    )


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
