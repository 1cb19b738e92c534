"""Assignments in place and unpacking, as functions that a graph calls where its code would do something else."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

NAMES = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)
"""The functions of ``operator`` that stand for assignments in place, such as ``iadd`` for ``+=``."""


def _function(name: str) -> Callable[[Any, Any], Any]:
    assign: Callable[[Any, Any], Any] = getattr(operator, name)

    def function(value: Any, other: Any) -> Any:
        """Assign in place where the value can change, and return what its name stands for afterwards."""
        return assign(value, other)

    function.__name__ = function.__qualname__ = name
    return function


BY_OPERATOR = {getattr(operator, name): _function(name) for name in NAMES}
"""Function of ``operator`` -> the same, which a graph calls instead of writing a statement."""
globals().update({function.__name__: function for function in BY_OPERATOR.values()})  # by which a graph imports them


def unpacked(value: Any, count: int) -> tuple[Any, ...]:
    """Return the parts of a value.

    Raises:
        ValueError: It has not so many parts.
    """
    parts = tuple(value)
    if len(parts) != count:
        relation = "too many values to unpack" if len(parts) > count else "not enough values to unpack"
        raise ValueError(f"{relation} (expected {count}, got {len(parts)})")
    return parts
