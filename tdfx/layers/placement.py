"""Tensors that several processes hold in shards, as FSDP2 keeps parameters: reading all values, and sharding alike."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tdfx.devices import precise

_TORCH_PREFIXES = ("_is_param", "_is_hf_initialized", "_ddp_", "_dynamo_", "_fsdp_")
"""How the names of the attributes begin that torch and Transformers themselves give to parameters."""


def is_sharded(tensor: object) -> bool:
    """Return True for a DTensor, which the processes of a device mesh hold together.

    >>> is_sharded(torch.ones(2))
    False
    """
    # Importing the class takes longer than importing tdfx. Where nobody has imported it, no such tensor exists.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def full(tensor: Tensor) -> Tensor:
    """Return a detached tensor with all values of a sharded tensor; a plain tensor is only detached.

    All processes of a sharded tensor's mesh must call this at the same time.
    """
    if not is_sharded(tensor):
        return tensor.detach()
    sharded: Any = tensor.detach()
    device = sharded.device_mesh.device_type
    if sharded.device.type not in {device, "meta"}:  # offloaded: only the mesh's own device can communicate
        sharded = _from_local(sharded.to_local().to(device), sharded.shape, sharded.placements, sharded.device_mesh)
    return cast("Tensor", sharded.full_tensor())


def full_precise(tensor: Tensor) -> Tensor:
    """Return all values of a tensor as ``full`` does, in float64, and on the CPU where the device has no float64."""
    return precise(full(tensor))


@torch.no_grad()
def shard_like(tensor: Tensor, template: Tensor) -> Tensor:
    """Return this process's shard of a tensor that every process has; the tensor itself if the template is not sharded.

    The shard lies on the template's mesh and is cut along the same dimension, or along the first where that one does not
    divide evenly, because FSDP2 requires it. The processes do not communicate.
    """
    if not is_sharded(template):
        return tensor
    sharded: Any = template
    mesh = sharded.device_mesh
    local, placements = tensor, []
    for placement, size, index in zip(sharded.placements, mesh.shape, mesh.get_coordinate(), strict=True):
        if placement.is_shard():
            dim = placement.dim
            if dim > 0 and (dim >= tensor.dim() or tensor.shape[dim] % size):
                placement = type(placement)(dim := 0)
            chunks = local.chunk(size, dim)
            local = chunks[index] if index < len(chunks) else local.narrow(dim, 0, 0)
        placements.append(placement)
    shard = _from_local(local.contiguous().clone(), tensor.shape, placements, mesh)
    device = sharded.to_local().device
    if shard.to_local().device != device:
        shard = type(shard)(shard.to_local().to(device), shard._spec, requires_grad=False)
    return shard  # type: ignore[no-any-return]


def placeholder(parameter: Tensor) -> Tensor:
    """Return a plain tensor on the meta device of the same shape, dtype and layout."""
    if is_sharded(parameter):
        return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return torch.empty_like(parameter, device="meta")


def user_attributes(parameter: nn.Parameter) -> set[str]:
    """Return the names of the attributes that a user gave to a parameter.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> weight.rate = 0.1
    >>> user_attributes(weight)
    {'rate'}
    """
    return {name for name in parameter.__dict__ if not name.startswith(_TORCH_PREFIXES)}


def _from_local(local: Tensor, shape: torch.Size, placements: Sequence[Any], mesh: Any) -> Any:
    """Return a DTensor of a given whole shape from this process's part of it."""
    dtensor = sys.modules["torch.distributed.tensor"].DTensor
    stride = torch.empty(shape, device="meta").stride()
    return dtensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
