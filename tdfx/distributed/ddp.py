"""Models wrapped in DistributedDataParallel: out of the wrapper, and wrapped again with the same settings."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tdfx.distributed.ranks import Ranks
from tdfx.errors import ModelError, TdfxWarning
from tdfx.structure import HOOKS

_SETTINGS = (
    "device_ids",
    "output_device",
    "dim",
    "process_group",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "mixed_precision",
    "skip_all_reduce_unused_params",
    "batched_grad_copy",
    "lazy_bucket_allocation",
)
"""What the constructor takes and the wrapper keeps under the same name."""

_MEBI = 2**20


def ranks_of(wrapper: DistributedDataParallel) -> Ranks:
    """Return the processes that train the model, once they were found to hold the same one.

    Raises:
        ModelError: They do not, or the wrapper delays the reduction of single parameters.
    """
    if wrapper._delay_all_reduce_params:
        raise ModelError(
            "The DistributedDataParallel was made with delay_all_reduce_named_params, which names parameters that may be "
            "replaced. Pass model.module, and wrap what comes back again."
        )
    ranks = Ranks([wrapper.process_group], wrapper.device)
    held = [(name, tuple(one.shape), str(one.dtype)) for name, one in wrapper.module.named_parameters()]
    ranks.check_same(
        (type(wrapper.module).__name__, wrapper.training, held),
        "The processes of the DistributedDataParallel hold models of different structure or mode, so that they could not go "
        "through a rewrite together. Bring them to the same place in training before.",
    )
    return ranks


def wrap_like(wrapper: DistributedDataParallel, model: nn.Module) -> DistributedDataParallel:
    """Wrap a model as another was wrapped; its parameters are the same on every process already.

    The former wrapper stays as it was, and stays silent as long as it is not called.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    settings: dict[str, Any] = {
        name: getattr(wrapper, name) for name in _SETTINGS if name in known and hasattr(wrapper, name)
    }
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    settings[buffers] = getattr(wrapper, buffers)
    if not getattr(wrapper, "bucket_bytes_cap_default", True):
        settings["bucket_cap_mb"] = wrapper.bucket_bytes_cap / _MEBI
    if caps := getattr(wrapper, "bucket_bytes_cap_list", None):
        settings["bucket_cap_mb_list"] = [cap / _MEBI for cap in caps]
    made = DistributedDataParallel(model, **settings, init_sync=False)
    for hook, state in wrapper._comm_hooks[len(made._comm_hooks) :]:
        if state is not None and not isinstance(state, dist.ProcessGroup):
            warnings.warn(
                f"The communication hook {getattr(hook, '__name__', hook)} goes on with its state of before, and gradients "
                f"now have other shapes. If the state holds tensors for them, as PowerSGD's does, make it anew and wrap "
                f"model.module yourself.",
                TdfxWarning,
                stacklevel=4,
            )
        made.register_comm_hook(state, hook)
    for name in HOOKS:
        value = wrapper.__dict__[name]
        made.__dict__[name] = value.copy() if hasattr(value, "copy") else value
    made.require_backward_grad_sync = wrapper.require_backward_grad_sync
    made.training = wrapper.training
    return made
