"""The layer of Hugging Face's transformers that stores its weight transposed."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from tdfx.factors.operation import Operation
from tdfx.kinds.kind import LayerKind


class _Conv1D(LayerKind):
    """The linear map of GPT-2, whose weight is (in, out)."""

    layer = "transformers.pytorch_utils.Conv1D"

    def operation(self, layer: nn.Module) -> Operation:
        in_channels, out_channels = cast("Tensor", layer.weight).shape
        return Operation(in_channels=in_channels, out_channels=out_channels)

    def to_dense(self, weight: Tensor) -> Tensor:
        return weight.mT

    def from_dense(self, weight: Tensor) -> Tensor:
        return weight.mT


TRANSFORMERS: tuple[LayerKind, ...] = (_Conv1D(),)
"""The kinds of transformers, which is not imported for them."""
