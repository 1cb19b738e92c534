"""The inputs of the first training step, and the DistributedDataParallel in which the module runs."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from tdfx.passes.analysis.observe import Inputs
from tdfx.wrappers.compiled import inner_module, is_wrapped


class Capture:
    """A hook that keeps the inputs of the first training step of a module, and the DistributedDataParallel around it."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: Inputs | None = None
        self.replica: Callable[[], DistributedDataParallel | None] = lambda: None
        """Returns the DistributedDataParallel in which the module ran, if there is one."""
        self._module = module
        # A compiled model must not trace into the hook.
        self._hook = cast("Any", torch.compiler).disable(self._keep)
        module.register_forward_pre_hook(self._hook, with_kwargs=True)

    def remove(self) -> None:
        """Remove the hook; a handle would not find it in a module that was replaced in place."""
        for key in [key for key, hook in self._module._forward_pre_hooks.items() if hook is self._hook]:
            del self._module._forward_pre_hooks[key]
            self._module._forward_pre_hooks_with_kwargs.pop(key, None)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Lightning replaces the forward of its module by other methods for a while, whose inputs are not the model's.
        has_own_forward = is_wrapped(module) or inspect.ismethod(module.forward)
        if module is not self._module or not module.training or not has_own_forward:
            return
        self.remove()
        active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if active is not None:
            self.replica = weakref.ref(active)
        self.inputs = _as_inputs(module, *tree_map_only(Tensor, Tensor.detach, (args, kwargs)))


def _as_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Return arguments as example inputs: positional, or all by name."""
    if not kwargs:
        return args
    bound = inspect.signature(inner_module(module).forward).bind(*args, **kwargs)
    inputs: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        kind = bound.signature.parameters[key].kind
        inputs.update(value if kind is inspect.Parameter.VAR_KEYWORD else {key: value})
    return inputs
