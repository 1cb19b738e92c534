"""The networks that the benchmarks and the training recipe build: the paper's, smaller ones, and torchvision's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


def vgg19(classes: int = 10, colors: int = 3, pools: int = 5) -> nn.Module:
    """Return VGG-19 with batch norm for small images: one linear layer at its end (Simonyan and Zisserman 2015).

    ``pools`` of its five poolings are kept: at most log2 of the side of the images.
    """
    model: nn.Module = torchvision.models.vgg19_bn(num_classes=classes)
    features = model.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    if colors != 3:
        features[0] = nn.Conv2d(colors, 64, 3, padding=1)
    poolings = [index for index, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
    for index in poolings[pools:]:
        features[index] = nn.AdaptiveMaxPool2d(1) if index == poolings[-1] else nn.Identity()
    model.avgpool = nn.Identity()
    model.classifier = nn.Linear(512, classes)
    return model


def plain_vgg19(classes: int = 10) -> nn.Module:
    """Return VGG-19 without batch norm for 32×32 images, with one linear layer at its end."""
    features = torchvision.models.vgg19(weights=None).features
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


class ResNetForSmallImages(nn.Module):
    """The residual networks of 6n + 2 layers for 32×32 images (He et al. 2016, section 4.2); shortcuts have no weights.

    With four ``stages`` and a depth of 18 it has the blocks of ResNet-18.
    """

    def __init__(self, depth: int = 56, classes: int = 10, width: int = 16, colors: int = 3, stages: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // (2 * stages)
        self.stem = nn.Sequential(nn.Conv2d(colors, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [2**stage * width for stage in range(stages) for _ in range(blocks)]
        self.blocks = nn.Sequential(*(_Block(a, b) for a, b in zip([width, *widths], widths, strict=False)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for images (n, colors, h, w)."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.grows = channels_out != channels_in
        stride = 2 if self.grows else 1
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.grows:
            missing = out.shape[1] - x.shape[1]
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing // 2, missing - missing // 2))
        return F.relu(out + x)


class DenseNetForSmallImages(nn.Module):
    """DenseNet-40 with growth rate 12 for 32×32 images, without bottlenecks (Huang et al. 2017)."""

    def __init__(self, depth: int = 40, growth: int = 12, classes: int = 10, colors: int = 3) -> None:
        super().__init__()
        channels, layers = 16, (depth - 4) // 3
        parts: list[nn.Module] = [nn.Conv2d(colors, channels, 3, padding=1, bias=False)]
        for stage in range(3):
            for _ in range(layers):
                parts.append(_Dense(channels, growth))
                channels += growth
            if stage < 2:
                mixing = nn.Conv2d(channels, channels, 1, bias=False)
                parts += [nn.BatchNorm2d(channels), nn.ReLU(), mixing, nn.AvgPool2d(2)]
        self.body = nn.Sequential(*parts, nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for images (n, colors, h, w)."""
        return self.head(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]


class _Dense(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class CharacterModel(nn.Module):
    """A small GPT that predicts the next byte; its linear layers are separate modules, with a layer norm before each."""

    def __init__(self, width: int = 256, layers: int = 2, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)
        self.register_buffer("order", torch.arange(length), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, length, 256) for bytes (n, length)."""
        return self.head(self.norm(self.blocks(self.bytes(x) + self.places(self.order))))  # type: ignore[no-any-return]


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.read = nn.Linear(width, 3 * width)
        self.write = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (n, length, 3, heads, each) -> three of (n, heads, length, each)
        q, k, v = self.read(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.write(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vgg19": (vgg19, 32),
    "cifar-vgg19": (plain_vgg19, 32),
    "resnet56": (lambda: ResNetForSmallImages(56), 32),
    "densenet40": (lambda: DenseNetForSmallImages(40), 32),
}
"""Name -> builder of a network that torchvision does not have, and the side of its images in pixels."""


def build(name: str, classes: int = 1000) -> tuple[nn.Module, int]:
    """Return an untrained network of ``NETS``, with 10 classes, or of torchvision, and the side of its images in pixels."""
    if name in NETS:
        builder, side = NETS[name]
        return builder(), side
    # These two warn unless they are told how to initialize their weights, and their former way takes long.
    options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
    return model, 224


def with_trained_spectra(model: nn.Module) -> nn.Module:
    """Give every weight a decaying spectrum above its noise, as training does: random weights have flat spectra."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            w_oi = layer.weight.detach().flatten(1)
            rank = max(1, min(w_oi.shape) // 4)
            strength = torch.linspace(1.0, 0.1, rank)
            signal = (torch.randn(w_oi.shape[0], rank) * strength) @ torch.randn(rank, w_oi.shape[1]) / rank**0.5
            noisy = signal + 0.1 * torch.randn_like(w_oi)
            layer.weight.data = noisy.reshape(layer.weight.shape) * w_oi.std()
    return model
