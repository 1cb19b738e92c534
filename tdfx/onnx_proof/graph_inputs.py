"""Turn tensors into the arrays that an ONNX graph takes, or make random ones."""

from __future__ import annotations

import re
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

    from tdfx.onnx_proof.graph import Graph, Port
    from tdfx.onnx_proof.module_inputs import ExampleInputs

Array = npt.NDArray[np.generic]

_DYNAMIC_SIZE = 2
"""Size of dynamic axes of random inputs."""

_ONNX_NAMES = {torch.float64: "double", torch.float32: "float"}
"""The types that ONNX calls by another name than torch."""


def to_arrays(inputs: ExampleInputs, ports: Sequence[Port]) -> list[Array]:
    """Return example inputs as arrays, in the graph's order.

    Raises:
        InputError: Their number, names, dtypes or shapes differ from the graph's.
    """
    names = ", ".join(repr(port.name) for port in ports)
    if len(inputs) != len(ports):
        raise InputError(f"example_inputs holds {len(inputs)} tensor(s), but the graph takes {len(ports)}: {names}.")
    if isinstance(inputs, dict):
        missing = [port.name for port in ports if port.name not in inputs]
        if missing:
            passed = ", ".join(map(repr, inputs))
            raise InputError(f"example_inputs has no {missing[0]!r}, only {passed}; the graph takes {names}.")
        inputs = tuple(inputs[port.name] for port in ports)
    return [_to_array(tensor, port) for tensor, port in zip(inputs, ports, strict=True)]


def _to_array(tensor: Tensor, port: Port) -> Array:
    dtype = _ONNX_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
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
    """Return a tensor's values as an array of the dtype that ONNX Runtime takes and returns."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
        return tensor.view(torch.int16).numpy().view(tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    array: Array = tensor.numpy()
    return array


def random_inputs(graph: Graph) -> list[Array]:
    """Return an array for each input, the same on every call: normal, or zeros and ones for integers and flags.

    Raises InputError if an input has no fixed number of axes, or is not numeric.
    """
    generator = np.random.default_rng(0)
    return [_random_input(port, generator) for port in graph.inputs]


def _random_input(port: Port, generator: np.random.Generator) -> Array:
    name = {"float": "float32", "double": "float64"}.get(port.dtype, port.dtype)
    if port.shape is None or not re.fullmatch(r"bool|float(16|32|64)|u?int\d+", name):
        raise InputError(
            f"no random values can be made for input {port.name!r} ({port.dtype}, shape {port.shape}): pass example_inputs."
        )
    shape = [size if isinstance(size, int) else _DYNAMIC_SIZE for size in port.shape]
    if name.startswith("float"):
        return generator.standard_normal(shape).astype(name)
    return generator.integers(0, 2, shape).astype(name)
