"""The layer of a 1x1 factor: a convolution that is computed as a matrix product where that is faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdfx.factors.functions import pointwise_product, product_is_faster


class PointwiseConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` of one group with a 1x1 kernel, stride 1 and no padding; only how it is computed differs.

    On a CPU, and on images in channels last, a matrix product is set up faster than a convolution. Parameters, settings and
    results are those of ``nn.Conv2d``, to rounding.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.conv2d(input, weight, bias)
        else:  # noqa: RET505 - TorchScript compiles what does not stand in a branch
            compute = pointwise_product if product_is_faster(input) else F.conv2d
            return compute(input, weight, bias)
