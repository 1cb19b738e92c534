"""Attention of torch.nn: its projections as calls of their own, and the modules whose forwards only call what they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

TRANSFORMER_BLOCKS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
"""Modules of torch.nn that call the layers inside them. Their fast path, which reads the weights instead, is not taken where
a weight is factorized or functions are watched."""


def _with_globals(function: Callable[..., Any], **changed: Any) -> Callable[..., Any]:
    """Return a function with the same code that sees other objects under some global names."""
    original = cast("FunctionType", function)
    copied = FunctionType(
        original.__code__, {**original.__globals__, **changed}, original.__name__, original.__defaults__
    )
    copied.__kwdefaults__ = original.__kwdefaults__
    return copied


_packed: Callable[..., Sequence[Tensor]] = F._in_projection_packed  # type: ignore[attr-defined]


def packed_projections(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> Sequence[Tensor]:
    """Return the projections of query, key and value that are not all the same; a function that can be overridden.

    Args:
        query, key, value: Shape (..., in).
        weight: Shape (3 in, in): the three weights, one below the other.
        bias: Shape (3 in,), or None.
    """
    given = (query, key, value, weight, bias)
    if has_torch_function(given):
        return handle_torch_function(packed_projections, given, *given)
    return _packed(*given)


def _project(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None) -> Sequence[Tensor]:
    given = (query, key, value, weight, bias)
    if query is key and key is value:
        return _packed(*given)
    if torch.compiler.is_compiling() and isinstance(weight, nn.Module):
        # A compiler cannot follow how the weight is asked for its own computation.
        project = cast("Callable[..., Sequence[Tensor]]", weight.__torch_function__)
        return project(packed_projections, (), given)
    return packed_projections(*given)


attend: Callable[..., tuple[Tensor, Tensor | None]] = _with_globals(
    F.multi_head_attention_forward, has_torch_function=lambda _: False, _in_projection_packed=_project
)
"""``F.multi_head_attention_forward`` in torch's own code, except that it never hands itself over as a whole to a
``__torch_function__``: its projections do that, as calls of ``F.linear`` or ``packed_projections``."""


def is_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Return True for a module that calls ``F.multi_head_attention_forward`` with its parameters and does no more."""
    if not isinstance(module, nn.MultiheadAttention):
        return False
    return type(module).forward is nn.MultiheadAttention.forward and "forward" not in module.__dict__


def is_transformer_block(module: nn.Module) -> bool:
    """Return True for a module with the forward of one of torch.nn's blocks, which calls the layers inside it."""
    base = next((block for block in TRANSFORMER_BLOCKS if isinstance(module, block)), None)
    return base is not None and type(module).forward is base.forward and "forward" not in module.__dict__


def projections(module: nn.MultiheadAttention) -> list[tuple[str, object]]:
    """Return the weights of an attention's projections by their names in torch: parameters, or what replaces them."""
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    owners = [*((module, name) for name in names), (module.out_proj, "weight")]
    values = ((name, owner._parameters.get(name, owner._modules.get(name))) for owner, name in owners)
    return [(name, value) for name, value in values if value is not None]
