"""Load weights from a file into an untrained model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tdfx.checkpoint.merging import read_dense
from tdfx.errors import CheckpointError, ModelReferenceError, nearest

_COMPILED = "_orig_mod"
"""What torch.compile adds to names, at the place of each compiled module."""
_PARALLEL = "module."
"""What DistributedDataParallel adds before all names."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of any checkpoint that ``tdfx.merge_checkpoint`` reads; factors are joined, code is never run.

    What DDP, torch.compile and Lightning add to names is removed, unless the model's own names contain it.

    Raises:
        ModelReferenceError: The checkpoint cannot be read, or its weights do not fit the model.
    """
    try:
        content = read_dense(path).tensors
    except CheckpointError as error:
        text = str(error)
        if text.startswith("The checkpoint ") and " could not be read: " in text:
            raise ModelReferenceError(text.replace("The checkpoint ", "The weights ", 1)) from error
        raise ModelReferenceError(
            f"The weights {str(path)!r} do not fit {type(model).__name__}: {text[0].lower()}{text[1:]}"
        ) from error
    state = _without_wrapper_names(content, set(model.state_dict()))
    _check(model, state, path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise ModelReferenceError(
            f"The weights {str(path)!r} do not fit {type(model).__name__}: {error}. Name the model they were saved from."
        ) from error


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
