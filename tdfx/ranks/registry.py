"""The rank rules by name, and the short strings that stand for rules on the command line and in files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce
from operator import or_

from tdfx.errors import PolicyError, nearest
from tdfx.ranks.budget import DEFAULT_RULE, Budget
from tdfx.ranks.energy import Energy
from tdfx.ranks.ratio import Ratio
from tdfx.ranks.rule import RankRule
from tdfx.ranks.stable import StableRank
from tdfx.ranks.threshold import Threshold
from tdfx.ranks.vbmf import VBMF

_RULES: dict[str, tuple[Callable[..., RankRule], str | None]] = {
    "default": (partial(replace, DEFAULT_RULE), "speedup"),
    "vbmf": (VBMF, "floor"),
    "energy": (Energy, "share"),
    "ratio": (Ratio, "of"),
    "stable": (StableRank, None),
    "threshold": (Threshold, "above"),
    "params": (Budget, "parameters"),
    "flops": (Budget, "flops"),
    "speedup": (Budget, "speedup"),
}
"""Name -> the rule, and the setting that the number after the colon is for; None if it takes no number."""

_NEEDS_NUMBER = {"threshold", "params", "flops", "speedup"}
_METHODS = ("at_least", "at_most", "round_to")


def parse_rule(text: str) -> RankRule:
    """Build a rank rule from a short string: a name, or a name and a number, then any bounds.

    >>> parse_rule("energy:0.8")
    Energy(share=0.8)
    >>> parse_rule("vbmf")
    VBMF(floor=0.25, weaken=1.0)
    >>> parse_rule("energy:0.8,at_least=8")
    Energy(share=0.8).at_least(8)
    >>> parse_rule("params:0.5")
    Budget(parameters=0.5)
    >>> parse_rule("speedup:2")
    Budget(speedup=2.0)
    >>> parse_rule("default:3")
    Budget(speedup=3.0, strict=False, floor=0.25, noise_floor=0.25)
    >>> parse_rule("vbmf | ratio:0.5")
    VBMF(floor=0.25, weaken=1.0) | Ratio(of=0.5)

    A bound with a decimal point is a share of the full rank, and one without is a number of ranks, as in the methods of the
    same names; bounds are applied from left to right. With ``|`` in between, each rule decides where those before it keep
    the site.

    Raises:
        PolicyError: The name is unknown, or a number is missing, malformed or out of range.
    """
    return reduce(or_, map(_parse_one, text.split("|")))


def rule_names() -> tuple[str, ...]:
    """Return the names that short strings may begin with.

    >>> rule_names()[:3]
    ('default', 'vbmf', 'energy')
    """
    return tuple(_RULES)


def _parse_one(text: str) -> RankRule:
    first, *bounds = map(str.strip, text.split(","))
    return reduce(_add_bound, bounds, _parse_name(first))


def _parse_name(text: str) -> RankRule:
    name, colon, number = text.partition(":")
    if (key := name.lower()) not in _RULES:
        raise PolicyError(
            f"{text!r} names no rank rule: {name!r} is not one of {', '.join(_RULES)}. "
            f"Nearest: {nearest(key, _RULES, 1)}. Write a name, or a name and a number, such as energy:0.9."
        )
    rule, setting = _RULES[key]
    if not colon and key in _NEEDS_NUMBER:
        raise PolicyError(f"{text!r} needs a number. Write for example {name}:{2 if name == 'speedup' else 0.5}.")
    if not colon:
        return rule()
    if setting is None:
        raise PolicyError(f"{text!r} has a number, and {name} takes none. Write {name}.")
    try:
        value = float(number)
    except ValueError:
        message = f"{text!r} has no number after the colon, but {number!r}. Write for example {name}:0.5."
        raise PolicyError(message) from None
    return rule(**{setting: value})


def _add_bound(rule: RankRule, text: str) -> RankRule:
    name, _, number = text.partition("=")
    if name not in _METHODS:
        raise PolicyError(
            f"{text!r} is not a bound on ranks: {name!r} is not one of {', '.join(_METHODS)}. "
            f"Write for example energy:0.9,at_least=8."
        )
    try:
        value = float(number) if "." in number else int(number)
    except ValueError:
        message = f"{text!r} has no number after the equals sign, but {number!r}. Write {name}=8 for eight."
        raise PolicyError(message) from None
    bounded: RankRule = getattr(rule, name)(value)
    return bounded
