"""``nn.TransformerEncoder`` with factorized layers inside, whose path for nested tensors computes with dense weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tdfx.layers.copying import structural_copy
from tdfx.layers.factorized import Factorized, weight_of
from tdfx.layers.parameter import FactorizedParameter, restore_parameter


class FactorizedEncoder(nn.TransformerEncoder):
    """Computes what ``nn.TransformerEncoder`` computes; a rewrite gives this class to an encoder with factorized layers.

    In eval mode without gradients, torch's encoder packs a padded batch into a nested tensor, which only its fused kernels
    accept, and these take dense weights. The outputs at padded positions are zeros then, unlike in train mode. So that both
    stay as they are, such a call is computed by a copy of the encoder with joined weights. All others use the factors.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Run the layers in turn; the arguments are those of ``nn.TransformerEncoder``."""
        may_nest = self.__dict__["use_nested_tensor"] and src_key_padding_mask is not None and not self.training
        if may_nest and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return cast("Tensor", dense_encoder(self)(src, mask, src_key_padding_mask, is_causal))
        return super().forward(src, mask, src_key_padding_mask, is_causal)

    @property
    def use_nested_tensor(self) -> bool:
        """False: with factorized layers inside, torch's forward must not make nested tensors."""
        return False

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


def mark_encoders(model: nn.Module) -> None:
    """Give every ``nn.TransformerEncoder`` in a model the class that fits what it holds: factorized layers, or none."""
    for module in model.modules():
        if type(module) in (nn.TransformerEncoder, FactorizedEncoder):
            holds_factors = any(isinstance(part, Factorized) for part in module.modules())
            module.__class__ = FactorizedEncoder if holds_factors else nn.TransformerEncoder


@torch.no_grad()
def dense_encoder(encoder: nn.Module) -> nn.Module:
    """Return a copy of a module with the joined weights in the place of the factors, in their dtype, and all else shared."""
    layers = [layer for layer in encoder.modules() if isinstance(layer, Factorized)]
    merged: dict[nn.Module, nn.Module] = {layer: layer.merged(layer.dense_weight()) for layer in layers}
    names = {id(merged[layer]): layer for layer in layers}
    copied = structural_copy(encoder, merged)
    for owner in list(copied.modules()):
        for name, child in list(owner._modules.items()):
            layer = names.get(id(child))
            if isinstance(layer, FactorizedParameter) and child is not None:
                restore_parameter(owner, name, weight_of(child), layer.siblings)
    mark_encoders(copied)
    return copied
