"""Example inputs on the command line: made from shapes, or read from a file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdfx.errors import InputError, first_line

_INPUT_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def parse_input(text: str, device: torch.device | str = "cpu") -> Tensor:
    """Return a tensor of a shape: random for a floating dtype, zeros for any other.

    >>> parse_input("int64:2,3").shape, parse_input("2,3").dtype
    (torch.Size([2, 3]), torch.float32)

    Raises:
        InputError: The text is not a shape, or the tensor cannot be made on the device.
    """
    kind, colon, shape = text.rpartition(":")
    dtype = getattr(torch, kind, None) if colon else torch.float32
    sizes = shape.split(",")
    if dtype not in _INPUT_DTYPES or not all(size.strip().isdecimal() for size in sizes):
        raise InputError(
            f"--input {text!r} is not a shape: it takes whole numbers with commas, after a dtype and a colon if that is not "
            f"float32. Write for example 8,3,224,224 or int64:2,16."
        )
    try:
        dims = [int(size) for size in sizes]
        if not dtype.is_floating_point:
            return torch.zeros(dims, dtype=dtype, device=device)
        return torch.rand(dims, device=device).to(dtype)
    except (RuntimeError, OverflowError, ValueError, TypeError) as error:
        raise InputError(
            f"--input {text!r} cannot be made: {type(error).__name__}: {first_line(error)}. Give a smaller shape, or "
            f"another dtype."
        ) from error


def read_inputs(path: Path) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Return the arrays of an .npz file by name, or in order if NumPy named them (``arr_0``, ``arr_1`` ...).

    No code in the file is run.

    Raises:
        InputError: The file cannot be read, or holds something else than arrays of numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"The inputs {str(path)!r} could not be read: {type(error).__name__}: {first_line(error)}. Save them with "
            f"numpy.savez(path, x=array), by the names of the model's inputs."
        ) from error
    wrong = [name for name, array in arrays.items() if array.dtype.kind not in "biufc"]
    if wrong or not arrays:
        content = f"{wrong[0]!r} is of dtype {arrays[wrong[0]].dtype}" if wrong else "the file holds no array"
        raise InputError(
            f"The inputs {str(path)!r} are not arrays of numbers: {content}. Save arrays of numbers with "
            f"numpy.savez(path, x=array)."
        )
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    numbered = [f"arr_{index}" for index in range(len(tensors))]
    return tuple(tensors[name] for name in numbered) if set(numbered) == set(tensors) else tensors
