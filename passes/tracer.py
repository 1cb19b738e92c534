"""The torch.fx tracer that keeps every site as one call."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.parameter import UninitializedBuffer

from tdfx.kinds import has_stock_forward, is_candidate
from tdfx.layers import Factorized
from tdfx.structure import HOOKS, structural_copy


class SiteTracer(fx.Tracer):
    """Keeps every layer that can be a site, and every factorized one, as one call in the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Treat stock layers, subclasses of them that keep the stock forward, and factorized layers as one call."""
        if isinstance(m, Factorized):
            return True
        if type(m).forward is nn.Module.forward and "forward" not in m.__dict__:
            # A list or a dictionary of modules computes nothing itself; what it holds is called by others.
            return False
        if is_candidate(m):
            return has_stock_forward(m)
        return bool(super().is_leaf_module(m, module_qualified_name))


def throwaway(module: nn.Module, mode: bool) -> nn.Module:
    """Return a structural copy to run or trace: in the given mode, with buffers of its own.

    The mode is set on each module by itself, since a user's own ``train`` may change the tensors that the copy shares.
    """
    copy = structural_copy(module)
    buffers: dict[int, torch.Tensor] = {}
    for one in copy.modules():
        one.training = mode
        for name, buffer in one._buffers.items():
            if buffer is not None and not isinstance(buffer, UninitializedBuffer):
                one._buffers[name] = buffers.setdefault(id(buffer), buffer.clone())
    return copy


def without_hooks(module: nn.Module) -> nn.Module:
    """Take all hooks off a throwaway copy: they are a user's own code, and must not be called with a Proxy."""
    for one in module.modules():
        for name in HOOKS:
            value = one.__dict__[name]
            one.__dict__[name] = type(value)() if hasattr(value, "clear") else value
    return module


def is_site_or_leaf(module: nn.Module) -> bool:
    """Return True for modules that no graph looks into: single layers, factorized layers, and torch.nn's own."""
    return SiteTracer().is_leaf_module(module, "")
