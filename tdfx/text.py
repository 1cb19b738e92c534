"""Numbers as text for people."""

from __future__ import annotations

import re
from collections.abc import Sequence


def short_number(value: float) -> str:
    """Return a count with three figures and a letter for the thousands.

    >>> short_number(1234567), short_number(17)
    ('1.23M', '17')
    """
    size = float(value)
    for letter in ("", "k", "M", "G", "T"):
        if abs(size) < 999.5:
            return f"{size:.0f}" if not letter else f"{size:.3g}{letter}"
        size /= 1000
    return f"{size:.3g}P"


def before_after(before: int | None, after: int | None) -> str:
    """Return a count before and after a rewrite.

    >>> before_after(4_580_000, 570_000), before_after(7, 7), before_after(None, None)
    ('4.58M → 570k', '7', '')
    """
    if before is None or after is None:
        return ""
    return short_number(before) if before == after else f"{short_number(before)} → {short_number(after)}"


def milliseconds(before: float | None, after: float | None, *, estimated: bool = False) -> str:
    """Return times in milliseconds with three figures, and with a mark if they are estimates.

    >>> milliseconds(0.01234, 0.005), milliseconds(1.5, 1.5), milliseconds(1.5, 1.25, estimated=True)
    ('12.3 → 5', '1500', '~1500 → 1250')
    """
    if before is None or after is None:
        return ""
    mark = "~" if estimated else ""
    first, last = _three_digits(1e3 * before), _three_digits(1e3 * after)
    return mark + (first if before == after else f"{first} → {last}")


def _three_digits(value: float) -> str:
    """Return a number with three figures, without an exponent up to a million."""
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.3g}"


def share(before: float | None, after: float | None) -> str:
    """Return what is left in percent; "" where nothing changed, or where it is unknown.

    >>> share(200, 50), share(200, 200)
    ('25%', '')
    """
    return f"{after / before:.0%}" if before and after is not None and before != after else ""


def times_faster(before: float, after: float | None) -> str:
    """Return how many times shorter a time became; "" where it did not change.

    >>> times_faster(3.0, 1.5)
    '2.00x faster'
    """
    return f"{before / after:.2f}x faster" if after and after != before else ""


def without_addresses(text: str) -> str:
    """Return a repr without the addresses of objects, which differ between processes.

    >>> without_addresses("Policy(cost=<Cost object at 0x7f00>)")
    'Policy(cost=<Cost object>)'
    """
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def first_names(names: Sequence[str]) -> str:
    """Return the first three names, and dots for the others.

    >>> first_names(["a", "b"]), first_names(["a", "b", "c", "d"])
    ("'a', 'b'", "'a', 'b', 'c' ...")
    """
    return ", ".join(map(repr, names[:3])) + (" ..." if len(names) > 3 else "")
