"""A run's settings: one TOML file, whose values the command line may override."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.errors import RecipeError
from recipe.settings import Data, Model, Output, Switching, Training
from tdfx.errors import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All that a run depends on beside the machine."""

    name: str
    """What the run is called in tables."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    model: Model
    data: Data
    training: Training
    switch: Switching = field(default_factory=Switching)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        wish, epochs = self.switch, self.training.epochs
        if wish.policy != "none" and wish.when == "epoch" and wish.epoch >= epochs:
            raise RecipeError(
                f"switch.epoch={wish.epoch} leaves none of the training.epochs={epochs} after the switch. Switch earlier, "
                f"or set switch.policy='none' for a run as it is."
            )


def read_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the settings of a file, with some replaced.

    Args:
        file: A TOML file with a table for each part of ``Config``.
        overrides: ``key=value`` each, as ``training.epochs=3``; a value is TOML, or text without quotes.

    Raises:
        RecipeError: There is no such file, it is no TOML, or a setting is unknown, missing, or out of range.
    """
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"The config file {str(file)!r} could not be read: {error}. tools/configs holds some to begin with."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"The config file {str(file)!r} is not TOML: {error}.") from error
    for one in overrides:
        _override(values, one)
    config: Config = build(Config, values, "")
    return config


def with_values(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return settings with some replaced by their dotted names.

    Raises:
        RecipeError: A name is unknown, or a value out of range.
    """
    values = dataclasses.asdict(config)
    for key, value in overrides.items():
        _put(values, key, value)
    changed: Config = build(Config, values, "")
    return changed


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set {text!r} does not say what to set to what. Write for example --set training.epochs=3."
        )
    try:
        read = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        read = value
    _put(values, key.strip(), read)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parts, last = key.split(".")
    for part in parts:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{key!r} names a part of {part!r}, which is a single setting and has none.")
    values[last] = value


def build(kind: Any, values: Any, where: str) -> Any:
    """Return a record made from what TOML gave, every value held to its declared type."""
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where or 'The config'}={values!r} is not a table of settings. Write [{where}] above them.")
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise RecipeError(f"There is no setting {_named(where, unknown[0])!r}. Nearest: {nearest(unknown[0], hints)}.")
    needed = (one for one in dataclasses.fields(kind) if one.default is one.default_factory is dataclasses.MISSING)
    if missing := [one.name for one in needed if one.name not in values]:
        raise RecipeError(f"The setting {_named(where, missing[0])!r} is missing, and has no default.")
    return kind(**{key: _read(hints[key], value, _named(where, key)) for key, value in values.items()})


def _read(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, name)
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for choice in choices:
        if typing.get_origin(choice) is tuple and isinstance(value, list | tuple):
            return tuple(_read(typing.get_args(choice)[0], one, name) for one in value)
        if choice is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(choice, type) and type(value) is choice:
            return value
    words = " or ".join(getattr(one, "__name__", str(one)) for one in choices)
    raise RecipeError(f"{name}={value!r} is not of the type that it should have: {words}.")


def _named(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
