"""The names of a model's parameters as paths of modules and attributes, whatever the model's class makes of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def parameters_by_path(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a model with their paths, in the order of ``nn.Module.named_parameters``.

    A class may override that method: torch's ``CheckpointWrapper`` leaves its own part of each name out, and then no module
    has that path.
    """
    return nn.Module.named_parameters(model, remove_duplicate=remove_duplicate)
