"""What a rank rule is, and the rules made of other rules: bounds, a rounding of their own, and a fallback."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
    """Why there are no ranks: the site shows no signal above the noise yet, or the rule does not name it."""
    signal: bool = True
    """False where the weight shows nothing above the noise, so that any rank read from it would be meaningless."""
    exact: bool = False
    """True where the policy's rounding must leave the ranks alone."""
    limits: tuple[int, ...] = ()
    """One rank for each spectrum that rounding must not exceed; () for the full ranks."""


class RankRule(ABC):
    """A frozen setting with one method; a rule reads singular values and never sees a module.

    A new rule is one file: subclass this as a frozen, keyword-only dataclass, and add it to ``tdfx.ranks.registry``.
    Rules are combined by methods; the last one applied decides.

    Example:
        >>> from tdfx import VBMF, Fixed, Ratio
        >>> Fixed({"fc": 32}) | VBMF().at_least(16) | Ratio(of=0.5)
        Fixed(ranks={'fc': 32}) | VBMF(floor=0.25, weaken=1.0).at_least(16) | Ratio(of=0.5)
    """

    __slots__ = ()

    @property
    def exact(self) -> bool:
        """True if the rule may choose ranks that the policy's rounding must leave alone, such as ranks given by hand."""
        return False

    @property
    def reads_values(self) -> bool:
        """True if the rule may look at singular values; otherwise it is given full ranks alone, which cost nothing."""
        return True

    @abstractmethod
    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Return the ranks of one site.

        Args:
            site: The site's name, for rules that name sites.
            spectra: One spectrum for each rank that the scheme asks for.
        """

    def patterns(self) -> tuple[str, ...]:
        """Return the site patterns that the rule mentions, so that a pattern without a match can be reported."""
        return ()

    def at_least(self, least: int | float) -> AtLeast:
        """Return this rule with a floor under its ranks.

        Args:
            least: A whole number of ranks, cut to the full rank; or, as a float in (0, 1], a share of the full rank.
        """
        return AtLeast(rule=self, least=least)

    def at_most(self, most: int | float) -> AtMost:
        """Return this rule with a ceiling over its ranks, which rounding does not exceed either.

        Args:
            most: A whole number of ranks; or, as a float in (0, 1], a share of the full rank.
        """
        return AtMost(rule=self, most=most)

    def round_to(self, multiple: int) -> RoundTo:
        """Return this rule with its ranks rounded up to a multiple of its own in place of the policy's."""
        return RoundTo(rule=self, multiple=multiple)

    def __or__(self, other: RankRule) -> Fallback:
        """Return a rule by which ``other`` decides where this one keeps the site."""
        return Fallback(rules=(self, other)) if isinstance(other, RankRule) else NotImplemented


@dataclass(frozen=True, slots=True, kw_only=True)
class _Modifier(RankRule):
    """A rule that changes the ranks of another one, and keeps the sites that the other one keeps."""

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
        return choice if choice.kept else self._change(choice, tuple(spectrum.full_rank for spectrum in spectra))

    @abstractmethod
    def _change(self, choice: Choice, full: tuple[int, ...]) -> Choice:
        """Return a choice with other ranks."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class AtLeast(_Modifier):
    """A floor under the ranks that a rule chooses; what ``rule.at_least(...)`` returns."""

    least: int | float
    """A whole number of ranks, at least 1, cut to the full rank; or, as a float, a share of the full rank in (0, 1]."""
    is_share: bool = field(init=False)
    """True if ``least`` is a share; a field because 1 (one rank) and 1.0 (every rank) are equal in Python."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_share", _is_share("at_least", self.least))

    def __repr__(self) -> str:
        return f"{_parenthesize(self.rule)}.at_least({self.least!r})"

    def _change(self, choice: Choice, full: tuple[int, ...]) -> Choice:
        least = [math.ceil(self.least * rank) if self.is_share else min(int(self.least), rank) for rank in full]
        ranks = tuple(max(pair) for pair in zip(choice.ranks, least, strict=True))
        # A ceiling that was set before must not undo this floor.
        limits = tuple(max(pair) for pair in zip(choice.limits, least, strict=True)) if choice.limits else ()
        return replace(choice, ranks=ranks, limits=limits, note=_note(choice, "raised", ranks))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class AtMost(_Modifier):
    """A ceiling over the ranks that a rule chooses; what ``rule.at_most(...)`` returns."""

    most: int | float
    """A whole number of ranks, at least 1; or, as a float, a share of the full rank in (0, 1], which leaves at least one
    rank. Rounding stops at it, as it does at the full rank."""
    is_share: bool = field(init=False)
    """True if ``most`` is a share."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_share", _is_share("at_most", self.most))

    def __repr__(self) -> str:
        return f"{_parenthesize(self.rule)}.at_most({self.most!r})"

    @property
    def exact(self) -> bool:
        """True: the policy's rounding does not go above the ceiling."""
        return True

    def _change(self, choice: Choice, full: tuple[int, ...]) -> Choice:
        most = [max(math.floor(self.most * rank), 1) if self.is_share else int(self.most) for rank in full]
        ranks = tuple(min(pair) for pair in zip(choice.ranks, most, strict=True))
        limits = tuple(min(pair) for pair in zip(choice.limits or full, most, strict=True))
        return replace(choice, ranks=ranks, limits=limits, note=_note(choice, "lowered", ranks))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RoundTo(_Modifier):
    """A rounding that belongs to a rule, in place of the policy's; what ``rule.round_to(...)`` returns."""

    multiple: int
    """Ranks are rounded up to a multiple of this, at least 1, but not above the full rank; 1 leaves them alone."""

    def __post_init__(self) -> None:
        if not isinstance(self.multiple, int) or isinstance(self.multiple, bool) or self.multiple < 1:
            raise PolicyError(
                f"round_to({self.multiple!r}) is not a whole number of at least 1: ranks are rounded up to a multiple of "
                f"it. Pass 1 for no rounding."
            )

    def __repr__(self) -> str:
        return f"{_parenthesize(self.rule)}.round_to({self.multiple!r})"

    @property
    def exact(self) -> bool:
        """True: the policy's rounding does not come after this one."""
        return True

    def _change(self, choice: Choice, full: tuple[int, ...]) -> Choice:
        return replace(choice, ranks=round_ranks(choice.ranks, choice.limits or full, self.multiple), exact=True)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Fallback(RankRule):
    """The first of several rules that gives ranks for a site; what ``rule | other`` returns."""

    rules: tuple[RankRule, ...]
    """The rules in the order in which they are asked."""

    def __post_init__(self) -> None:
        rules = (rule.rules if isinstance(rule, Fallback) else (rule,) for rule in self.rules)
        object.__setattr__(self, "rules", tuple(rule for some in rules for rule in some))

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
        """Return the first choice that has ranks; without one, the first for lack of a signal, or the last."""
        choices: list[Choice] = []
        for rule in self.rules:
            choice = rule.choose(site, spectra)
            if not choice.kept:
                return choice if not choices else replace(choice, note=_join(f"by {rule!r}", choice.note))
            choices.append(choice)
        return next((choice for choice in choices if not choice.signal), choices[-1])


def round_ranks(ranks: Sequence[int], full: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Round each rank up to a multiple, but never above its full rank.

    >>> round_ranks((5, 30), (64, 27), 8)
    (8, 27)
    """
    return tuple(min(-(-rank // multiple) * multiple, most) for rank, most in zip(ranks, full, strict=True))


def _is_share(name: str, value: int | float) -> bool:
    """Return True for a share of the full rank, False for a number of ranks.

    Raises:
        PolicyError: The value is neither.
    """
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    is_share = isinstance(value, float) and 0 < value <= 1
    if not is_count and not is_share:
        raise PolicyError(
            f"{name}({value!r}) is neither a whole number of ranks of at least 1 nor a share of the full rank in (0, 1]. "
            f"Pass for example {name}(8) for eight ranks, or {name}(0.25) for a quarter of each full rank."
        )
    return is_share


def _parenthesize(rule: RankRule) -> str:
    """Return a rule as it stands before the dot of a method."""
    return f"({rule!r})" if isinstance(rule, Fallback) else repr(rule)


def _note(choice: Choice, verb: str, ranks: tuple[int, ...]) -> str:
    """Return the note of a choice, extended if its ranks have changed."""
    if ranks == choice.ranks:
        return choice.note
    return _join(choice.note, f"{verb} from {'/'.join(map(str, choice.ranks))}")


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
