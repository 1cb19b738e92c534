"""The two sides of ``tdfx verify``: ONNX files, or models by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from tdfx.cli.references import build_model
from tdfx.errors import ModelReferenceError

Side = nn.Module | Path

_SEED = 0
"""Seed of models without ``--weights``, so that the same code gives the same weights on both sides."""


def build_sides(
    names: tuple[str, str], weights: Sequence[Path], load: Callable[[nn.Module, Path], None]
) -> tuple[Side, Side]:
    """Return the models or files that two names on the command line stand for.

    Args:
        names: Each the path of an ONNX file, or a model as ``build_model`` takes it.
        weights: Files of weights: none, one for all models, or one for each, in order.
        load: Loads weights into a model.

    Raises:
        ModelReferenceError: There is no such file or model, or the number of weights does not fit that of models.
    """
    is_file = [_is_file(name) for name in names]
    models = is_file.count(False)
    if len(weights) > max(1, models) or (weights and not models):
        raise ModelReferenceError(
            f"There are {len(weights)} --weights for {models} model(s): an ONNX file has its own. Give one for all models, "
            f"or one for each, in their order."
        )
    remaining = iter(weights if len(weights) > 1 else [*weights] * models)
    sides: list[Side] = []
    for name, file in zip(names, is_file, strict=True):
        if file:
            sides.append(Path(name))
            continue
        torch.manual_seed(_SEED)
        model = build_model(name)
        if weights:
            load(model, next(remaining))
        sides.append(model)
    return sides[0], sides[1]


def _is_file(name: str) -> bool:
    """Return True for the path of an ONNX file, which need not exist, and False for the name of a model."""
    if Path(name).suffix == ".onnx" or Path(name).is_file():
        return True
    if ":" not in name:
        raise ModelReferenceError(
            f"{name!r} is not a file, and it does not name a model. Write the path of an .onnx file, torchvision:resnet50, "
            f"package.module:factory, or path/to/file.py:factory."
        )
    return False
