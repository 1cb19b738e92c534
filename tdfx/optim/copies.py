"""Finding copies of weights that a model keeps beside them: momentum encoders, target networks, moving averages.

Whoever updates such a copy goes through the parameters of both side by side. After a rewrite of one they no longer
correspond. A copy is recognized by its values: it has the shape of a weight, points in nearly the same direction, and is not
trained itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tdfx.layers.holders import search, share_memory
from tdfx.layers.module_state import MODULE_STATE
from tdfx.layers.paths import parameters_by_path

_LEAST_COSINE = 0.5
"""Weights that were initialized or trained independently have a cosine near 0, averages and copies one near 1."""

_SAMPLE = 4096
"""Values of a tensor that are compared at most, evenly spread."""


def untrained_copies(
    model: nn.Module,
    leaving: Mapping[str, nn.Parameter],
    optimizers: Sequence[Optimizer],
    followed: Collection[int] = (),
) -> Iterator[tuple[str, str]]:
    """Yield the copies of weights that a model holds and no optimizer trains: the path of each, and the site of its weight.

    Args:
        model: The model before the rewrite.
        leaving: Site -> the weight that leaves.
        optimizers: Those that train the model; empty if they are not known.
        followed: Tensors of copies that will follow, by identity.
    """
    by_shape = defaultdict(list)
    for site, weight in leaving.items():
        if _has_values(weight):
            by_shape[tuple(weight.shape)].append((site, weight))
    ours = {*map(id, leaving.values()), *followed}
    trained = {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}
    for path, tensor in _kept_tensors(model, trained):
        candidates = by_shape.get(tuple(tensor.shape), []) if _has_values(tensor) and id(tensor) not in ours else []
        for site, weight in candidates:
            if not share_memory(tensor, weight) and _cosine(tensor, weight) > _LEAST_COSINE:
                yield path, site
                break


def _kept_tensors(model: nn.Module, trained: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield what a model holds and no optimizer trains, with its path: parameters, buffers, tensors in attributes."""
    for path, parameter in parameters_by_path(model):
        if not parameter.requires_grad or (trained and id(parameter) not in trained):
            yield path, parameter
    yield from model.named_buffers()
    modules = set(model.modules())
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name not in MODULE_STATE:
                for held in search(value, f"{path}.{name}" if path else name):
                    if isinstance(held.value, Tensor):
                        yield held.path, held.value
                    elif isinstance(held.value, nn.Module) and held.value not in modules:
                        yield from ((f"{held.path}.{inner}", each) for inner, each in held.value.state_dict().items())


def _has_values(tensor: Tensor) -> bool:
    return (
        not isinstance(tensor, UninitializedBuffer | UninitializedParameter)
        and tensor.is_floating_point()
        and tensor.numel() > 1
        and not tensor.is_meta
        and not is_traceable_wrapper_subclass(tensor)
    )


@torch.no_grad()
def _cosine(tensor: Tensor, other: Tensor) -> float:
    first, second = (_sample(each).cpu() for each in (tensor, other))
    return float(first @ second / (first.norm() * second.norm()).clamp_min(1e-30))


def _sample(tensor: Tensor) -> Tensor:
    values = tensor.detach().reshape(-1)
    return values[:: max(1, values.numel() // _SAMPLE)].cpu().double()
