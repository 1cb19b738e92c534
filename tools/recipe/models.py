"""The networks that the recipe trains, made for the images or the text at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torchvision
from nets import CharacterModel, DenseNetForSmallImages, ResNetForSmallImages, vgg19
from torch import nn

from recipe.errors import RecipeError
from recipe.settings import Model
from tdfx.demo.run import build_model
from tdfx.errors import nearest

SMALL = 64
"""Images up to this side lose too much in the first layers of networks for 224×224, which are made finer for them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a network is to take and to give."""

    classes: int
    colors: int = 3
    """Channels of an image."""
    side: int = 0
    """Pixels of a side of an image; 0 for text."""
    length: int = 0
    """Bytes of a piece of text; 0 for images."""


def _vgg(wish: Model, shape: Shape) -> nn.Module:
    return build_model(wish.width or 128, colors=shape.colors, classes=shape.classes)


def _vgg19(wish: Model, shape: Shape) -> nn.Module:
    return vgg19(shape.classes, colors=shape.colors, pools=min(5, int(math.log2(shape.side))))


def _resnet(depth: int, width: int, stages: int = 3) -> Callable[[Model, Shape], nn.Module]:
    def build(wish: Model, shape: Shape) -> nn.Module:
        return ResNetForSmallImages(depth, shape.classes, wish.width or width, shape.colors, stages)

    return build


def _densenet40(wish: Model, shape: Shape) -> nn.Module:
    return DenseNetForSmallImages(40, classes=shape.classes, colors=shape.colors)


def _transformer(wish: Model, shape: Shape) -> nn.Module:
    return CharacterModel(wish.width or 256, layers=wish.layers or 2, length=shape.length)


OWN: dict[str, Callable[[Model, Shape], nn.Module]] = {
    "vgg": _vgg,
    "vgg19": _vgg19,
    "resnet14-small": _resnet(14, 48),
    "resnet18-small": _resnet(18, 64, stages=4),
    "resnet56": _resnet(56, 16),
    "densenet40": _densenet40,
    "transformer": _transformer,
}
"""Name -> builder of a network that torchvision does not have; all others are torchvision's."""

_IN_WIDTHS = {"vgg", "resnet14-small", "resnet18-small", "resnet56", "transformer"}


def build(wish: Model, shape: Shape) -> nn.Module:
    """Return an untrained network, drawn from torch's random numbers.

    Raises:
        RecipeError: There is no such network, or it does not go with the data.
    """
    if (wish.name == "transformer") != (shape.side == 0):
        what = "pieces of text" if shape.side == 0 else "images"
        raise RecipeError(f"model.name={wish.name!r} does not go with {what}: 'transformer' is for text, all else not.")
    if wish.width and wish.name not in _IN_WIDTHS:
        raise RecipeError(
            f"model.width={wish.width}: {wish.name!r} comes in one width only. Those that do not: "
            f"{', '.join(sorted(_IN_WIDTHS))}."
        )
    if wish.name in OWN:
        return OWN[wish.name](wish, shape)
    known = torchvision.models.list_models(module=torchvision.models)
    if wish.name not in known:
        raise RecipeError(
            f"model.name={wish.name!r} is no network of the recipe or of torchvision. Nearest: "
            f"{nearest(wish.name, [*OWN, *known])}."
        )
    # These two warn unless they are told how to draw their weights, and take long for it in the old way.
    options = {"init_weights": False, "aux_logits": False} if wish.name in {"googlenet", "inception_v3"} else {}
    model: nn.Module = torchvision.models.get_model(wish.name, weights=None, num_classes=shape.classes, **options)
    return _fitted(model, wish.name, shape)


def _fitted(model: nn.Module, name: str, shape: Shape) -> nn.Module:
    """Let a network of torchvision take images of other colors, and lose less of small ones."""
    residual = isinstance(model, torchvision.models.ResNet)
    mobile = isinstance(model, torchvision.models.MobileNetV2)
    if shape.side <= SMALL and residual:
        stem = nn.Conv2d(shape.colors, _first_convolution(model).out_channels, 3, padding=1, bias=False)
        model.register_module("conv1", stem)
        model.register_module("maxpool", nn.Identity())
        return model
    if shape.side <= SMALL and mobile:
        # The stem, and the depthwise convolution of the first block that halves: 32×32 end as 4×4, not as 1×1.
        block = model.get_submodule("features.2").modules()
        halving = next(one for one in block if isinstance(one, nn.Conv2d) and one.groups > 1)
        halving.stride = _first_convolution(model).stride = (1, 1)
    first = _first_convolution(model)
    if first.in_channels == shape.colors:
        return model
    if first.in_channels != 3 or first.groups != 1:
        raise RecipeError(f"model.name={name!r} begins with no convolution of 3 colors that could take {shape.colors}.")
    owner, _, place = next(path for path, one in model.named_modules() if one is first).rpartition(".")
    options = {key: getattr(first, key) for key in ("stride", "padding", "dilation", "padding_mode")}
    made = nn.Conv2d(shape.colors, first.out_channels, first.kernel_size, bias=first.bias is not None, **options)  # type: ignore[arg-type]
    model.get_submodule(owner).register_module(place, made)
    return model


def _first_convolution(model: nn.Module) -> nn.Conv2d:
    return next(one for one in model.modules() if isinstance(one, nn.Conv2d))
