"""Checks of settings: what is a number, a whole number or a share, and records from files with typed fields."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeGuard, TypeVar, get_args, get_type_hints

from tdfx.errors import PolicyError, nearest

T = TypeVar("T")


def is_number(value: object) -> bool:
    """Return True for a finite number; a bool is none, nor is a whole number that is too large to be a float.

    >>> is_number(2), is_number(0.5), is_number(True), is_number("2"), is_number(10**400)
    (True, True, False, False, False)
    """
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_count(value: object) -> TypeGuard[int]:
    """Return True for a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_share(name: str, value: float, meaning: str, example: str, *, zero_allowed: bool = False) -> None:
    """Raise PolicyError unless ``value`` is a share in (0, 1], or in [0, 1] where zero is allowed."""
    if not is_number(value) or value > 1 or value < 0 or (value == 0 and not zero_allowed):
        interval = "[0, 1]" if zero_allowed else "(0, 1]"
        raise PolicyError(f"{name}={value!r} is not in {interval}: it is {meaning}. {example}")


def check_whole(name: str, value: object, meaning: str, example: str) -> None:
    """Raise PolicyError unless ``value`` is a whole number of at least 1."""
    if not is_count(value):
        raise PolicyError(f"{name}={value!r} is not a whole number of at least 1: it is {meaning}. Pass {example}.")


class FieldError(ValueError):
    """A field of a record that is unknown, missing or of another type; its text continues "the record ..."."""

    def __init__(self, text: str, record: tuple[str | int, ...] = ()) -> None:
        super().__init__(text)
        self.record = record
        """Keys and indices that lead to the record from the outermost one."""


def read_record(kind: type[T], data: object) -> T:
    """Build a dataclass from what a JSON or TOML parser returned.

    Fields may be dataclasses too, or tuples of them. Nothing is converted but lists to tuples and texts to enums.

    Raises:
        FieldError: A field is unknown, missing or not of its declared type. What a ``__post_init__`` raises is passed on.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Size:
        ...     sides: tuple[int, ...] = ()
        >>> read_record(Size, {"sides": [2, 3]})
        Size(sides=(2, 3))
        >>> read_record(Size, {"sides": [2, "3"]})
        Traceback (most recent call last):
        tdfx.checks.FieldError: has sides[1]='3', which is not a whole number
    """
    import pydantic  # not at the top: it takes a while to load, and only files need it

    try:
        text = json.dumps([data], default=str)
        (record,) = _adapter(kind).validate_json(text)  # type: ignore[arg-type]
    except RecursionError as error:
        raise FieldError("is nested too deeply") from error
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False)
        cause = problems[0].get("ctx", {}).get("error")
        raise (cause if isinstance(cause, Exception) else _field_error(kind, problems)) from error
    return record  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=16)
def _adapter(kind: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    # The settings of a tuple hold for the dataclass in it; those of a dataclass would have to stand in its own body.
    return TypeAdapter(tuple[kind], config=ConfigDict(strict=True, extra="forbid"))


_EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a table of fields",
    "float_type": "a number",
    "greater_than": "a whole number of 64 bits",
    "int_type": "a whole number",
    "less_than": "a whole number of 64 bits",
    "string_type": "text",
    "tuple_type": "a list",
}
"""pydantic's kinds of errors -> what was expected, in words."""


def _field_error(kind: type[Any], problems: Sequence[Any]) -> FieldError:
    """Return the first of pydantic's errors in plain words."""
    problem = problems[0]
    path = problem["loc"][1:]
    last = max((index for index, key in enumerate(path) if isinstance(key, str)), default=0)
    record, field = path[:last], "".join(f"[{key}]" if isinstance(key, int) else key for key in path[last:])
    if problem["type"] == "unexpected_keyword_argument":
        names = [setting.name for setting in fields(_kind_at(kind, record))]
        return FieldError(f"has the unknown field {field!r}. Nearest: {nearest(field, names)}", record)
    if problem["type"] == "missing":
        missing = [other["loc"] for other in problems if other["type"] == "missing"]
        names = [repr(place[-1]) for place in missing if place[:-1] == problem["loc"][:-1]]
        return FieldError(f"lacks the field{'s' if len(names) > 1 else ''} {', '.join(names)}", record)
    options = problem.get("ctx", {}).get("expected")
    expected = f"one of {options}" if options else _EXPECTED.get(problem["type"])
    if expected is None:
        return FieldError(f"cannot be read: {problem['msg']}", record)
    text = f"has {field}={problem['input']!r}, which is not {expected}" if field else f"is not {expected}"
    return FieldError(text, record)


def _kind_at(kind: Any, path: tuple[str | int, ...]) -> Any:
    """Return the dataclass that keys and indices lead to."""
    for key in path:
        kind = get_args(kind)[0] if isinstance(key, int) else get_type_hints(kind)[key]
    return kind
