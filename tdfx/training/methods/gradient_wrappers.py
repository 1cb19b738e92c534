"""Change ``requires_grad`` in the middle of training without breaking DistributedDataParallel or FSDP2.

DDP waits for the gradients that were required when it was set up; FSDP2 takes over what requires gradients from its shards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tdfx.errors import ModelError, TdfxWarning
from tdfx.layers.placement import is_sharded
from tdfx.wrappers.unwrap import is_instance_by_name


class GradientWrappers:
    """The wrappers in or around a model that depend on which parameters require gradients; make it on every process."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"model is a {type(model).__name__}, not a torch.nn.Module. Pass the module that you train."
            )
        modules = list(model.modules())
        if any(is_instance_by_name(module, "FullyShardedDataParallel") for module in modules):
            raise ModelError(
                "The model is wrapped in FullyShardedDataParallel, which keeps the weights as slices of one flat parameter "
                "that trains as a whole. Shard it with torch.distributed.fsdp.fully_shard instead."
            )
        self._replicas = [module for module in modules if isinstance(module, DistributedDataParallel)]
        self._shards: list[Any] = [module for module in modules if is_instance_by_name(module, "FSDPModule")]
        self._ranks: list[Any] = []
        self.reshard()
        if self._replicas:
            from tdfx.distributed.ddp import check_replicas, ranks_of  # imported late, as in tdfx.wrappers

            for replica in self._replicas:
                self._ranks.append(ranks_of(replica))
                check_replicas(replica, self._ranks[-1])
        elif self._shards:
            from tdfx.distributed.ranks import Ranks

            sharded = [parameter for parameter in model.parameters() if is_sharded(parameter)]
            self._ranks = [Ranks.of_mesh(parameter.device_mesh) for parameter in sharded[:1]]  # type: ignore[attr-defined]
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                f"{type(model).__name__} is not wrapped, and {dist.get_world_size()} processes run. A wrapper that is put "
                f"around it later, or that tdfx does not know, would not reduce the gradients of factors that are frozen "
                f"now. Pass the DistributedDataParallel model itself.",
                TdfxWarning,
                stacklevel=3,
            )

    def check_same(self, value: object, what: str) -> None:
        """Raise ModelError on every process unless all pass an equal value."""
        for ranks in self._ranks:
            ranks.check_same(value, f"The processes pass different {what} to tdfx.Freeze. Pass the same ones on each.")

    def reshard(self) -> None:
        """Let sharded modules hold their shards."""
        for module in self._shards:
            module.reshard()

    def change(self, set_requires_grad: Callable[[], bool]) -> None:
        """Call a function that sets ``requires_grad``; set the wrappers up again if it returns that something changed."""
        self.reshard()
        if set_requires_grad() and self._replicas:
            from tdfx.distributed.ddp import rebuild_reducer

            for replica in self._replicas:
                rebuild_reducer(replica)
