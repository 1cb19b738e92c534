"""Tensors of which each process holds a part, as FSDP2 keeps parameters: reading them whole, and making others like them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_OF_TORCH = ("_is_param", "_ddp_", "_dynamo_", "_fsdp_")
"""How the attributes begin that torch gives to parameters for itself."""


def is_sharded(tensor: object) -> bool:
    """Return True for a DTensor: the processes of its mesh hold it together.

    >>> is_sharded(torch.ones(2))
    False
    """
    # Importing the class takes longer than all of tdfx; where nobody has, there is no such tensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def full(tensor: Tensor) -> Tensor:
    """Return a tensor with all its values, detached; a plain one as it is.

    For a sharded one every process of its mesh must call this at the same time.
    """
    if not is_sharded(tensor):
        return tensor.detach()
    sharded: Any = tensor.detach()
    device = sharded.device_mesh.device_type
    if sharded.device.type not in {device, "meta"}:  # offloaded: only the mesh's own device can communicate
        sharded = _from_local(sharded.to_local().to(device), sharded, sharded.placements)
    whole: Tensor = sharded.full_tensor()
    return whole


@torch.no_grad()
def shard_like(tensor: Tensor, model: Tensor) -> Tensor:
    """Return a tensor that every process has, or this process's part of it where ``model`` is sharded.

    It is sharded over the same mesh along the same dimension, or along the first where that one does not divide evenly, as
    FSDP2 wants it. No process hears of another.
    """
    if not is_sharded(model):
        return tensor
    like: Any = model
    placements = [_fitting(one, tensor.shape, size) for one, size in _over(like)]
    local = tensor
    for (_, size), placement, index in zip(_over(like), placements, like.device_mesh.get_coordinate(), strict=True):
        if placement.is_shard():
            chunks = local.chunk(size, placement.dim)
            local = chunks[index] if index < len(chunks) else local.narrow(placement.dim, 0, 0)
    made = _from_local(local.contiguous().clone(), tensor, placements, like.device_mesh)
    if made.to_local().device != like.to_local().device:
        made = type(made)(made.to_local().to(like.to_local().device), made._spec, requires_grad=False)
    return made  # type: ignore[no-any-return]


def placeholder(parameter: Tensor) -> Tensor:
    """Return a plain tensor without values, on the meta device, of the same shape, dtype and layout."""
    if is_sharded(parameter):
        return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return torch.empty_like(parameter, device="meta")


def own_attributes(parameter: nn.Parameter) -> set[str]:
    """Return the names of the attributes that a user gave to a parameter.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> weight.rate = 0.1
    >>> own_attributes(weight)
    {'rate'}
    """
    return {name for name in parameter.__dict__ if not name.startswith(_OF_TORCH)}


def _over(tensor: Any) -> list[tuple[Any, int]]:
    """Return a sharded tensor's placement along each dimension of its mesh, with how many processes stand there."""
    return list(zip(tensor.placements, tensor.device_mesh.shape, strict=True))


def _fitting(placement: Any, shape: Sequence[int], size: int) -> Any:
    """Return a placement, or that along the first dimension where the one along another would be uneven."""
    if not placement.is_shard() or placement.dim == 0:
        return placement
    even = placement.dim < len(shape) and shape[placement.dim] % size == 0
    return placement if even else type(placement)(0)


def _from_local(local: Tensor, whole: Tensor, placements: Sequence[Any], mesh: Any = None) -> Any:
    kind = sys.modules["torch.distributed.tensor"].DTensor
    mesh = whole.device_mesh if mesh is None else mesh  # type: ignore[attr-defined]
    stride = torch.empty(whole.shape, device="meta").stride()
    return kind.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=stride)
