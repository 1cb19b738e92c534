"""The user's wish: which rank rule and scheme, for which sites, and when a rewrite is worth it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Literal, cast

from tdfx.checks import is_number
from tdfx.cost.measured import Measured
from tdfx.cost.modelled import Cost
from tdfx.errors import PolicyError
from tdfx.factors.registry import AUTO, get_scheme
from tdfx.ranks.budget import DEFAULT_RULE, Budget, Measure
from tdfx.ranks.multiple import AUTO as AUTO_MULTIPLE
from tdfx.ranks.rule import RankRule


@dataclass(frozen=True, slots=True)
class _Lent:
    """What a policy has that it was not given, so that it can be lent something else in its place."""

    rank: RankRule
    """The default rule; or as an override that of the policy around it."""
    cost: Cost | None = None
    """As a part of a budget, the cost of the policy around it."""
    own_cost: Cost | None = None
    """What it was given itself, in place of which that stands."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Policy:
    """What to rewrite and how far; checked when it is made, so that a mistake never reaches a model.

    Site names are the paths of the layers, such as ``layer1.0.conv2``; patterns are globs over them, case-sensitive.

    Example:
        >>> import tdfx
        >>> tdfx.Policy(rank=tdfx.Energy(share=0.8), exclude=("fc",)).wants("layer1.0.conv1")
        True
    """

    rank: RankRule = field(default=cast("RankRule", None))
    """The rule that reads a rank from each weight, or what keeps the budgets below. If left out: a step twice as fast at the
    least error, or as near to that as is reasonable, with no rank below an eighth of the full one where much would be
    lost, nor below a quarter where a weight shows no signal yet."""
    scheme: str = AUTO
    """How weights are split: ``"auto"`` for tucker2 or svd, whichever fits each site, or a scheme's name, with its options
    after a colon as in ``"tucker2:refine=3"``."""
    include: tuple[str, ...] = ("*",)
    """Patterns of the sites that may be rewritten."""
    exclude: tuple[str, ...] = ()
    """Patterns of the sites that are kept, whatever ``include`` says."""
    overrides: Mapping[str, Policy | None] = field(default_factory=dict)
    """Pattern -> the policy used in place of this one, or None to keep the site; the first match counts. One that gives no
    rank takes this policy's, and another one in ``dataclasses.replace(policy, rank=...)``; where that is a budget its sites
    are part of it, with their own scheme, ``round_to`` and ``min_gain``, and this policy's ``cost``."""
    min_gain: float = 1.05
    """A site is rewritten only if its training step gets at least this many times faster by ``cost``; 0 takes every
    site whatever it costs, so that nothing is measured unless a budget of time asks for it."""
    round_to: int | Literal["auto"] = 8
    """Ranks are rounded up to a multiple of this, at least 1, since hardware computes channels in blocks. Ranks at full
    rank and ranks given by ``Fixed`` are left alone. ``"auto"`` takes the multiple from each weight's dtype and device
    (CUDA: 16 bytes, from compute capability 8.0 on 128; CPU: a vector register), and a rank below it goes up to a power of
    two instead, so that no rank is doubled."""
    cost: Cost = field(default_factory=Measured)
    """What says how long a site takes, dense and factorized: measured on this machine, or ``Modelled()``."""
    speedup: InitVar[float | None] = None
    """A budget in place of ``rank``, which is then ``Budget(...)``: how many times faster the training step shall be."""
    seconds: InitVar[float | None] = None
    """What the training step may take, in seconds."""
    flops: InitVar[float | None] = None
    """Forward operations of the sites: a share, or a whole number of them."""
    parameters: InitVar[float | None] = None
    """Parameters of the model: a share, or a whole number of them."""
    memory: InitVar[float | None] = None
    """Bytes that the sites add to a training step: a share, or a whole number of them."""
    error: InitVar[Measure | None] = None
    """What a budget keeps small: the error of the ``"weights"``, of the ``"outputs"``, or by the loss's ``"curvature"``."""
    _lent: _Lent | None = field(default=None, compare=False)
    """Not to be given. A field nonetheless: ``dataclasses.replace``, copies and pickles then carry it."""

    def __post_init__(
        self,
        speedup: float | None,
        seconds: float | None,
        flops: float | None,
        parameters: float | None,
        memory: float | None,
        error: Measure | None,
    ) -> None:
        budgets = {"speedup": speedup, "seconds": seconds, "flops": flops, "parameters": parameters, "memory": memory}
        rank = self._rule(budgets, error)
        if self.rank is None and rank is DEFAULT_RULE:
            object.__setattr__(self, "_lent", _Lent(DEFAULT_RULE))
        object.__setattr__(self, "rank", rank)
        if not isinstance(self.rank, RankRule):
            raise PolicyError(
                f"rank={self.rank!r} is not a rank rule: it decides how much of each weight is kept. "
                f"Pass for example rank=tdfx.Energy(share=0.9) or rank=tdfx.Ratio(of=0.25)."
            )
        if self.scheme != AUTO:
            get_scheme(self.scheme)
        if isinstance(self.cost, type) or not callable(getattr(self.cost, "seconds", None)):
            raise PolicyError(
                f"cost={self.cost!r} cannot say how long a site takes: it needs a method seconds(chain, flow). "
                f"Pass an object, such as cost=tdfx.Modelled()."
            )
        object.__setattr__(self, "include", _patterns("include", self.include))
        object.__setattr__(self, "exclude", _patterns("exclude", self.exclude))
        own = {key: self._joined(one) for key, one in _overrides(self.overrides).items()}
        object.__setattr__(self, "overrides", own)
        for key, one in own.items():
            if one is not None and isinstance(one.rank, Budget) and one.rank != self.rank:
                raise PolicyError(
                    f"An override has a budget, and a budget is for all sites together: the override for {key!r} has "
                    f"{one.rank!r}, and the policy {self.rank!r}. Give a budget to the policy itself, and the sites of the "
                    f"override another rule, or none."
                )
        if not (is_number(self.min_gain) or self.min_gain == math.inf) or self.min_gain < 0:
            raise PolicyError(
                f"min_gain={self.min_gain!r} is not a number of at least 0: it is how many times faster a site must "
                f"get to be rewritten. Pass 1.05 for five percent, or 0 to rewrite every site whatever it costs."
            )
        is_whole = isinstance(self.round_to, int) and not isinstance(self.round_to, bool)
        if self.round_to != AUTO_MULTIPLE and not (is_whole and int(self.round_to) >= 1):
            raise PolicyError(
                f"round_to={self.round_to!r} is not a whole number of at least 1: ranks are rounded up to a multiple "
                f"of it. Pass {AUTO_MULTIPLE!r} for what suits each weight's dtype and device. Pass 1 for no rounding."
            )

    def _rule(self, budgets: Mapping[str, float | None], error: Measure | None) -> RankRule:
        """Return the rule in force: the one given, one that keeps the budgets given, or the default."""
        given = {name: value for name, value in budgets.items() if value is not None}
        if not given:
            if error is not None:
                raise PolicyError(
                    f"error={error!r} says what a budget keeps small, and no budget is given beside it. Pass for example "
                    f"Policy(speedup=2, error={error!r})."
                )
            return DEFAULT_RULE if self.rank is None else self.rank
        if self.rank is not None:
            raise PolicyError(
                f"rank={self.rank!r} and {', '.join(f'{name}={value!r}' for name, value in given.items())} both say which "
                f"ranks to take. Leave out one of the two."
            )
        return Budget(**given, error="weights" if error is None else error)

    def _joined(self, override: Policy | None) -> Policy | None:
        """Give an override this policy's rank where it has none of its own; where that is a budget, its cost too."""
        if override is None:
            return None
        lent, in_budget = override._lent, isinstance(self.rank, Budget)
        if lent is None or override.rank != lent.rank:
            return replace(override, cost=self.cost) if in_budget and override.rank == self.rank else override
        own = lent.own_cost if lent.own_cost is not None and override.cost == lent.cost else override.cost
        cost = self.cost if in_budget else own
        return replace(override, rank=self.rank, cost=cost, _lent=_Lent(self.rank, cost, own))

    def __repr__(self) -> str:
        """Return the call that makes it; an override is shown as it was given, without what it has from around it."""
        return f"Policy({', '.join(f'{name}={text}' for name, text in self._settings())})"

    def _settings(self) -> Iterator[tuple[str, str]]:
        for one in fields(self):
            if one.name == "overrides":
                inside = (
                    f"{key!r}: {own._as_given()}" if own else f"{key!r}: None" for key, own in self.overrides.items()
                )
                yield one.name, f"{{{', '.join(inside)}}}"
            elif one.name != "_lent":
                yield one.name, repr(getattr(self, one.name))

    def _as_given(self) -> str:
        lent = self._lent if self._lent is not None and self.rank == self._lent.rank else None
        settings = dict(self._settings())
        if lent is not None:
            del settings["rank"]
            if lent.own_cost is not None and self.cost == lent.cost:
                settings["cost"] = repr(lent.own_cost)
        return f"Policy({', '.join(f'{name}={text}' for name, text in settings.items())})"

    def __hash__(self) -> int:
        return hash((self.rank, self.scheme, self.include, self.exclude, self.min_gain, self.round_to))

    def wants(self, *names: str) -> bool:
        """Return True if ``include`` names a site, by any of its names, and ``exclude`` does not; overrides do not count."""
        return _names_any(self.include, names) and not _names_any(self.exclude, names)

    def for_site(self, *names: str) -> Policy | None:
        """Return the policy in force for a site, overrides looked up; None if the site is to be kept.

        Args:
            names: All names of the site; a layer that a model holds under two paths has two.
        """
        if not self.wants(*names):
            return None
        for pattern, policy in self.overrides.items():
            if _names_any((pattern,), names):
                return policy.for_site(*names) if policy is not None else None
        return self

    def patterns(self) -> dict[str, tuple[str, ...]]:
        """Return every pattern that the policy mentions, by the setting it stands in; the default include is left out."""
        include = () if self.include == ("*",) else self.include
        return {
            "include": include,
            "exclude": self.exclude,
            "overrides": tuple(self.overrides),
            "rank": self.rank.patterns(),
        }


def _names_any(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern, name in itertools.product(patterns, names))


def _patterns(name: str, given: object) -> tuple[str, ...]:
    """Return patterns as a tuple; a bare string is the mistake that would be read letter by letter."""
    if isinstance(given, str) or not isinstance(given, tuple | list) or any(not isinstance(one, str) for one in given):
        raise PolicyError(
            f"{name}={given!r} is not a tuple of patterns: each is a glob over site names. "
            f"Pass for example {name}=('layer1.*', 'fc')."
        )
    return tuple(given)


def _overrides(given: object) -> dict[str, Policy | None]:
    if not isinstance(given, Mapping) or any(
        not isinstance(key, str) or not isinstance(value, Policy | None) for key, value in given.items()
    ):
        raise PolicyError(
            f"overrides={given!r} does not map patterns to policies: each pattern gets a Policy, or None to keep its "
            f"sites. Pass for example overrides={{'layer4.*': tdfx.Policy(rank=tdfx.Ratio(of=0.5)), 'fc': None}}."
        )
    return dict(given)
