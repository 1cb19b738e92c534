"""Reduce a value to the plain types that ``torch.load(weights_only=True)`` accepts."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdfx.errors import CheckpointError


def as_plain(value: Any, where: str) -> Any:
    """Return a copy of nested containers; tensors are detached and share memory with the originals.

    Raises:
        CheckpointError: The value, described by ``where``, holds an object that cannot be loaded without running code.
    """
    if value is None or isinstance(value, bool | bytes | bytearray | torch.dtype | torch.device | torch.Size):
        return value
    if isinstance(value, Tensor):
        detached = value.detach()
        # torch.save would write the whole storage of a view, so a view is copied.
        has_storage = type(detached) is Tensor and not detached.is_sparse
        return detached.clone() if has_storage and detached.untyped_storage().nbytes() > detached.nbytes else detached
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, complex):
        return complex(value)
    if isinstance(value, dict):
        kind = type(value) if type(value) in {Counter, OrderedDict} else dict
        return kind({as_plain(key, where): as_plain(item, f"{where}[{key!r}]") for key, item in value.items()})
    if isinstance(value, list | tuple):
        items = [as_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, set | frozenset):
        return {as_plain(item, where) for item in value}
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return as_plain(value.item(), where)
    if isinstance(value, np.ndarray):
        return _tensor_of(value, where)
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold: loading it "
        f"would run code. Turn it into numbers, text, bytes, tensors, or lists, tuples, sets and dicts of these, as "
        f".state_dict() and .tolist() do."
    )


def _tensor_of(array: np.ndarray[Any, Any], where: str) -> Tensor:
    """Return a tensor with the numbers of an array, since loading an array would run code."""
    try:
        return torch.from_numpy(array.copy())
    except TypeError as error:
        raise CheckpointError(
            f"{where} is a NumPy array of {array.dtype}, and a checkpoint holds arrays of numbers only, as tensors. Turn it "
            f"into a list by .tolist(), or into numbers by .astype()."
        ) from error
