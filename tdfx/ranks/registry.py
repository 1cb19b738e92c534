"""The rank rules by name, and the short strings by which the command line asks for one."""

from __future__ import annotations

from tdfx.errors import PolicyError, nearest
from tdfx.ranks.energy import Energy
from tdfx.ranks.ratio import Ratio
from tdfx.ranks.rule import RankRule
from tdfx.ranks.vbmf import VBMF

_RULES: dict[str, tuple[type[RankRule], str]] = {
    "vbmf": (VBMF, "floor"),
    "energy": (Energy, "share"),
    "ratio": (Ratio, "of"),
}
"""Name -> the rule, and the setting that the number after the colon fills."""


def parse_rule(text: str) -> RankRule:
    """Build a rank rule from a short string: a name, or a name and a number.

    >>> parse_rule("energy:0.8")
    Energy(share=0.8)
    >>> parse_rule("vbmf")
    VBMF(floor=0.25)

    Raises:
        PolicyError: The name is not known, or what follows the colon is not a number in range.
    """
    name, colon, number = text.strip().partition(":")
    if name.lower() not in _RULES:
        raise PolicyError(
            f"{text!r} names no rank rule: {name!r} is not one of {', '.join(_RULES)}. "
            f"Nearest: {nearest(name.lower(), _RULES, 1)}. Write a name, or a name and a number, such as energy:0.9."
        )
    rule, setting = _RULES[name.lower()]
    if not colon:
        return rule()
    try:
        value = float(number)
    except ValueError:
        raise PolicyError(
            f"{text!r} has no number after the colon: {number!r} is not one. Write for example {name}:0.5."
        ) from None
    return rule(**{setting: value})
