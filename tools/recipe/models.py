"""The networks of the recipe, built for the images or the text of a data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torchvision
from nets import CharacterModel, DenseNetForSmallImages, ResNetForSmallImages, vgg19
from torch import nn

from recipe.errors import RecipeError
from recipe.settings import ModelSettings
from tdfx.demo.run import build_model
from tdfx.errors import nearest

SMALL = 64
"""Largest side of images for which the first layers of networks for 224×224 are changed to keep more detail."""


@dataclass(frozen=True, slots=True)
class DataShape:
    """The shape of a network's inputs and outputs."""

    classes: int
    colors: int = 3
    side: int = 0
    """Side of an image in pixels; 0 for text."""
    length: int = 0
    """Bytes of a piece of text; 0 for images."""


Builder = Callable[[ModelSettings, DataShape], nn.Module]


def _resnet(depth: int, width: int, stages: int = 3) -> Builder:
    return lambda net, data: ResNetForSmallImages(depth, data.classes, net.width or width, data.colors, stages)


BUILDERS: dict[str, Builder] = {
    "vgg": lambda net, data: build_model(net.width or 128, colors=data.colors, classes=data.classes),
    "vgg19": lambda net, data: vgg19(data.classes, data.colors, pools=min(5, int(math.log2(data.side)))),
    "resnet14-small": _resnet(14, 48),
    "resnet18-small": _resnet(18, 64, stages=4),
    "resnet56": _resnet(56, 16),
    "densenet40": lambda net, data: DenseNetForSmallImages(40, classes=data.classes, colors=data.colors),
    "transformer": lambda net, data: CharacterModel(net.width or 256, layers=net.layers or 2, length=data.length),
}
"""Name -> builder of a network that torchvision does not have; all other names are torchvision's."""

_WITH_WIDTH = {"vgg", "resnet14-small", "resnet18-small", "resnet56", "transformer"}


def build(settings: ModelSettings, shape: DataShape) -> nn.Module:
    """Return a network with random weights; RecipeError if there is no such network, or it cannot take these data."""
    name = settings.name
    if (name == "transformer") != (shape.side == 0):
        data = "pieces of text" if shape.side == 0 else "images"
        raise RecipeError(
            f"model.name={name!r} does not go with {data}: 'transformer' takes text, and all other networks take images."
        )
    if settings.width and name not in _WITH_WIDTH:
        raise RecipeError(
            f"model.width={settings.width}: {name!r} comes in one width only. Networks with several widths: "
            f"{', '.join(sorted(_WITH_WIDTH))}."
        )
    if name in BUILDERS:
        return BUILDERS[name](settings, shape)
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise RecipeError(
            f"model.name={name!r} is no network of the recipe or of torchvision. Nearest: "
            f"{nearest(name, [*BUILDERS, *names])}."
        )
    # These two warn unless they are told how to initialize their weights, and their former way takes long.
    options = {"init_weights": False, "aux_logits": False} if name in {"googlenet", "inception_v3"} else {}
    return _adapt(torchvision.models.get_model(name, weights=None, num_classes=shape.classes, **options), name, shape)


def _adapt(model: nn.Module, name: str, shape: DataShape) -> nn.Module:
    """Let a network of torchvision take other colors, and keep more detail of small images."""
    path, first = next((path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    is_small_resnet = shape.side <= SMALL and isinstance(model, torchvision.models.ResNet)
    if is_small_resnet:
        model.register_module("conv1", nn.Conv2d(shape.colors, first.out_channels, 3, padding=1, bias=False))
        model.register_module("maxpool", nn.Identity())
        return model
    if shape.side <= SMALL and isinstance(model, torchvision.models.MobileNetV2):
        # The stem, and the depthwise convolution of the first block with a stride: 32×32 end as 4×4, not as 1×1.
        block = model.get_submodule("features.2").modules()
        strided = next(layer for layer in block if isinstance(layer, nn.Conv2d) and layer.groups > 1)
        strided.stride = first.stride = (1, 1)
    if first.in_channels == shape.colors:
        return model
    if first.in_channels != 3 or first.groups != 1:
        raise RecipeError(
            f"model.name={name!r} does not begin with a convolution of 3 colors that could take {shape.colors}."
        )
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    options: dict[str, Any] = {name: getattr(first, name) for name in names}
    model.set_submodule(path, nn.Conv2d(shape.colors, first.out_channels, bias=first.bias is not None, **options))
    return model
