"""The networks of the benchmarks of steps and costs, set up as for training: batch, memory layout, device, dtype."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from nets import build, with_trained_spectra
from torch import Tensor, nn

from tdfx.passes.planning.training_step import TrainingStep, time_steps

BATCHES = {"vgg19": 32, "resnet18": 8, "resnet50": 8, "resnet56": 32, "densenet40": 32, "mobilenet_v2": 8}
"""Default networks -> images in a batch."""
_OTHER_BATCH = 8
_SIDES = {"inception_v3": 299}
"""Networks of torchvision -> side of their images in pixels, where it is not 224."""
LAYOUTS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}
_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkNet:
    """A network and a batch, ready for training."""

    name: str
    model: nn.Module
    """In train mode, with weights whose spectra decay as those of trained weights do."""
    x: Tensor
    """A batch, (n, 3, side, side)."""
    layout: str
    """The memory layout of both, a key of ``LAYOUTS``: the one in which the dense step is faster."""
    autocast: torch.dtype | None
    """What autocast computes in, or None."""


def prepare_net(
    name: str, *, batch: int | None = None, device: str = "cpu", autocast: torch.dtype | None = None
) -> BenchmarkNet:
    """Build a network of tools/nets.py or torchvision with seed 0, and a batch as in ``BATCHES`` unless one is given."""
    torch.manual_seed(0)
    model, side = build(name)
    side = _SIDES.get(name, side)
    model = with_trained_spectra(model).train().to(device)
    x = torch.randn(batch or BATCHES.get(name, _OTHER_BATCH), 3, side, side, device=device)
    layout = _faster_layout(model, x, autocast)
    model, x = _to_layout(model, x, layout)
    return BenchmarkNet(name=name, model=model, x=x, layout=layout, autocast=autocast)


def _faster_layout(model: nn.Module, x: Tensor, autocast: torch.dtype | None) -> str:
    steps = [TrainingStep(*_to_layout(copy.deepcopy(model), x, layout), autocast) for layout in LAYOUTS]
    timings = time_steps(steps, rounds=_ROUNDS)
    seconds = {layout: timing.seconds for layout, timing in zip(LAYOUTS, timings, strict=True)}
    return min(seconds, key=seconds.__getitem__)


def _to_layout(model: nn.Module, x: Tensor, layout: str) -> tuple[nn.Module, Tensor]:
    """Change the layout of a model in place, and return it with a batch in that layout."""
    memory_format = LAYOUTS[layout]
    return model.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
