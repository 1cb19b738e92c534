"""How many variants of one piece of code ``torch.compile`` keeps: enough for blocks that differ after a rewrite.

Blocks of one class that are compiled one by one share one compilation while they are alike. After a rewrite their ranks
differ, and each variant is compiled by itself. Beyond ``torch._dynamo.config.recompile_limit``, 8 by default, the others
would run eagerly, with no more than a line in the log.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterable

import torch
from torch import nn

from tdfx.errors import TdfxWarning


def count_variants(parts: Iterable[nn.Module]) -> int:
    """Return how many variants of one ``forward`` there are among modules, for the one that has most.

    >>> count_variants([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8), nn.ReLU()])
    2
    """
    variants: defaultdict[object, set[Hashable]] = defaultdict(set)
    for part in parts:
        variants[getattr(type(part).forward, "__code__", type(part))].add(_signature(part))
    return max(map(len, variants.values()), default=0)


def allow_variants(parts: Iterable[nn.Module]) -> None:
    """Raise the limit of this process, if it is too low for these modules beside the variants that are compiled already."""
    config = torch._dynamo.config
    variants, limit = count_variants(parts), config.recompile_limit
    if variants <= limit // 2:
        return
    needed = limit + variants
    if needed > config.accumulated_recompile_limit:
        warnings.warn(
            f"{variants} parts of the model that are compiled one by one share their code and differ in their ranks, and "
            f"torch.compile keeps at most {config.accumulated_recompile_limit} variants, so the last ones would run "
            f"eagerly. Raise torch._dynamo.config.accumulated_recompile_limit, or give such parts equal ranks: "
            f"Policy(rank=Ratio(...)).",
            TdfxWarning,
            stacklevel=2,
        )
    config.recompile_limit = max(limit, min(needed, config.accumulated_recompile_limit))


def _signature(part: nn.Module) -> Hashable:
    """Return what compiled code depends on: the classes of the modules, and the shapes and dtypes of their tensors."""
    kinds = tuple((path, type(module), module.training) for path, module in part.named_modules())
    named = (*part.named_parameters(), *part.named_buffers())
    return kinds, tuple((name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for name, tensor in named)
