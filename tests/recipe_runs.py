"""What the tests of the training recipe share: its tools, and a network on a data set that take no time."""

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
    """Import one of the tools, and know the tiny network."""
    checkout.tool("recipe.models").OWN.setdefault("tiny", tiny)
    return checkout.tool(name)


def tiny(wish: Any, shape: Any) -> nn.Module:
    """Return a network that draws random numbers as it trains, and keeps statistics."""
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
    return config.with_values(
        config.build(config.Config, TINY, ""), {key.replace("__", "."): one for key, one in changes.items()}
    )


def run_of(config: Any) -> Any:
    """Return a run that was just made, in this process alone."""
    return tool("recipe.trainer").Run(config, tool("recipe.data").Place(), torch.device("cpu"))
