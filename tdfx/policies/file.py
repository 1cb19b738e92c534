"""Policies from files: TOML or JSON, with the settings of ``Policy`` under their own names."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from tdfx.cost.measured import Measured
from tdfx.cost.modelled import Cost, Modelled
from tdfx.errors import PolicyError, nearest
from tdfx.policies.policy import BUDGETS, PUBLIC, Policy
from tdfx.ranks.fixed import Fixed
from tdfx.ranks.registry import parse_rule
from tdfx.ranks.rule import RankRule

_KEYS = (*PUBLIC, *BUDGETS, "error")
_COSTS: dict[str, type[Measured | Modelled]] = {"measured": Measured, "modelled": Modelled}
_AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_LONGEST = 80
"""Characters of a value that an error message shows."""
T = TypeVar("T")


def read_policy(source: str | Path | Mapping[str, Any]) -> Policy:
    """Read a policy from a TOML or JSON file, or from a mapping that holds the same.

    The keys are the settings of ``Policy``. ``rank`` is a rule as on the command line, such as ``"energy:0.9,at_least=8"``,
    or several rules with ``|`` in between, or a table of ranks by site name, as for ``Fixed``. ``cost`` is ``"measured"``,
    ``"modelled"``, or a table with one of these under ``use`` and its settings. ``overrides`` maps patterns to ``"keep"`` or
    to tables of the same keys, which inherit what they leave out, as overrides in Python do.

    Args:
        source: Path of a file whose name ends in ``.toml`` or ``.json``, or a mapping.

    Raises:
        PolicyError: The file cannot be read, or holds an unknown key or a value out of range; the message says where.

    Example:
        >>> read_policy({"rank": "ratio:0.5", "exclude": ["fc"], "cost": "modelled"}).rank
        Ratio(of=0.5)
    """
    name = "The policy" if isinstance(source, Mapping) else f"The policy {str(source)!r}"
    table = source if isinstance(source, Mapping) else _load(Path(source))
    try:
        return _Reader(name).policy(table)
    except RecursionError as error:
        message = f"{name} has overrides within overrides without end. Name the sites in fewer tables."
        raise PolicyError(message) from error


def _load(path: Path) -> object:
    name, language = f"The policy {str(path)!r}", path.suffix[1:].upper()
    if language not in {"TOML", "JSON"}:
        raise PolicyError(f"{name} is neither TOML nor JSON by its name. Name a file that ends in .toml or .json.")
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if language == "TOML" else json.loads(text)
    except OSError as error:
        raise PolicyError(f"{name} could not be read: {error.strerror or error}. Name a file that exists.") from error
    except (ValueError, RecursionError) as error:  # both parsers' errors, and text that is not UTF-8
        raise PolicyError(f"{name} is not {language}: {error}. Correct the file there.") from error


class _Reader:
    """Reads the tables of one source; its errors name the source and the key at which a value is wrong."""

    def __init__(self, source: str) -> None:
        self.source = source

    def policy(self, table: object, path: str = "") -> Policy:
        """Return the policy that a parsed table describes; ``path`` is the keys under which the table stands."""
        if not isinstance(table, Mapping):
            text = f'{_shorten(table)} is not a table of settings. Write for example rank = "energy:0.9".'
            raise self._error(path, text)
        self._check_keys(table, _KEYS, path)
        settings = {key: value for key, value in table.items() if key != "overrides"}
        if "rank" in settings:
            settings["rank"] = self._rank(settings["rank"], _join(path, "rank"))
        if "cost" in settings:
            settings["cost"] = self._cost(settings["cost"], _join(path, "cost"))
        budgets = {key: settings[key] for key in BUDGETS if key in settings}
        for key, value in settings.items():
            # Each setting is tried alone, so that an error names its key; ``error`` is valid beside a budget only.
            trial = {**(budgets if key == "error" else {}), key: value}
            self._make(lambda trial=trial: Policy(**trial), _join(path, key))  # type: ignore[misc]
        policy = self._make(lambda: Policy(**settings), path)
        if "overrides" not in table:
            return policy
        path = _join(path, "overrides")
        overrides = self._overrides(table["overrides"], path)
        return self._make(lambda: Policy(**settings, overrides=overrides), path)

    def _overrides(self, tables: object, path: str) -> dict[str, Policy | None]:
        if not isinstance(tables, Mapping):
            example = '"layer4.*" = {rank = "ratio:0.5"}, or "fc" = "keep"'
            text = f"{_shorten(tables)} is not a table from patterns to policies. Write for example {example}."
            raise self._error(path, text)
        return {
            pattern: None if table in ("keep", None) else self.policy(table, _join(path, repr(pattern)))
            for pattern, table in tables.items()
        }

    def _rank(self, value: object, path: str) -> RankRule:
        if isinstance(value, Mapping):
            return self._make(lambda: Fixed(value), path)
        if isinstance(value, str):
            return self._make(lambda: parse_rule(value), path)
        text = f'{_shorten(value)} is not a rule. Write for example "energy:0.9", or a table of ranks by site.'
        raise self._error(path, text)

    def _cost(self, value: object, path: str) -> Cost:
        table: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"use": value}
        name = table.pop("use", "measured")
        if not isinstance(name, str) or name not in _COSTS:
            text = f"{_shorten(name)} is not a cost. Nearest: {nearest(str(name), _COSTS, 1)}."
            example = '"measured" or "modelled", or a table such as {use = "measured", budget = 30}'
            raise self._error(path, f"{text} Write {example}.")
        cost = _COSTS[name]
        self._check_keys(
            table, [setting.name for setting in fields(cost) if setting.name not in {"modelled", "update"}], path
        )
        if "autocast" in table:
            table["autocast"] = self._dtype(table["autocast"], _join(path, "autocast"))
        return self._make(lambda: cost(**table), path)

    def _dtype(self, value: object, path: str) -> torch.dtype:
        if not isinstance(value, str) or value not in _AUTOCAST_DTYPES:
            text = f"{_shorten(value)} is not one of {', '.join(_AUTOCAST_DTYPES)}. Leave it out for none."
            raise self._error(path, text)
        return _AUTOCAST_DTYPES[value]

    def _check_keys(self, table: Mapping[Any, object], keys: Sequence[str], path: str) -> None:
        for key in (key for key in table if key not in keys):
            place = f" under {path}" if path else ""
            raise PolicyError(
                f"{self.source} has the unknown key {_shorten(key)}{place}. Nearest: {nearest(str(key), keys, 1)}; "
                f"all of them: {', '.join(keys)}."
            )

    def _make(self, make: Callable[[], T], path: str) -> T:
        """Return what a function makes, or raise its error with the keys under which its values stand."""
        try:
            return make()
        except (PolicyError, ValueError) as error:  # ValueError: a message would show a number that is far too long
            raise self._error(path, str(error)) from error

    def _error(self, path: str, message: str) -> PolicyError:
        return PolicyError(f"{self.source}{f', key {path}' if path else ''}: {message}")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _shorten(value: object) -> str:
    """Return a value as text that is short enough for a message."""
    try:
        text = repr(value)
    except ValueError:  # TOML's 0x takes numbers that Python does not write in decimal
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
