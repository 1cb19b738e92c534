"""A run's settings: one TOML file, whose values the command line may override."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator
from pydantic_core import ErrorDetails

from recipe.errors import RecipeError
from recipe.settings import (
    DataSettings,
    ModelSettings,
    OutputSettings,
    SettingsTable,
    SwitchingSettings,
    TrainingSettings,
)
from tdfx.errors import nearest


class RunConfig(SettingsTable):
    """All settings of a run."""

    name: str
    """Name of the run in tables."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    model: ModelSettings
    data: DataSettings
    training: TrainingSettings
    switch: SwitchingSettings = SwitchingSettings()
    output: OutputSettings = OutputSettings()

    @model_validator(mode="after")
    def _check_switch(self) -> Self:
        switch, epochs = self.switch, self.training.epochs
        if switch.policy != "none" and switch.when == "epoch" and switch.epoch >= epochs:
            raise ValueError(
                f"switch.epoch={switch.epoch} leaves none of the training.epochs={epochs} after the switch. Switch "
                f"earlier, or set switch.policy='none' for a run without a rewrite."
            )
        return self


def read_config(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the settings of a TOML file with a table for each part of ``RunConfig``, and replace some.

    Overrides are ``key=value``, as ``training.epochs=3``; a value is TOML, or text without quotes. RecipeError says what
    cannot be read, and which setting is unknown, missing, or out of range.
    """
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"The config file {str(file)!r} could not be read: {error}. tools/configs holds some to begin with."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"The config file {str(file)!r} is not TOML: {error}.") from error
    for override in overrides:
        _put(values, *_parse_override(override))
    return config_from(values)


def with_values(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """Return settings with some replaced, by their dotted names; RecipeError if one is unknown or out of range."""
    values = config.model_dump()
    for key, value in overrides.items():
        _put(values, key, value)
    return config_from(values)


def config_from(values: Mapping[str, Any]) -> RunConfig:
    """Return the settings in nested tables; RecipeError if one is unknown, missing, of the wrong type or out of range."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(_message(details) for details in error.errors())) from error


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set {text!r} does not say which setting gets which value. Write for example --set training.epochs=3."
        )
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{key!r} names a part of {table!r}, which is a single setting without parts.")
    values[last] = value


def _message(details: ErrorDetails) -> str:
    path = [str(part) for part in details["loc"]]
    key, value = ".".join(path), details["input"]
    match details["type"]:
        case "extra_forbidden":
            return f"There is no setting {key!r}. Nearest: {nearest(path[-1], _names_in(path[:-1]))}."
        case "missing":
            return f"The setting {key!r} is missing, and has no default."
        case "model_type":
            return f"{key}={value!r} is not a table of settings. Write [{key}] above them."
        case "value_error":
            return str(details["ctx"]["error"])
        case _:
            return f"{key}={value!r} is not allowed: {details['msg'].replace('Input', 'it', 1)}."


def _names_in(path: Sequence[str]) -> list[str]:
    table: Any = RunConfig
    for name in path:
        table = table.model_fields[name].annotation
    return list(table.model_fields)
