"""The user's wish: which rank rule and scheme, for which sites, and when a rewrite is worth it."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

from tdfx.checks import is_count, is_number
from tdfx.cost.measured import Measured
from tdfx.cost.modelled import Cost
from tdfx.errors import PolicyError
from tdfx.factors.registry import AUTO, get_scheme
from tdfx.ranks.budget import DEFAULT_RULE, Budget, Measure
from tdfx.ranks.multiple import AUTO as AUTO_MULTIPLE
from tdfx.ranks.rule import RankRule

_DEFAULTS: dict[str, Any] = {
    "rank": DEFAULT_RULE,
    "scheme": AUTO,
    "min_gain": 1.05,
    "round_to": 8,
    "cost": Measured(),
    "metric": "auto",
    "recompute": False,
}
"""The settings that an override inherits, and what they are where nothing is given."""
METRICS = ("auto", "loss", "inputs", "weights")
"""What errors may be measured in."""
BUDGETS = ("speedup", "seconds", "flops", "parameters", "memory")
"""The settings that stand for a budget in place of a rank rule."""
_EVERY_SITE: dict[str, Any] = {"include": ("*",), "exclude": (), "overrides": {}}
"""The settings that an override does not inherit, where they leave out no site."""
LEFT_OUT: Any = object()
"""Stands for a setting that was not given, until the policy is checked."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Policy:
    """What to rewrite and how far; checked when it is made, so that a mistake never reaches a model.

    Site names are the paths of the layers, such as ``layer1.0.conv2``; patterns are globs over them, case-sensitive. Two
    policies are equal if they decide alike: an override may leave out what another one repeats.

    Example:
        >>> import tdfx
        >>> tdfx.Policy(rank=tdfx.Energy(share=0.8), exclude=("fc",)).wants("layer1.0.conv1")
        True
        >>> policy = tdfx.Policy(scheme="svd", overrides={"fc": tdfx.Policy(rank=tdfx.Ratio(of=0.5))})
        >>> policy.for_site("fc").scheme
        'svd'
    """

    rank: RankRule = LEFT_OUT
    """The rule that reads a rank from each weight, or a budget for all sites. The default makes the step 2.5 times as fast,
    or nearly so, at the least error; no rank falls below a quarter of the full one, except by the weights alone (without
    moments) where little would be lost."""
    scheme: str = LEFT_OUT
    """How weights are split: ``"auto"`` for tucker2 or svd, as fits each site, or a scheme's name, with its options after a
    colon as in ``"tucker2:refine=3"``."""
    include: tuple[str, ...] = ("*",)
    """Patterns of the sites that may be rewritten."""
    exclude: tuple[str, ...] = ()
    """Patterns of the sites that are kept, whatever ``include`` says."""
    overrides: Mapping[str, Policy | None] = field(default_factory=dict, compare=False)
    """Pattern -> the policy used in place of this one, or None to keep the site; the first match counts. Overrides inherit
    every ``rank``, ``scheme``, ``min_gain``, ``round_to``, ``cost``, ``metric`` and ``recompute`` that they leave out. Where
    the rank is a budget, the sites of an override that gives no rank are part of it, and use this policy's ``cost``."""
    min_gain: float = LEFT_OUT
    """A site is rewritten only if its training step gets at least this many times faster by ``cost``; 0 takes every site and
    measures nothing unless a budget of time asks for it."""
    round_to: int | Literal["auto"] = LEFT_OUT
    """Ranks are rounded up to a multiple of this, at least 1, since hardware computes channels in blocks; full ranks and
    those given by ``Fixed`` are left alone. ``"auto"`` takes the multiple from each weight's dtype and device (CUDA: 16 or
    128 bytes; CPU: a vector register); a rank below it goes up to a power of two instead, so that no rank is doubled."""
    cost: Cost = LEFT_OUT
    """What says how long a site takes, dense and factorized: measured on this machine, or ``Modelled()``."""
    metric: Literal["auto", "loss", "inputs", "weights"] = LEFT_OUT
    """What errors are measured in, so that ranks, budgets and splits all follow it: ``"weights"``, the weights themselves;
    ``"inputs"``, what they do to the inputs that were seen in training; ``"loss"``, what that does to the loss, to second
    order. The last two need ``tdfx.Moments``. ``"auto"`` is ``"loss"`` where there are moments, else ``"weights"``."""
    recompute: bool = LEFT_OUT
    """Whether the backward pass computes what flows between the factors again. Training then keeps only the input of a
    factorized site, as of a dense one, and computes all factors but the last once more: for where memory bounds the step."""
    speedup: InitVar[float | None] = None
    seconds: InitVar[float | None] = None
    flops: InitVar[float | None] = None
    parameters: InitVar[float | None] = None
    memory: InitVar[float | None] = None
    error: InitVar[Measure | None] = None
    """These six settings stand for ``rank=Budget(...)`` with the same settings."""
    _left_out: frozenset[str] = field(default=frozenset(), compare=False)
    """Private: the settings that were not given. It is a field because ``dataclasses.replace`` passes on fields alone."""
    _resolved: Mapping[str, Policy | None] = field(init=False)
    """The overrides with every setting that they inherit."""

    def __post_init__(self, *budget: Any) -> None:
        set_field = partial(object.__setattr__, self)
        set_field("rank", self._rule(dict(zip((*BUDGETS, "error"), budget, strict=True))))
        left_out = frozenset(name for name in _DEFAULTS if self._is_left_out(name))
        set_field("_left_out", left_out)
        for name in left_out:
            set_field(name, _DEFAULTS[name])
        self._check()
        set_field("include", _patterns("include", self.include))
        set_field("exclude", _patterns("exclude", self.exclude))
        set_field("overrides", _overrides(self.overrides))
        resolved = {pattern: policy and self._resolve(pattern, policy) for pattern, policy in self.overrides.items()}
        set_field("_resolved", resolved)

    def _is_left_out(self, name: str) -> bool:
        """Return True for a setting that was not given, nor changed since by ``dataclasses.replace``."""
        value = getattr(self, name)
        return value is LEFT_OUT or (name in self._left_out and bool(value == _DEFAULTS[name]))

    def _rule(self, settings: Mapping[str, Any]) -> RankRule:
        """Return the rank rule that was given, None being no rule, or the budget that the short settings make."""
        rank = LEFT_OUT if self.rank is None else self.rank
        given = {name: value for name, value in settings.items() if value is not None}
        limits = [f"{name}={value!r}" for name, value in given.items() if name != "error"]
        if given and not limits:
            text = f"error={given['error']!r} says what a budget keeps small, and no budget is given beside it."
            raise PolicyError(f"{text} Leave it out, or pass a budget such as speedup=2.")
        if given and rank is not LEFT_OUT:
            raise PolicyError(f"rank={rank!r} and {', '.join(limits)} both say which ranks to take. Leave one out.")
        return Budget(**given) if given else rank

    def _check(self) -> None:
        """Raise PolicyError for a setting that cannot be carried out."""
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
        if not (is_number(self.min_gain) or self.min_gain == math.inf) or self.min_gain < 0:
            raise PolicyError(
                f"min_gain={self.min_gain!r} is not a number of at least 0: it is how many times faster a site must "
                f"get to be rewritten. Pass 1.05 for five percent, or 0 to rewrite every site whatever it costs."
            )
        if self.metric not in METRICS:
            raise PolicyError(
                f"metric={self.metric!r} is not known: errors are measured in the 'weights', in what these do to their "
                f"'inputs', or in what that does to the 'loss'. Leave it out for the loss where moments are given."
            )
        if not isinstance(self.recompute, bool):
            raise PolicyError(
                f"recompute={self.recompute!r} is neither True nor False: it says whether the backward pass computes what "
                f"flows between factors again, so that it need not be kept. Pass recompute=True, or leave it out."
            )
        if self.round_to != AUTO_MULTIPLE and not is_count(self.round_to):
            raise PolicyError(
                f"round_to={self.round_to!r} is not a whole number of at least 1: ranks are rounded up to a multiple "
                f"of it. Pass {AUTO_MULTIPLE!r} for what suits each weight's dtype and device. Pass 1 for no rounding."
            )

    def _resolve(self, pattern: str, override: Policy) -> Policy:
        """Return an override with every setting that it inherits from this policy."""
        inherited = {name: getattr(self, name) for name in override._left_out}
        rank = inherited.get("rank", override.rank)
        if isinstance(self.rank, Budget) and rank == self.rank:
            inherited["cost"] = self.cost
        elif isinstance(rank, Budget):
            raise PolicyError(
                f"An override has a budget, and a budget is for all sites together: the override for {pattern!r} has "
                f"{rank!r}, and the policy {self.rank!r}. Give the budget to the policy, and the override another rule."
            )
        return replace(override, **inherited, _left_out=frozenset())

    def __repr__(self) -> str:
        """Return the call that makes the policy; its overrides show only what they were given."""
        return self._call(PUBLIC)

    def _call(self, names: Iterable[str]) -> str:
        inner = (
            f"{pattern!r}: {policy and policy._call(policy._given())}" for pattern, policy in self.overrides.items()
        )
        settings = {name: repr(getattr(self, name)) for name in names}
        if "overrides" in settings:
            settings["overrides"] = f"{{{', '.join(inner)}}}"
        return f"Policy({', '.join(f'{name}={text}' for name, text in settings.items())})"

    def _given(self) -> Iterator[str]:
        """Yield the settings that say anything in an override."""
        for name in PUBLIC:
            if name not in self._left_out and getattr(self, name) != _EVERY_SITE.get(name, LEFT_OUT):
                yield name

    def __hash__(self) -> int:
        return hash((self.rank, self.scheme, self.include, self.exclude, self.min_gain, self.round_to, self.metric))

    def wants(self, *names: str) -> bool:
        """Return True if ``include`` names a site, by any of its names, and ``exclude`` does not; overrides do not count."""
        return _names_any(self.include, names) and not _names_any(self.exclude, names)

    def for_site(self, *names: str) -> Policy | None:
        """Return the policy in force for a site, or None if the site is to be kept.

        It has every setting that an override inherits, and is the same object at each call. Pass all names of the site: a
        layer that a model holds under two paths has two.
        """
        if not self.wants(*names):
            return None
        policy = next((policy for pattern, policy in self._resolved.items() if _names_any((pattern,), names)), self)
        return self if policy is self else policy and policy.for_site(*names)

    def patterns(self) -> dict[str, tuple[str, ...]]:
        """Return every pattern that the policy mentions, by the setting it stands in; the default include is left out."""
        include = () if self.include == ("*",) else self.include
        overrides, rank = tuple(self.overrides), self.rank.patterns()
        return {"include": include, "exclude": self.exclude, "overrides": overrides, "rank": rank}


PUBLIC = tuple(setting.name for setting in fields(Policy) if not setting.name.startswith("_"))
"""The settings of a policy, in the order in which it prints them."""


def _public_signature() -> inspect.Signature:
    """Return the signature of ``Policy.__init__`` without what is private, with the defaults that count."""
    signature = inspect.signature(Policy.__init__)
    public = [each for name, each in signature.parameters.items() if not name.startswith("_")]
    return signature.replace(
        parameters=[each.replace(default=_DEFAULTS.get(each.name, each.default)) for each in public]
    )


Policy.__init__.__signature__ = _public_signature()  # type: ignore[attr-defined]


def _names_any(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern, name in itertools.product(patterns, names))


def _patterns(name: str, given: object) -> tuple[str, ...]:
    """Return patterns as a tuple; refuse a bare string, which would be read letter by letter."""
    if not isinstance(given, tuple | list) or any(not isinstance(pattern, str) for pattern in given):
        raise PolicyError(f"{name}={given!r} is not a tuple of patterns: pass for example {name}=('layer1.*', 'fc').")
    return tuple(given)


def _overrides(given: object) -> dict[str, Policy | None]:
    """Return a private copy of the overrides: the policy is frozen, and the caller's mapping is not."""
    if not isinstance(given, Mapping) or not all(
        isinstance(pattern, str) and isinstance(policy, Policy | None) for pattern, policy in given.items()
    ):
        raise PolicyError(
            f"overrides={given!r} does not map patterns to policies: each pattern gets a Policy, or None to keep its "
            f"sites. Pass for example overrides={{'layer4.*': tdfx.Policy(rank=tdfx.Ratio(of=0.5)), 'fc': None}}."
        )
    return dict(given)


def map_costs(policy: Policy, change: Callable[[Cost], Cost]) -> Policy:
    """Return a policy with its cost changed by a function, and every cost that an override gives itself."""
    return replace(_map_given(policy, change), cost=change(policy.cost))


def _map_given(policy: Policy, change: Callable[[Cost], Cost]) -> Policy:
    """Return a policy with all costs changed that it and its overrides do not leave out."""
    cost: dict[str, Any] = {} if "cost" in policy._left_out else {"cost": change(policy.cost)}
    overrides = {pattern: override and _map_given(override, change) for pattern, override in policy.overrides.items()}
    return replace(policy, overrides=overrides, **cost)
