"""Other models that hold weights of a model, such as a second head on a shared encoder, and are trained beside it."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping

from torch import nn
from torch.optim import Optimizer


def models_that_share(
    model: nn.Module, sites: Mapping[int, str], optimizers: Iterable[Optimizer]
) -> Iterator[tuple[nn.Module, str]]:
    """Yield other models that hold a site's weight and are trained by the same optimizers, each with one such site.

    They are looked for among all objects of the process, only where an optimizer trains more than the model.

    Args:
        model: The model that is rewritten.
        sites: Weight, by identity -> the name of its site.
        optimizers: The optimizers that train the model.
    """
    own = set(map(id, model.parameters()))
    trained = {id(each) for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}
    if not trained - own:
        return
    for module in [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]:
        held = set(map(id, module.parameters()))
        is_around = any(each is model for each in module.modules())
        if not is_around and (shared := held & sites.keys()) and held & (trained - own):
            yield module, sites[min(shared)]
