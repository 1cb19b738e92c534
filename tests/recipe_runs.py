"""What the tests of the training recipe share: its modules, and a tiny network on a data set that take no time."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import checkout
import torch
from torch import nn

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "tiny"},
    "data": {"name": "digits", "batch": 300},
    "training": {"epochs": 3, "optimizer": "adamw", "lr": 0.01},
    "switch": {"policy": "ratio:0.5", "min_gain": 0.0, "cost": "modelled", "weigh": False},
    "output": {"verify": False},
}
"""A run of 3 epochs of 3 steps."""


def tool(name: str) -> ModuleType:
    """Import a module of the tools folder, and register the tiny network with the recipe."""
    checkout.tool("recipe.models").BUILDERS.setdefault("tiny", tiny)
    return checkout.tool(name)


def tiny(settings: Any, shape: Any) -> nn.Module:
    """Return a network that draws random numbers during training, and has running statistics."""
    return nn.Sequential(
        nn.Conv2d(shape.colors, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, shape.classes),
    )


def config_of(**changes: Any) -> Any:
    """Return the settings of a tiny run, with some replaced: ``training__epochs=2``."""
    config = tool("recipe.config")
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    return config.with_values(config.config_from(TINY), overrides)


def run_of(config: Any) -> Any:
    """Return a new run in this process alone."""
    return tool("recipe.trainer").TrainingRun(config, tool("recipe.processes").Process(), torch.device("cpu"))
