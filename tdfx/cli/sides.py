"""The two sides of ``tdfx verify``: ONNX files, or models by name; and inputs from a file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tdfx.cli.references import build_model
from tdfx.errors import InputError, ModelReferenceError

Side = nn.Module | Path

_SEED = 0
"""What models without ``--weights`` are built with, so that the same code gives the same weights on both sides."""


def build_sides(
    names: tuple[str, str], weights: Sequence[Path], load: Callable[[nn.Module, Path], None]
) -> tuple[Side, Side]:
    """Return what two names on the command line stand for.

    Args:
        names: each the path of an ONNX file, or a model as ``build_model`` takes it.
        weights: none; one for every model; or one for each, in order.
        load: loads weights into a model.

    Raises:
        ModelReferenceError: a name stands for nothing, or the weights are not as many as the models.
    """
    is_file = [_is_file(name) for name in names]
    models = is_file.count(False)
    if len(weights) > max(1, models) or (weights and not models):
        raise ModelReferenceError(
            f"There are {len(weights)} --weights for {models} model(s): an ONNX file has its own. Give one for all models, "
            f"or one for each, in their order."
        )
    waiting = list(weights) if len(weights) > 1 else list(weights) * models
    made: list[Side] = []
    for name, file in zip(names, is_file, strict=True):
        if file:
            made.append(Path(name))
            continue
        torch.manual_seed(_SEED)
        model = build_model(name)
        if waiting:
            load(model, waiting.pop(0))
        made.append(model)
    return made[0], made[1]


def _is_file(name: str) -> bool:
    """Tell the path of an ONNX file, which need not exist, from the name of a model."""
    if Path(name).suffix == ".onnx" or Path(name).is_file():
        return True
    if ":" not in name:
        raise ModelReferenceError(
            f"{name!r} is no file, and it does not name a model. Write the path of an .onnx file, torchvision:resnet50, "
            f"package.module:factory, or path/to/file.py:factory."
        )
    return False


def read_inputs(path: Path) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Return the arrays of an .npz file: by name, or in order where NumPy named them (``arr_0``, ``arr_1`` ...).

    No code in the file is run.

    Raises:
        InputError: it cannot be read, or holds no arrays of numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        first_line = str(error).partition("\n")[0].rstrip(".") or "no message"
        raise InputError(
            f"The inputs {str(path)!r} could not be read: {type(error).__name__}: {first_line}. Save them with "
            f"numpy.savez(path, x=array), by the names of the model's inputs."
        ) from error
    wrong = [name for name, one in arrays.items() if one.dtype.kind not in "biufc"]
    if wrong or not arrays:
        found = f"{wrong[0]!r} is of dtype {arrays[wrong[0]].dtype}" if wrong else "it holds no array"
        raise InputError(f"The inputs {str(path)!r} are no arrays of numbers: {found}.")
    tensors = {name: torch.from_numpy(np.array(one)) for name, one in arrays.items()}
    ordered = [f"arr_{index}" for index in range(len(tensors))]
    return tuple(tensors[name] for name in ordered) if set(ordered) == set(tensors) else tensors
