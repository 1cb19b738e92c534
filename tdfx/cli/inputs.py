"""Example inputs from their shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from tdfx.errors import InputError, first_line

_INPUT_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def parse_input(text: str, device: torch.device | str = "cpu") -> Tensor:
    """Return a tensor for a shape: random where the dtype is floating, zeros where it is not.

    >>> parse_input("int64:2,3").shape, parse_input("2,3").dtype
    (torch.Size([2, 3]), torch.float32)

    Raises:
        InputError: The text is no shape, or such a tensor cannot be made on the device.
    """
    kind, colon, shape = text.rpartition(":")
    dtype = getattr(torch, kind, None) if colon else torch.float32
    sizes = shape.split(",")
    if dtype not in _INPUT_DTYPES or not all(size.strip().isdecimal() for size in sizes):
        raise InputError(
            f"--input {text!r} is not a shape: it takes whole numbers with commas, with a dtype before a colon where it is "
            f"not float32. Write for example 8,3,224,224 or int64:2,16."
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
