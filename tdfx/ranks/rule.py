"""What a rank rule is, and the rules made of other rules: bounds, a rounding of their own, and a fallback."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar

from tdfx.checks import is_count
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

    A new rule is one class: subclass this as a frozen, keyword-only dataclass, and pass it as ``Policy(rank=...)``. Rules
    are combined by methods; the last one applied decides.

    Example:
        >>> import dataclasses, tdfx, torch
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class AboveMean(tdfx.RankRule):
        ...     times: float = 1.0
        ...
        ...     def choose(self, site, spectra):
        ...         counts = [int((each.values > self.times * each.values.mean()).sum()) for each in spectra]
        ...         return tdfx.Choice(tuple(max(1, count) for count in counts))
        >>> policy = tdfx.Policy(rank=AboveMean(times=1.5).at_most(0.25), min_gain=0)
        >>> tdfx.plan(torch.nn.Linear(64, 64), policy).sites[0].ranks
        (16,)

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
        """Return the ranks of the site of a name, from one spectrum for each rank that the scheme asks for."""

    def patterns(self) -> tuple[str, ...]:
        """Return the site patterns that the rule mentions, so that a pattern without a match can be reported."""
        return ()

    def at_least(self, least: int | float) -> AtLeast:
        """Return this rule with a floor: a whole number of ranks, or as a float in (0, 1] a share of the full rank."""
        return AtLeast(rule=self, value=least)

    def at_most(self, most: int | float) -> AtMost:
        """Return this rule with a ceiling, given as in ``at_least``, which rounding does not exceed either."""
        return AtMost(rule=self, value=most)

    def round_to(self, multiple: int) -> RoundTo:
        """Return this rule with its ranks rounded up to a multiple of its own in place of the policy's."""
        return RoundTo(rule=self, value=multiple)

    def __or__(self, other: RankRule) -> Fallback:
        """Return a rule by which ``other`` decides where this one keeps the site."""
        return Fallback(rules=(self, other)) if isinstance(other, RankRule) else NotImplemented


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class _Modifier(RankRule):
    """A rule that changes the ranks of another one, and keeps the sites that the other one keeps."""

    rule: RankRule
    """The rule that chooses first."""
    value: int | float
    """What the method was given that made this rule."""
    _method: ClassVar[str]

    @abstractmethod
    def __post_init__(self) -> None: ...

    def __repr__(self) -> str:
        inner = f"({self.rule!r})" if isinstance(self.rule, Fallback) else repr(self.rule)
        return f"{inner}.{self._method}({self.value!r})"

    @property
    def exact(self) -> bool:
        return self.rule.exact

    @property
    def reads_values(self) -> bool:
        return self.rule.reads_values

    def patterns(self) -> tuple[str, ...]:
        return self.rule.patterns()

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        choice = self.rule.choose(site, spectra)
        return choice if choice.kept else self._change(choice, tuple(spectrum.full_rank for spectrum in spectra))

    @abstractmethod
    def _change(self, choice: Choice, full: tuple[int, ...]) -> Choice:
        """Return a choice with other ranks."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class _Bound(_Modifier):
    """A bound on ranks: a whole number of at least 1, or as a float a share of the full rank in (0, 1]."""

    is_share: bool = field(init=False)
    """True for a share; a field because 1 (one rank) and 1.0 (every rank) are equal in Python."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_share", isinstance(self.value, float) and 0 < self.value <= 1)
        if not self.is_share and not is_count(self.value):
            raise PolicyError(
                f"{self._method}({self.value!r}) is neither a whole number of ranks of at least 1 nor a share of the full "
                f"rank in (0, 1]. Pass for example {self._method}(8) for eight ranks, or {self._method}(0.25) for a quarter."
            )


class AtLeast(_Bound):
    """A floor under the ranks that a rule chooses, cut to the full rank; what ``rule.at_least(...)`` returns."""

    __slots__ = ()
    _method = "at_least"

    def _change(self, choice: Choice, full: tuple[int, ...]) -> Choice:
        least = [math.ceil(self.value * rank) if self.is_share else min(int(self.value), rank) for rank in full]
        ranks = tuple(max(pair) for pair in zip(choice.ranks, least, strict=True))
        # A ceiling that was set before must not undo this floor.
        limits = tuple(map(max, choice.limits, least))
        return replace(choice, ranks=ranks, limits=limits, note=_note(choice, "raised", ranks))


class AtMost(_Bound):
    """A ceiling over the ranks that a rule chooses, at least 1; rounding stops at it. ``rule.at_most(...)`` returns it."""

    __slots__ = ()
    _method = "at_most"
    exact = True

    def _change(self, choice: Choice, full: tuple[int, ...]) -> Choice:
        most = [max(math.floor(self.value * rank), 1) if self.is_share else int(self.value) for rank in full]
        ranks = tuple(min(pair) for pair in zip(choice.ranks, most, strict=True))
        limits = tuple(map(min, choice.limits or full, most))
        return replace(choice, ranks=ranks, limits=limits, note=_note(choice, "lowered", ranks))


class RoundTo(_Modifier):
    """A rounding up to multiples in place of the policy's, at most to the full rank; what ``rule.round_to(...)`` returns."""

    __slots__ = ()
    _method = "round_to"
    exact = True

    def __post_init__(self) -> None:
        if not is_count(self.value):
            text = f"round_to({self.value!r}) is not a whole number of at least 1: ranks become multiples of it."
            raise PolicyError(f"{text} Pass 1 for no rounding.")

    def _change(self, choice: Choice, full: tuple[int, ...]) -> Choice:
        return replace(choice, ranks=round_ranks(choice.ranks, choice.limits or full, int(self.value)), exact=True)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Fallback(RankRule):
    """The first of several rules that gives ranks for a site; what ``rule | other`` returns."""

    rules: tuple[RankRule, ...]
    """The rules in the order in which they are asked."""

    def __post_init__(self) -> None:
        rules = (rule.rules if isinstance(rule, Fallback) else (rule,) for rule in self.rules)
        object.__setattr__(self, "rules", tuple(chain.from_iterable(rules)))

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
        return tuple(chain.from_iterable(rule.patterns() for rule in self.rules))

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


def _note(choice: Choice, verb: str, ranks: tuple[int, ...]) -> str:
    """Return the note of a choice, extended if its ranks have changed."""
    change = "" if ranks == choice.ranks else f"{verb} from {'/'.join(map(str, choice.ranks))}"
    return _join(choice.note, change)


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def check_choice(rule: RankRule, choice: object, spectra: Sequence[Spectrum]) -> Choice:
    """Return what a rule chose, or raise PolicyError if it is no choice for these spectra: the rule may be a user's."""
    if not isinstance(choice, Choice):
        text = f"returned {choice!r}, which is no tdfx.Choice. Return for example tdfx.Choice((8,))"
    elif choice.kept or (len(choice.ranks) == len(spectra) and all(map(is_count, choice.ranks))):
        return choice
    else:
        text = (
            f"chose the ranks {choice.ranks!r} for {len(spectra)} spectra. Return one whole number of at least 1 for each "
            f"spectrum, or say in kept= why there are none"
        )
    raise PolicyError(f"{type(rule).__name__}.choose {text}.")
