"""Load weights from a file into an untrained model."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdfx.errors import ModelReferenceError, first_line, nearest

_NESTED = ("state_dict", "model_state_dict", "model", "module", "net")
"""Keys under which checkpoints store the weights besides other things."""
_COMPILED = "_orig_mod"
"""What torch.compile adds to names, at the place of each compiled module."""
_PARALLEL = "module."
"""What DistributedDataParallel adds before all names."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict, written by torch.save or as safetensors; code in a file is never run.

    A state_dict inside a checkpoint is looked up under the usual keys. What DDP and torch.compile add to names is removed,
    unless the model's own names contain it.

    Raises:
        ModelReferenceError: The file cannot be read, or its weights do not fit the model.
    """
    content = _find_state_dict(_read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path))
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content) or not content:
        raise ModelReferenceError(
            f"The weights {str(path)!r} do not fit {type(model).__name__}: the file holds a {type(content).__name__}, not a "
            f"mapping from names to tensors. Save them with torch.save(model.state_dict(), path)."
        )
    state = _without_wrapper_names(content, set(model.state_dict()))
    _check(model, state, path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise ModelReferenceError(
            f"The weights {str(path)!r} do not fit {type(model).__name__}: {error}. Name the model they were saved from."
        ) from error


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many classes for a file that is missing, damaged or not weights
        # torch's own text would advise to run the code.
        is_code = isinstance(error, pickle.UnpicklingError)
        why = "it holds more than tensors, and code in a file is not run" if is_code else first_line(error)
        raise ModelReferenceError(
            f"The weights {str(path)!r} could not be read: {type(error).__name__}: {why}. "
            f"Save them with torch.save(model.state_dict(), path)."
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ModelReferenceError(
            f"The weights {str(path)!r} are read by the library safetensors, which is not installed. Install it: pip "
            f"install safetensors."
        ) from error
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # safetensors' own class of errors, and those of files
        raise ModelReferenceError(
            f"The weights {str(path)!r} could not be read: {type(error).__name__}: {first_line(error)}. Save them with "
            f"safetensors.torch.save_file(model.state_dict(), path)."
        ) from error
    return tensors


def _find_state_dict(content: Any) -> Any:
    """Return the innermost mapping under the keys that checkpoints use."""
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return _find_state_dict(content[key])
    return content


def _without_wrapper_names(state: Mapping[str, Any], own_names: set[str]) -> dict[str, Any]:
    """Remove what wrappers added to names, unless the model's own names have it."""
    names = {key: key for key in state}
    if not any(_COMPILED in name.split(".") for name in own_names):
        names = {key: ".".join(part for part in key.split(".") if part != _COMPILED) for key in names}
    while not own_names & set(names.values()) and all(name.startswith(_PARALLEL) for name in names.values()):
        names = {key: name.removeprefix(_PARALLEL) for key, name in names.items()}
    return {name: state[key] for key, name in names.items()}


def _check(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    tensors = model.state_dict()
    missing = [name for name in tensors if name not in state]
    foreign = [name for name in state if name not in tensors]
    other = [name for name, tensor in tensors.items() if name in state and _shape(state[name]) != tuple(tensor.shape)]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(tensors)} entries are missing, first {missing[0]!r}")
    if foreign:
        faults.append(
            f"{len(foreign)} are not the model's, first {foreign[0]!r} (nearest: {nearest(foreign[0], tensors, 1)})"
        )
    if other:
        first = other[0]
        faults.append(
            f"{len(other)} have another shape, first {first!r}, which is {_shape(state[first])} in the file and "
            f"{tuple(tensors[first].shape)} in the model"
        )
    if faults:
        raise ModelReferenceError(
            f"The weights {str(path)!r} do not fit {type(model).__name__}: {'; '.join(faults)}. Name the model they were "
            f"saved from."
        )


def _shape(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
