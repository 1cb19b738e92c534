"""The networks that the benchmarks of steps and costs take, as they would be trained: batch, layout, device, dtype."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from bench_pass import trained
from nets import build
from torch import Tensor, nn

from tdfx.passes.planning.step_time import TrainingStep, time_steps

BATCHES = {"vgg19": 32, "resnet18": 8, "resnet50": 8, "resnet56": 32, "densenet40": 32, "mobilenet_v2": 8}
"""Name -> images in a batch, of what is taken unless other names are given."""
_FALLBACK = 8
_SIDES = {"inception_v3": 299}
"""Sides of images where torchvision asks for others than 224 pixels."""
LAYOUTS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}
_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """A network, ready to be trained."""

    name: str
    model: nn.Module
    """With weights that look trained, in train mode."""
    x: Tensor
    """A batch, (n, 3, side, side)."""
    layout: str
    """In which of ``LAYOUTS`` both lie: where the dense step is faster."""
    autocast: torch.dtype | None
    """What autocast computes in, or None."""


def ready(name: str, *, batch: int | None = None, device: str = "cpu", autocast: torch.dtype | None = None) -> Net:
    """Return a network by its name in tools/nets.py or torchvision, from seed 0.

    Untrained weights have flat spectra, in which a rule that reads them finds nothing; these get spectra that decay.

    Args:
        name: Of the network.
        batch: Images in a batch; as in ``BATCHES`` if left out.
        device: Where it is to train.
        autocast: What autocast is to compute in, or None.
    """
    torch.manual_seed(0)
    model, side = build(name)
    model = trained(model).train().to(device)
    x = torch.randn(
        batch or BATCHES.get(name, _FALLBACK), 3, _SIDES.get(name, side), _SIDES.get(name, side), device=device
    )
    layout = _faster_layout(model, x, autocast)
    model, x = _in_layout(model, x, layout)
    return Net(name=name, model=model, x=x, layout=layout, autocast=autocast)


def _faster_layout(model: nn.Module, x: Tensor, autocast: torch.dtype | None) -> str:
    """Return the layout in which a dense step takes less time."""
    steps = [TrainingStep(*_in_layout(copy.deepcopy(model), x, layout), autocast) for layout in LAYOUTS]
    timings = time_steps(steps, rounds=_ROUNDS)
    times = {layout: timing.seconds for layout, timing in zip(LAYOUTS, timings, strict=True)}
    return min(times, key=times.__getitem__)


def _in_layout(model: nn.Module, x: Tensor, layout: str) -> tuple[nn.Module, Tensor]:
    """Return a model, itself changed, and a batch in a layout."""
    memory_format = LAYOUTS[layout]
    return model.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
