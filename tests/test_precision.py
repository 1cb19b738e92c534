"""Rewriting in mixed and low precision: autocast, gradient scaling, clipping, and weights of half precision."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import tdfx
from tdfx import Factorized

HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10))


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 4, 4, 4, generator=generator), torch.randint(10, (16,), generator=generator)


class Loop:
    """A usual training loop with autocast and a gradient scaler."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, dtype: torch.dtype, scale: float = 2.0**10) -> None:
        self.model, self.optimizer, self.dtype = model, optimizer, dtype
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype is torch.float16)

    def backward(self, seed: int) -> float:
        x, y = batch(seed)
        with torch.autocast("cpu", dtype=self.dtype):
            loss = nn.functional.cross_entropy(self.model(x), y)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def step(self, seed: int) -> float:
        loss = self.backward(seed)
        self.finish()
        return loss

    def finish(self) -> None:
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-3)


@pytest.mark.parametrize("build", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_with_autocast_scaling_and_clipping_continues(build: Any, dtype: torch.dtype) -> None:
    model = net()
    loop = Loop(model, build(model), dtype)
    before = [loop.step(seed % 3) for seed in range(12)]
    loop.model = tdfx.rewrite(model, HALF, optimizer=loop.optimizer)
    assert {parameter.dtype for parameter in loop.model.parameters()} == {torch.float32}
    after = [loop.step(seed % 3) for seed in range(24)]
    loop.model = tdfx.merge(loop.model, optimizer=loop.optimizer)
    after += [loop.step(seed % 3) for seed in range(6)]
    assert max(after[-3:]) < min(before[:3])


def test_a_switch_between_step_and_update_keeps_the_scale() -> None:
    model = net()
    loop = Loop(model, adamw(model), torch.float16)
    loop.step(0)
    loop.backward(1)
    loop.scaler.step(loop.optimizer)
    loop.model = tdfx.rewrite(model, HALF, optimizer=loop.optimizer)
    scale = loop.scaler.get_scale()
    loop.scaler.update()
    assert loop.scaler.get_scale() == scale
    loop.optimizer.zero_grad()
    loop.step(2)


def test_a_switch_between_backward_and_unscaling_carries_the_scaled_gradients() -> None:
    model = net().double()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, y = batch(0)
    scaler.scale(nn.functional.cross_entropy(model(x.double()), y)).backward()  # type: ignore[no-untyped-call]
    small = tdfx.rewrite(model, FULL, optimizer=optimizer)
    scaler.unscale_(optimizer)
    gradients = [cast("torch.Tensor", parameter.grad) for parameter in small.parameters()]
    wanted = torch.autograd.grad(nn.functional.cross_entropy(small(x.double()), y), list(small.parameters()))
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert (gradient - expected).norm() <= 1e-9 * expected.norm()


def test_a_step_that_overflowed_before_the_switch_is_skipped_after_it() -> None:
    model = net()
    loop = Loop(model, sgd(model), torch.float16)
    loop.step(0)
    loop.backward(1)
    weight = cast("nn.Parameter", model.get_submodule("0").weight)
    assert weight.grad is not None
    weight.grad.fill_(float("inf"))
    loop.model = tdfx.rewrite(model, HALF, optimizer=loop.optimizer)
    before = [parameter.detach().clone() for parameter in loop.model.parameters()]
    scale = loop.scaler.get_scale()
    loop.finish()
    assert all(torch.equal(value, other) for value, other in zip(before, loop.model.parameters(), strict=True))
    assert loop.scaler.get_scale() == scale / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [sgd, adamw])
def test_weights_in_half_precision_keep_their_dtype_and_train(build: Any, dtype: torch.dtype) -> None:
    model = net().to(dtype)
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9) if build is sgd else AdamW(model.parameters(), eps=1e-4)

    def train(current: nn.Module, steps: int) -> list[float]:
        losses = []
        for seed in range(steps):
            x, y = batch(seed % 3)
            loss = nn.functional.cross_entropy(current(x.to(dtype)).float(), y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    before = train(model, 9)
    small = tdfx.rewrite(model, HALF, optimizer=optimizer)
    layers = [module for module in small.modules() if isinstance(module, Factorized)]
    assert {weight.dtype for layer in layers for weight in layer.weights} == {dtype}
    for layer in layers:
        for weight in layer.weights:
            entries = {key: value for key, value in optimizer.state[weight].items() if key != "step"}
            assert {value.dtype for value in entries.values()} == {dtype}
            assert all(torch.isfinite(value).all() for value in entries.values())
    assert max(train(small, 24)[-3:]) < min(before[:3])
    assert {parameter.dtype for parameter in tdfx.merge(small, optimizer=optimizer).parameters()} == {dtype}
