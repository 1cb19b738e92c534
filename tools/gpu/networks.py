"""The networks of the benchmark, as a good user runs them: channels last, bf16 autocast, a fused optimizer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from nets import build
from torch import Tensor, nn
from torch.optim import AdamW

from gpu.rows import Bench

_BATCHES = {"resnet50": 256, "vgg19_bn": 256, "vgg19": 512, "resnet18": 512, "resnet18 b8": 8, "vit_b_16": 256}
_WIDTHS = {"gpt2-small": (768, 12, 8), "blocks 1024": (1024, 8, 16), "blocks 2048": (2048, 4, 16)}
"""Transformer -> channels, blocks, and sequences of 512 tokens in a batch."""


class Block(nn.Module):
    """A transformer's block of linear layers, with causal attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, channels) to the same shape."""
        q, k, v = self.qkv(self.before(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.between(x))))
        return result


@dataclass(frozen=True, slots=True)
class Network:
    """A model in train mode on the device, with a batch."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    kind: str
    """The kind of device."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the forward runs."""
        return torch.autocast(self.kind, dtype=torch.bfloat16)


def build_network(name: str, bench: Bench) -> Network:
    """Build a network by its name, or ``tiny``."""
    torch.manual_seed(0)
    kind = torch.device(bench.device).type
    if name in _WIDTHS:
        width, blocks, batch = _WIDTHS[name]
        model: nn.Module = nn.Sequential(*(Block(width) for _ in range(blocks)))
        x = torch.randn(batch, 512, width)
    elif name == "tiny":
        layers = nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.Flatten()
        model, x = nn.Sequential(*layers, nn.Linear(4096, 10)), torch.randn(4, 3, 8, 8)
    else:
        model, side = build(name.split()[0])
        x = torch.randn(_BATCHES[name], 3, side, side)
    model, x = model.to(bench.device), x.to(bench.device)
    if x.dim() == 4:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return Network(model.train(), (x,), kind)


class Step:
    """One training step: forward under autocast, backward, fused AdamW."""

    def __init__(self, network: Network, model: nn.Module) -> None:
        self.network, self.model = network, model
        self.optimizer = AdamW(model.parameters(), lr=1e-5, fused=True)

    def __call__(self) -> None:
        """Train for one step."""
        with self.network.autocast():
            loss = self.model(*self.network.inputs).float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
