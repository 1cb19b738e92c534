"""The inputs of each model of the zoo: small ones for its family, or those that a factory or an option gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

ATTRIBUTE = "example_inputs"
"""A factory may set this attribute of its model: a tensor, a tuple of arguments, or a mapping of named arguments."""

_SHAPES = {
    "inception": (2, 3, 299, 299),  # its auxiliary head needs a feature map of 17×17
    **dict.fromkeys(("vit_", "maxvit"), (1, 3, 224, 224)),
    **dict.fromkeys(("mvit", "s3d"), (1, 3, 16, 224, 224)),
    "swin3d": (1, 3, 4, 64, 64),
    **dict.fromkeys(("r3d", "mc3", "r2plus1d"), (2, 3, 4, 32, 32)),
    "raft": (1, 3, 128, 128),
}
"""Beginning of a model's name -> shape of its input; the first match counts."""
_SHAPE = (2, 3, 64, 64)
_SIDE = 128
"""Side of the images for detectors, in pixels; detectors that resize to 800 are changed to keep this size."""

_BOXES = 32
"""Boxes that the second stage of a detector looks at, per image and level."""


@dataclass(frozen=True, slots=True)
class ModelCall:
    """The arguments of one call of a model."""

    arguments: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> ModelCall:
        """Return the call with floating tensors in another dtype; key points stay in float32, the only one they may have."""
        cast = self._mapped(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        for targets in cast.arguments[1:]:
            for target in targets if isinstance(targets, list) else ():
                if "keypoints" in target:
                    target["keypoints"] = target["keypoints"].float()
        return cast

    def fresh(self) -> tuple[ModelCall, list[Tensor]]:
        """Return the call on copies, so that a model may write to them, and the leaves that collect gradients."""
        leaves: list[Tensor] = []

        def copied(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor.clone()
            leaves.append(tensor.detach().clone().requires_grad_())
            return leaves[-1].clone()

        return self._mapped(copied), leaves

    def example(self) -> Any:
        """Return what ``example_inputs=`` of tdfx takes."""
        return self.named or self.arguments

    def __str__(self) -> str:
        return " ".join(_describe(value) for value in [*self.arguments, *self.named.values()])

    def _mapped(self, change: Any) -> ModelCall:
        arguments, named = tree_map_only(Tensor, change, (self.arguments, self.named))
        return ModelCall(arguments, named)


@dataclass(frozen=True, slots=True)
class ModelExample:
    """The calls in both modes, and the submodules to compare."""

    train: ModelCall
    eval: ModelCall
    watched: tuple[str, ...] = ()
    """Submodules whose outputs are compared too, because a detector's final boxes say little about its layers."""

    def cast(self, dtype: torch.dtype) -> ModelExample:
        """Return the calls with floating tensors in another dtype."""
        return ModelExample(self.train.cast(dtype), self.eval.cast(dtype), self.watched)


def example_for(reference: str, model: nn.Module, given: tuple[Tensor, ...] = ()) -> ModelExample:
    """Return the inputs of a model, by the reference that it was built from; a detector is set to small images, few boxes.

    Its attribute ``example_inputs`` is removed. A model that is not torchvision's and has none gets ``given``.
    """
    source, _, name = reference.rpartition(":")
    if source == "torchvision":
        return _detection(name, model) if _is_detector(model) else _same_in_both_modes(_images(name))
    inputs = model.__dict__.pop(ATTRIBUTE, None)
    if inputs is None and not given:
        raise ValueError(
            f"{reference!r} does not say what its model is called with: pass --input 2,3,64,64, or let the factory set "
            f"model.{ATTRIBUTE} to a tensor, a tuple or a mapping."
        )
    return _same_in_both_modes(given if inputs is None else inputs)


def parse_input(text: str) -> Tensor:
    """Return a tensor for a shape: random values for floating dtypes, zeros for others.

    >>> parse_input("int64:2,3").shape, parse_input("2,3").dtype
    (torch.Size([2, 3]), torch.float32)
    """
    name, colon, shape = text.rpartition(":")
    dtype = getattr(torch, name, None) if colon else torch.float32
    sizes = shape.split(",")
    if not isinstance(dtype, torch.dtype) or not all(size.strip().isdecimal() for size in sizes):
        raise click.BadParameter(f"--input {text!r} is not a shape: write for example 2,3,64,64 or int64:2,16.")
    dims = [int(size) for size in sizes]
    return torch.randn(dims, dtype=dtype) if dtype.is_floating_point else torch.zeros(dims, dtype=dtype)


def _same_in_both_modes(inputs: Any) -> ModelExample:
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    call = ModelCall(named=dict(inputs)) if isinstance(inputs, Mapping) else ModelCall(arguments)
    return ModelExample(call, call)


def _images(name: str) -> tuple[Tensor, ...]:
    base = name.removeprefix("quantized_")
    shape = next((shape for start, shape in _SHAPES.items() if base.startswith(start)), _SHAPE)
    generator = torch.Generator().manual_seed(1)
    count = 2 if base.startswith("raft") else 1
    return tuple(torch.randn(shape, generator=generator) for _ in range(count))


def _is_detector(model: nn.Module) -> bool:
    return type(model).__module__.startswith("torchvision.models.detection")


def _detection(name: str, model: nn.Module) -> ModelExample:
    """Return two images with two objects each; the targets have masks and key points where the model needs them."""
    transform: Any = model.transform
    if transform.fixed_size is None:
        transform.min_size, transform.max_size = (_SIDE,), 2 * _SIDE
    if hasattr(model, "rpn"):
        # Tens of boxes, because each costs as much as an image.
        detector: Any = model
        detector.rpn._pre_nms_top_n = detector.rpn._post_nms_top_n = {"training": _BOXES, "testing": _BOXES}
        detector.roi_heads.fg_bg_sampler.batch_size_per_image = _BOXES
        detector.roi_heads.detections_per_img = _BOXES // 4
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, _SIDE, _SIDE, generator=generator) for _ in range(2)]
    targets = [_target(name) for _ in images]
    paths = {path for path, _ in model.named_modules()}
    watched = [path for path in ("backbone", "head", "rpn.head") if path in paths]
    watched += sorted(path for path in paths if path.startswith("roi_heads.") and path.count(".") == 1)
    layers = [path for path in watched if not path.endswith("_pool")]
    return ModelExample(ModelCall((images, targets)), ModelCall((images,)), tuple(layers))


def _target(name: str) -> dict[str, Tensor]:
    boxes = torch.tensor([[8.0, 8.0, 72.0, 64.0], [40.0, 30.0, 120.0, 110.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 1])}
    if name.startswith("maskrcnn"):
        target["masks"] = (torch.arange(_SIDE) % 3 > 0).byte().expand(2, _SIDE, _SIDE).contiguous()
    if name.startswith("keypointrcnn"):
        inside = boxes[:, None, :2] + 0.5 * (boxes[:, None, 2:] - boxes[:, None, :2])
        points = inside + torch.arange(17)[None, :, None]
        target["keypoints"] = torch.cat([points, torch.ones(2, 17, 1)], dim=2)
    return target


def _describe(value: object) -> str:
    """Return the shape of an argument in a few characters.

    >>> _describe(torch.zeros(2, 3)), _describe([torch.zeros(4)])
    ('2×3', '[4]')
    """
    if isinstance(value, Tensor):
        return "×".join(map(str, value.shape))
    if isinstance(value, list | tuple):
        return f"[{' '.join(_describe(item) for item in value)}]"
    return type(value).__name__
