"""Batch norms' running statistics after a rewrite: estimated again, because the model computes other activations."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdfx.errors import TdfxWarning
from tdfx.passes.analysis.guard import GatherShards
from tdfx.passes.analysis.sandbox import isolated, remove_hooks, scratch_copy
from tdfx.passes.program import Program

Batches = Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
"""Positional and keyword arguments of calls of the model in training."""


@torch.no_grad()
def renew_statistics(program: Program, batches: Batches) -> None:
    """Set the running statistics of a rewritten model to their mean over some batches, if it tracks any.

    The statistics become new tensors, so that the model of before, which shares all others, keeps its own. Norms in eval
    mode keep theirs. Where the model cannot be run again on its batches, a warning says so and nothing is changed.
    """
    module = program.module
    # As many on every process, because a norm may communicate; where batches were left out, their numbers differ.
    count = min(program.processes.gather_objects(len(batches)))
    batches = batches[len(batches) - count :]
    if not batches or not any(_tracks(norm) for norm in module.modules()):
        return
    scratch = scratch_copy(module, training=True)
    remove_hooks(scratch)
    pairs = []
    for copied, original in zip(scratch.modules(), module.modules(), strict=True):
        copied.training = original.training
        if _tracks(original) and isinstance(copied, _BatchNorm):
            copied.reset_running_stats()
            copied.momentum = None  # the mean of all batches
            pairs.append((copied, original))
    gather = program.processes if program.shards else None
    try:
        with nullcontext() if gather is None else GatherShards(gather), isolated(scratch):
            for arguments, named in batches:
                scratch(*arguments, **named)
    except Exception as error:  # whatever the model raises
        text = f"The model could not be run again on its last batches: {type(error).__name__}: {error}."
        advice = "The running statistics of its batch norms stay as they were, and follow in the next training steps."
        warnings.warn(f"{text} {advice}", TdfxWarning, stacklevel=2)
        return
    for copied, original in pairs:
        renewed = copied if copied.num_batches_tracked else scratch_copy(original, training=True)
        for name in ("running_mean", "running_var"):
            original._buffers[name] = renewed._buffers[name]
    program.processes.broadcast_tensors(
        buffer
        for _, norm in pairs
        for name in ("running_mean", "running_var")
        if (buffer := norm._buffers[name]) is not None
    )


def _tracks(module: nn.Module) -> bool:
    """Return True for a batch norm that updates running statistics."""
    return isinstance(module, _BatchNorm) and module.training and module.track_running_stats
