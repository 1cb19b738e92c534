"""Tensors -> the arrays that a graph takes; random ones where there are none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto
from onnx.helper import tensor_dtype_to_np_dtype
from torch import Tensor

from tdfx.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tdfx.onnx_proof.arguments import Given
    from tdfx.onnx_proof.graph import Graph, Port

Array = npt.NDArray[np.generic]

_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
}


def to_arrays(inputs: Given, ports: Sequence[Port]) -> list[Array]:
    """Return example inputs as arrays, in the graph's order, after checking that the graph takes them.

    Raises:
        InputError: if their number, names, dtype or shape is not what the graph says.

    """
    names = ", ".join(repr(port.name) for port in ports)
    if len(inputs) != len(ports):
        raise InputError(f"example_inputs holds {len(inputs)} tensor(s), but the graph takes {len(ports)}: {names}.")
    if isinstance(inputs, dict):
        missing = [port.name for port in ports if port.name not in inputs]
        if missing:
            given = ", ".join(map(repr, inputs))
            raise InputError(f"example_inputs has no {missing[0]!r}, only {given}; the graph takes {names}.")
        inputs = tuple(inputs[port.name] for port in ports)
    return [_to_array(tensor, port) for tensor, port in zip(inputs, ports, strict=True)]


def _to_array(tensor: Tensor, port: Port) -> Array:
    dtype = _TYPES.get(tensor.dtype, str(tensor.dtype))
    sizes = port.shape if port.shape is not None else tuple(tensor.shape)
    fits = len(sizes) == tensor.ndim and all(
        isinstance(size, str) or size == own for size, own in zip(sizes, tensor.shape, strict=True)
    )
    if dtype != port.dtype or not fits:
        raise InputError(
            f"the example input for {port.name!r} is {dtype}{list(tensor.shape)}, but the graph takes "
            f"{port.dtype}{list(sizes)}: give a tensor of that dtype and shape."
        )
    return as_array(tensor)


def as_array(tensor: Tensor) -> Array:
    """Return a tensor's values as an array of the dtype that ONNX Runtime takes and gives."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
        return tensor.view(torch.int16).numpy().view(tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    array: Array = tensor.numpy()
    return array


def random_inputs(graph: Graph, size: int = 2, seed: int = 0) -> list[Array]:
    """Return an array for each input, the same on every call: normal, or 0 and 1 for counts and flags.

    ``size`` is what dynamic axes get.

    Raises:
        InputError: if an input has no fixed number of axes, or is not numeric.

    """
    generator = np.random.default_rng(seed)
    return [_random_input(port, size, generator) for port in graph.inputs]


def _random_input(port: Port, size: int, generator: np.random.Generator) -> Array:
    known = {"float": "float32", "double": "float64", "float16": "float16", "bool": "bool"}
    name = known.get(port.dtype, port.dtype if port.dtype.startswith(("int", "uint")) else "")
    if port.shape is None or not name:
        raise InputError(
            f"no random values can be made for input {port.name!r} ({port.dtype}, shape {port.shape}): "
            f"pass example_inputs."
        )
    shape = [one if isinstance(one, int) else size for one in port.shape]
    if name.startswith("float"):
        return generator.standard_normal(shape).astype(name)
    return generator.integers(0, 2, shape).astype(name)
