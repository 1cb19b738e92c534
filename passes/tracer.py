"""The torch.fx tracer that keeps every site as one call."""

from __future__ import annotations

from torch import fx, nn

from tdfx.kinds import has_stock_forward, is_candidate
from tdfx.layers import Factorized
from tdfx.structure import HOOKS, structural_copy


class SiteTracer(fx.Tracer):
    """Keeps every layer that can be a site, and every factorized one, as one call in the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Treat stock layers, subclasses of them that keep the stock forward, and factorized layers as one call."""
        if isinstance(m, Factorized):
            return True
        if is_candidate(m):
            return has_stock_forward(m)
        return bool(super().is_leaf_module(m, module_qualified_name))


def trace_once(module: nn.Module) -> tuple[fx.Graph, nn.Module]:
    """Return the graph of a module as it is, and the throwaway copy that was traced; torch.fx may leave tensors on it."""
    copy = structural_copy(module)
    for one in copy.modules():
        # A hook is the user's own code; it must not be called with a Proxy, nor once more than the user calls the model.
        for name in HOOKS:
            value = one.__dict__[name]
            one.__dict__[name] = type(value)() if hasattr(value, "clear") else value
    return SiteTracer().trace(copy), copy


def is_site_or_leaf(module: nn.Module) -> bool:
    """Return True for modules that no graph looks into: single layers, factorized layers, and torch.nn's own."""
    return SiteTracer().is_leaf_module(module, "")
