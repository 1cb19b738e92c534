"""Weights from a file, for a model that was built without."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tdfx.errors import ModelReferenceError


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict, also one that lies under the key ``state_dict`` or ``model`` of a checkpoint."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many classes for a file that is missing, damaged or not weights
        first_line = str(error).partition("\n")[0].rstrip(".")
        raise ModelReferenceError(
            f"The weights {str(path)!r} could not be read: {type(error).__name__}: {first_line}. "
            f"Save them with torch.save(model.state_dict(), path)."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    try:
        model.load_state_dict(found)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelReferenceError(
            f"The weights {str(path)!r} do not fit {type(model).__name__}: {error}. Name the model they were saved from."
        ) from error
