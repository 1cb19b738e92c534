"""Policies from files: TOML or JSON, with the settings of ``Policy`` under their own names."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from tdfx.cost.measured import Measured
from tdfx.cost.modelled import Cost, Modelled
from tdfx.errors import PolicyError, nearest
from tdfx.policies.policy import Policy
from tdfx.ranks.fixed import Fixed
from tdfx.ranks.registry import parse_rule
from tdfx.ranks.rule import RankRule

_BUDGETS = ("speedup", "seconds", "flops", "parameters", "memory")
_KEYS = ("rank", "scheme", "include", "exclude", "overrides", "min_gain", "round_to", "cost", *_BUDGETS, "error")
_COSTS: dict[str, type[Measured | Modelled]] = {"measured": Measured, "modelled": Modelled}
_AUTOCASTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_INHERITED = ("scheme", "min_gain", "round_to", "cost")
"""What an override takes from the policy around it where it does not say it itself; a rank comes with joining it."""
_LONGEST = 80
Made = TypeVar("Made")


def read_policy(source: str | Path | Mapping[str, Any]) -> Policy:
    """Read a policy from a TOML or JSON file, or from a mapping that holds the same.

    The keys are the settings of ``Policy``. ``rank`` is a rule as on the command line, such as ``"energy:0.9,at_least=8"``,
    or several of them with ``|`` in between, or a table of ranks by site name, as for ``Fixed``. ``cost`` is ``"measured"``,
    ``"modelled"``, or a table with one of these under ``use`` and its settings. ``overrides`` maps patterns to tables of
    the same keys, or to ``"keep"``; what such a table leaves out is as in the policy around it.

    Args:
        source: Path of a file whose name ends in ``.toml`` or ``.json``, or a mapping.

    Returns:
        The policy, which prints as it would be written in Python.

    Raises:
        PolicyError: The file cannot be read, or holds a key that is not known or a value out of range; the message names
            file and key.

    Example:
        >>> read_policy({"rank": "ratio:0.5", "exclude": ["fc"], "cost": "modelled"}).rank
        Ratio(of=0.5)
    """
    name = "The policy" if isinstance(source, Mapping) else f"The policy {str(source)!r}"
    table = source if isinstance(source, Mapping) else _loaded(Path(source))
    try:
        return _Reader(name).policy(table)
    except RecursionError as error:
        raise PolicyError(
            f"{name} has overrides within overrides without end. Name the sites in fewer tables."
        ) from error


def _loaded(path: Path) -> object:
    if path.suffix.lower() not in {".toml", ".json"}:
        raise PolicyError(
            f"The policy {str(path)!r} is neither TOML nor JSON by its name. Name a file that ends in .toml or .json."
        )
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except OSError as error:
        raise PolicyError(
            f"The policy {str(path)!r} could not be read: {error.strerror or error}. Name a file that is there."
        ) from error
    except (ValueError, RecursionError) as error:  # both parsers' errors, and text that is not UTF-8
        kind = path.suffix[1:].upper()
        raise PolicyError(f"The policy {str(path)!r} is not {kind}: {error}. Correct the file there.") from error


class _Reader:
    """Reads tables of one source, and says of what is wrong where it stands."""

    def __init__(self, source: str) -> None:
        self.source = source

    def policy(self, table: object, around: Policy | None = None, path: str = "") -> Policy:
        """Return the policy that a table describes.

        Args:
            table: What was read.
            around: The policy of which it is an override.
            path: The keys under which the table stands.
        """
        if not isinstance(table, Mapping):
            raise self._error(
                path, f'{_shown(table)} is not a table of settings. Write for example rank = "energy:0.9".'
            )
        self._check_keys(table, _KEYS, path)
        given = {key: table[key] for key in table if key != "overrides"}
        if "rank" in given:
            given["rank"] = self._rank(given["rank"], _under(path, "rank"))
        if "cost" in given:
            given["cost"] = self._cost(given["cost"], _under(path, "cost"))
        budgets = {key: given[key] for key in _BUDGETS if key in given}
        for key, value in given.items():
            # By itself, so that what is wrong with it is said of it; an error needs a budget.
            alone = {**(budgets if key == "error" else {}), key: value}
            self._made(lambda alone=alone: Policy(**alone), _under(path, key))  # type: ignore[misc]
        if around is not None:
            given = {**{name: getattr(around, name) for name in _INHERITED}, **given}
        found = self._made(lambda: Policy(**given), path)
        if "overrides" not in table:
            return found
        path = _under(path, "overrides")
        overrides = self._overrides(table["overrides"], found, path)
        return self._made(lambda: Policy(**given, overrides=overrides), path)

    def _overrides(self, tables: object, around: Policy, path: str) -> dict[str, Policy | None]:
        if not isinstance(tables, Mapping):
            raise self._error(
                path,
                f"{_shown(tables)} is not a table from patterns to policies. Write for example "
                f'"layer4.*" = {{rank = "ratio:0.5"}}, or "fc" = "keep".',
            )
        return {
            pattern: None if one in ("keep", None) else self.policy(one, around, _under(path, repr(pattern)))
            for pattern, one in tables.items()
        }

    def _rank(self, value: object, path: str) -> RankRule:
        if isinstance(value, Mapping):
            return self._made(lambda: Fixed(value), path)
        if isinstance(value, str):
            return self._made(lambda: parse_rule(value), path)
        raise self._error(
            path, f'{_shown(value)} is not a rule. Write for example "energy:0.9", or a table of ranks by site.'
        )

    def _cost(self, value: object, path: str) -> Cost:
        table: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"use": value}
        name = table.pop("use", "measured")
        if not isinstance(name, str) or name not in _COSTS:
            raise self._error(
                path,
                f"{_shown(name)} is no cost. Nearest: {nearest(str(name), _COSTS, 1)}. Write "
                f'"measured" or "modelled", or a table such as {{use = "measured", budget = 30}}.',
            )
        kind = _COSTS[name]
        known = [one.name for one in fields(kind) if one.name != "modelled"]
        self._check_keys(table, known, path)
        if "autocast" in table:
            table["autocast"] = self._dtype(table["autocast"], _under(path, "autocast"))
        return self._made(lambda: kind(**table), path)

    def _dtype(self, value: object, path: str) -> torch.dtype:
        if not isinstance(value, str) or value not in _AUTOCASTS:
            raise self._error(path, f"{_shown(value)} is not one of {', '.join(_AUTOCASTS)}. Leave it out for none.")
        return _AUTOCASTS[value]

    def _check_keys(self, table: Mapping[Any, object], known: Iterable[str], path: str) -> None:
        known = tuple(known)
        for key in table:
            if key not in known:
                place = f" under {path}" if path else ""
                raise PolicyError(
                    f"{self.source} has the unknown key {_shown(key)}{place}. Nearest: {nearest(str(key), known, 1)}; "
                    f"all of them: {', '.join(known)}."
                )

    def _made(self, make: Callable[[], Made], path: str) -> Made:
        """Return what is made, or raise its error with the place where its values stand."""
        try:
            return make()
        except (
            PolicyError,
            ValueError,
        ) as error:  # the latter where a message would show a number that is far too long
            raise self._error(path, str(error)) from error

    def _error(self, path: str, message: str) -> PolicyError:
        return PolicyError(f"{self.source}{f', key {path}' if path else ''}: {message}")


def _under(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _shown(value: object) -> str:
    """Return a value as text that is short enough for a message."""
    try:
        text = repr(value)
    except ValueError:  # TOML's 0x takes numbers that Python does not write in decimal
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
