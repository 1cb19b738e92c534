"""Checks of settings: what counts as a number, a whole number or a share."""

from __future__ import annotations

import math

from tdfx.errors import PolicyError


def is_number(value: object) -> bool:
    """Return True for a finite number; a bool is none, nor is a whole number that is too large to be computed with.

    >>> is_number(2), is_number(0.5), is_number(True), is_number("2"), is_number(10**400)
    (True, True, False, False, False)
    """
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_share(name: str, value: float, meaning: str, example: str, *, zero_allowed: bool = False) -> None:
    """Raise PolicyError unless ``value`` is a share in (0, 1], or in [0, 1] where zero is allowed."""
    if not is_number(value) or value > 1 or value < 0 or (value == 0 and not zero_allowed):
        interval = "[0, 1]" if zero_allowed else "(0, 1]"
        raise PolicyError(f"{name}={value!r} is not in {interval}: it is {meaning}. {example}")


def check_whole(name: str, value: object, meaning: str, example: str) -> None:
    """Raise PolicyError unless a value is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PolicyError(
            f"{name}={value!r} is not a whole number of at least 1: it is {meaning}. Pass for example {example}."
        )
