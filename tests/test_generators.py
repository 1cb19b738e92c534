"""A forward that draws from a generator of its own keeps its class: a graph would freeze the draw, or cannot hold it."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

import tdfx

OUTER = torch.Generator().manual_seed(0)
POLICY = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.generator = torch.Generator().manual_seed(1)


class Skips(Base):
    """Skips a layer at random, by its own generator."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if torch.rand((), generator=self.generator) < 0.5:
            x = self.b(x)
        return x


class SkipsByOuter(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if torch.randint(2, (1,), generator=OUTER).item():
            x = self.b(x)
        return x


class DrawsWhereTheInputIs(Base):
    def forward(self, x: Tensor) -> Tensor:
        keep = torch.empty((), device=x.device).uniform_(generator=self.generator)
        return cast("Tensor", self.b(self.a(x)) * keep)


class Masks(Base):
    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.b(self.a(x)).bernoulli(p=0.5, generator=self.generator))


@pytest.mark.parametrize("kind", [Skips, SkipsByOuter, DrawsWhereTheInputIs, Masks])
def test_draws_are_not_frozen(kind: type[Base]) -> None:
    small = tdfx.rewrite(kind(), POLICY)
    assert type(small) is kind
    assert len({float(small(torch.ones(1, 16)).detach().sum()) for _ in range(20)}) > 1
    assert "not as a graph" in tdfx.plan(kind(), POLICY).notes[0]
