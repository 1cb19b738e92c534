"""What changing ``requires_grad`` in the middle of training asks of the processes that train a model together."""

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


class Processes:
    """The wrappers of a model that have to hear of it when other parameters train."""

    def __init__(self, model: nn.Module) -> None:
        """Look for wrappers, on every process.

        Raises:
            ModelError: The model is no module, or in a wrapper that cannot be set up for other parameters.
        """
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"model is a {type(model).__name__}, not a torch.nn.Module. Pass the module that you train."
            )
        modules = list(model.modules())
        if any(is_instance_by_name(one, "FullyShardedDataParallel") for one in modules):
            raise ModelError(
                "The model is wrapped in FullyShardedDataParallel, which keeps the weights as slices of one flat parameter "
                "that trains as a whole. Shard it with torch.distributed.fsdp.fully_shard instead."
            )
        self._replicas = [one for one in modules if isinstance(one, DistributedDataParallel)]
        self._shards: list[Any] = [one for one in modules if is_instance_by_name(one, "FSDPModule")]
        self._ranks: list[Any] = []
        self.reshard()
        if self._replicas:
            from tdfx.distributed.ddp import Replicas  # as in tdfx.wrappers

            self._ranks = [Replicas.ranks_of(one) for one in self._replicas]
            for one, ranks in zip(self._replicas, self._ranks, strict=True):
                Replicas(one, ranks)  # raises where it cannot be set up again
        elif self._shards:
            from tdfx.distributed.ranks import Ranks

            parts = [one for one in model.parameters() if is_sharded(one)]
            self._ranks = [Ranks.of_mesh(one.device_mesh) for one in parts[:1]]  # type: ignore[attr-defined]
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                f"{type(model).__name__} is not wrapped, and {dist.get_world_size()} processes run. A wrapper that is not "
                f"known here, or put around it later, would not reduce the gradients of factors that rest when it is made. "
                f"Pass the DistributedDataParallel model itself.",
                TdfxWarning,
                stacklevel=3,
            )

    def check_same(self, value: object, what: str) -> None:
        """Raise ModelError on every process unless all pass an equal value."""
        for ranks in self._ranks:
            ranks.check_same(value, f"The processes pass different {what} to tdfx.Freeze. Pass the same ones on each.")

    def reshard(self) -> None:
        """Let sharded modules hold their shards, from which FSDP2 takes over what requires a gradient."""
        for one in self._shards:
            one.reshard()

    def change(self, requires_grad: Callable[[], bool]) -> None:
        """Do what changes ``requires_grad``, and set up anew what depends on it, if it says that something changed."""
        self.reshard()
        if requires_grad() and self._replicas:
            from tdfx.distributed.ddp import rebuild_reducer

            for one in self._replicas:
                rebuild_reducer(one)
