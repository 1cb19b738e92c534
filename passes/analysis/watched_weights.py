"""The modules of a model in training, out of their wrappers, and the weights in them whose calls can be reported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from tdfx.factors.operation import Operation
from tdfx.kinds.registry import find_kind, kind_of
from tdfx.layers.factorized import Factorized
from tdfx.layers.parameter import FactorizedParameter


class WeightOwner(NamedTuple):
    """A module that holds a weight."""

    module: nn.Module
    name: str
    path: str
    by_function: bool
    """True if only a call of a function can make a site of the weight."""

    @property
    def weight(self) -> object:
        """The weight that the module holds now."""
        return self.module._parameters.get(self.name, self.module._modules.get(self.name))


def modules_by_path(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module once, by its first path without the names of wrappers; the inside of a Factorized is left out."""
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if not isinstance(module, Factorized):
            inner = wrapped(module)
            children = [(name, child) for name, child in module._modules.items() if child is not None]
            waiting += [(path if child is inner else join(path, name), child) for name, child in reversed(children)]


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a model, and what is inside of it as long as it is a wrapper."""
    module: nn.Module | None = model
    while module is not None:
        yield module
        module = wrapped(module)


def wrapped(module: nn.Module) -> nn.Module | None:
    """Return what ``torch.compile`` or DistributedDataParallel has wrapped, or None if the module is no wrapper."""
    return module._modules.get("module" if isinstance(module, DistributedDataParallel) else "_orig_mod")


def layer_weight(path: str, module: nn.Module) -> str:
    """Return the path of a layer's dense weight; "" for a module that does not compute what a kind of layer computes."""
    if isinstance(module, Factorized):
        return path if isinstance(module, FactorizedParameter) else join(path, module.kind.weight)
    kind = find_kind(module)
    if kind is None or not kind.is_intact(module) or module._parameters.get(kind.weight) is None:
        return ""
    return join(path, kind.weight)


def operation_of_layer(layer: nn.Module) -> Operation | None:
    """Return what a layer computes; None for a lazy layer that has no shape yet."""
    if isinstance(layer, Factorized):
        return layer.operation
    kind = kind_of(layer)
    is_lazy = isinstance(layer._parameters.get(kind.weight), UninitializedParameter)
    return None if is_lazy else kind.operation(layer)


def is_matrix(value: object) -> bool:
    """Return True for a parameter that may be the weight of a product."""
    return isinstance(value, nn.Parameter) and (isinstance(value, UninitializedParameter) or value.dim() > 1)


def join(path: str, name: str) -> str:
    """Return the path of what a module at a path holds under a name."""
    return f"{path}.{name}" if path else name
