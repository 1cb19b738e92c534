"""Weights from a file, for a model that was built without."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdfx.errors import ModelReferenceError, first_line, nearest

_NESTED = ("state_dict", "model_state_dict", "model", "module", "net")
"""Keys under which checkpoints keep the weights beside other things."""
_COMPILED = "_orig_mod"
"""What torch.compile puts into the names, wherever a compiled module stands."""
_PARALLEL = "module."
"""What DistributedDataParallel puts before all of them."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict, written by torch.save or as safetensors; code in a file is never run.

    One that lies in a checkpoint beside other things is found there, and what DDP and torch.compile add to names is left
    out, unless the model's own names have it.

    Raises:
        ModelReferenceError: The file cannot be read, or its weights are not those of the model.
    """
    found = _unwrapped(_safetensors(path) if path.suffix == ".safetensors" else _pickled(path))
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found) or not found:
        raise ModelReferenceError(
            f"The weights {str(path)!r} do not fit {type(model).__name__}: the file holds a {type(found).__name__}, not a "
            f"mapping from names to tensors. Save them with torch.save(model.state_dict(), path)."
        )
    state = _renamed(found, set(model.state_dict()))
    _check(model, state, path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise ModelReferenceError(
            f"The weights {str(path)!r} do not fit {type(model).__name__}: {error}. Name the model they were saved from."
        ) from error


def _pickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many classes for a file that is missing, damaged or not weights
        # Where code would have to run, torch's own text says how to let it run.
        is_code = isinstance(error, pickle.UnpicklingError)
        why = "it holds more than tensors, and code in a file is not run" if is_code else first_line(error)
        raise ModelReferenceError(
            f"The weights {str(path)!r} could not be read: {type(error).__name__}: {why}. "
            f"Save them with torch.save(model.state_dict(), path)."
        ) from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ModelReferenceError(
            f"The weights {str(path)!r} are read by the library safetensors, which is not installed. Install it: pip "
            f"install safetensors."
        ) from error
    try:
        found: dict[str, Tensor] = load_file(path)
    except Exception as error:  # its errors are a class of its own, and those of files
        raise ModelReferenceError(
            f"The weights {str(path)!r} could not be read: {type(error).__name__}: {first_line(error)}. Save them with "
            f"safetensors.torch.save_file(model.state_dict(), path)."
        ) from error
    return found


def _unwrapped(found: Any) -> Any:
    """Return what lies under a key of a checkpoint, as deep as that goes."""
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            return _unwrapped(found[key])
    return found


def _renamed(state: Mapping[str, Any], wanted: set[str]) -> dict[str, Any]:
    """Leave out what wrappers added to names, as far as the model does not have it itself."""
    names = {key: key for key in state}
    if not any(_COMPILED in key.split(".") for key in wanted):
        names = {key: ".".join(part for part in key.split(".") if part != _COMPILED) for key in names}
    while not wanted & set(names.values()) and all(name.startswith(_PARALLEL) for name in names.values()):
        names = {key: name.removeprefix(_PARALLEL) for key, name in names.items()}
    return {name: state[key] for key, name in names.items()}


def _check(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Raise ModelReferenceError where names or shapes differ, with the first of each kind."""
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    foreign = [name for name in state if name not in own]
    other = [name for name, one in own.items() if name in state and _shape(state[name]) != tuple(one.shape)]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(own)} entries are missing, first {missing[0]!r}")
    if foreign:
        faults.append(
            f"{len(foreign)} are not the model's, first {foreign[0]!r} (nearest: {nearest(foreign[0], own, 1)})"
        )
    if other:
        first = other[0]
        faults.append(
            f"{len(other)} have another shape, first {first!r}, which is {_shape(state[first])} in the file and "
            f"{tuple(own[first].shape)} in the model"
        )
    if faults:
        raise ModelReferenceError(
            f"The weights {str(path)!r} do not fit {type(model).__name__}: {'; '.join(faults)}. Name the model they were "
            f"saved from."
        )


def _shape(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
