"""Section correctness: what must hold in every dtype, scheme, layout and surrounding; one row that fails fails the run."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tdfx
from gpu.rows import Bench, Cases, Outcome
from tdfx.factors.registry import scheme_names

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
BOUNDS = {"float64": 1e-9, "float32": 1e-4, "tf32": 2e-2, "bfloat16": 5e-2}
"""Precision -> the largest relative difference at full rank: some hundred roundings of a chain of products."""
SCHEMES = ("auto", *(name for name in scheme_names() if name != "cp"))
"""``cp`` is iterative, and reaches no full rank exactly."""


class Net(nn.Module):
    """One layer of each kind: a convolution, one in groups, a strided one, a transposed one, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, groups=2), nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ReLU(),
        )  # fmt: skip
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to ten numbers."""
        result: Tensor = self.down(self.up(self.convs(x).mean((2, 3))).relu())
        return result


def _net(bench: Bench, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net().to(bench.device, dtype), torch.randn(4, 3, 16, 16).to(bench.device, dtype)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _scheme(scheme: str, precision: str, layout: torch.memory_format, bench: Bench) -> Outcome:
    """Rewrite at full rank, merge, and lower: the same function, the same weights, another function."""
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(precision, torch.float32)
    with _precision(precision), torch.no_grad():
        model, x = _net(bench, dtype)
        model, x = model.to(memory_format=layout), x.contiguous(memory_format=layout)
        policy = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1, scheme=scheme)
        small = tdfx.rewrite(model, policy)
        merged = tdfx.merge(small)
        weights = zip(merged.parameters(), model.parameters(), strict=True)
        values = {
            "full rank": _distance(small(x), model(x)),
            "merge": max(_distance(a, b) for a, b in weights),
            "half rank": _distance(tdfx.rewrite(model, HALF)(x), model(x)),
            "sites": len(tdfx.plan(model, policy).factorized),
        }
    bound = BOUNDS[precision]
    holds = values["full rank"] <= bound and values["merge"] <= bound and values["half rank"] > 1e-6
    return Outcome(values, holds, f"above {bound:g}, or half of the ranks change nothing")


def _train(model: nn.Module, optimizer: Any, x: Tensor, steps: int = 2, scaler: Any = None) -> float:
    loss = torch.zeros(())
    for _ in range(steps):
        with torch.autocast(x.device.type, torch.float16 if scaler else torch.bfloat16, enabled=scaler is not None):
            loss = model(x).float().square().mean()
        (scaler.scale(loss) if scaler else loss).backward()
        (scaler.step(optimizer), scaler.update()) if scaler else optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def _optimizer(name: str, settings: dict[str, Any], bench: Bench) -> Outcome:
    """Carry an optimizer's state to the factors and back, and train on: the loss falls."""
    model, x = _net(bench)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3, **settings)
    first = _train(model, optimizer, x)
    small = tdfx.rewrite(model, FULL, optimizer=optimizer)
    middle = _train(small, optimizer, x)
    last = _train(tdfx.merge(small, optimizer=optimizer), optimizer, x)
    return Outcome({"losses": [first, middle, last]}, first > middle > last, "the loss does not fall")


def _scaler(bench: Bench) -> Outcome:
    """Train under float16 autocast with a gradient scaler through a rewrite."""
    model, x = _net(bench)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler: Any = torch.amp.GradScaler(x.device.type, init_scale=256.0)
    first = _train(model, optimizer, x, scaler=scaler)
    last = _train(tdfx.rewrite(model, FULL, optimizer=optimizer), optimizer, x, scaler=scaler)
    return Outcome({"losses": [first, last]}, last < first, "the loss does not fall")


def _deterministic(bench: Bench) -> Outcome:
    """Plan and rewrite with ``use_deterministic_algorithms``: no operation raises, and two rewrites have the same bits."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=True)
    try:
        model, x = _net(bench)
        policies = (
            tdfx.Policy(rank=tdfx.Energy(share=0.9), min_gain=0),
            tdfx.Policy(parameters=0.5, cost=tdfx.Modelled()),
        )
        pairs = [[tdfx.rewrite(model, policy) for _ in range(2)] for policy in policies]
        same = all(torch.equal(a(x), b(x)) for a, b in pairs)
    finally:
        torch.use_deterministic_algorithms(before)
    return Outcome({"same bits": same}, same, "an error, or other bits")


def _degenerate(kind: str, bench: Bench) -> Outcome:
    """Rewrite weights of zeros, or identities, whose singular values are all the same."""
    side = 512
    model = nn.Sequential(nn.Linear(side, side, bias=False)).to(bench.device)
    weight = torch.zeros(side, side) if kind == "zero" else torch.eye(side)
    model.load_state_dict({"0.weight": weight})
    x = torch.randn(4, side, device=bench.device)
    with torch.no_grad():
        small = tdfx.rewrite(model, FULL)
        error = float((small(x) - model(x)).abs().max())
    return Outcome({"error": error}, error < 1e-4, "above 1e-4")


class Noisy(Net):
    """Draws from a generator on the device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.generator = torch.Generator(device).manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        """Add noise to the images."""
        return super().forward(x + torch.randn(x.shape, generator=self.generator, device=x.device))


def _generators(bench: Bench) -> Outcome:
    """A model that draws on the device draws anew after a rewrite, and a plan leaves the device's stream where it was."""
    module: Any = torch if torch.device(bench.device).type == "cpu" else torch.get_device_module(bench.device)
    model, x = Noisy(bench.device).to(bench.device), torch.randn(2, 3, 16, 16, device=bench.device)
    before = module.get_rng_state()
    small = tdfx.rewrite(model, HALF, example_inputs=(x,))
    kept = torch.equal(before, module.get_rng_state())
    with torch.no_grad():
        fresh = not torch.equal(small(x), small(x))
    return Outcome({"stream kept": kept, "fresh draws": fresh}, kept and fresh, "a frozen draw, or a moved stream")


def _saved(bench: Bench) -> Outcome:
    """Save, load, verify."""
    model, x = _net(bench)
    small = tdfx.rewrite(copy.deepcopy(model), HALF).eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.tdfx"
        tdfx.save(small, file)
        loaded = tdfx.load(file, lambda: Net().to(bench.device)).eval()
    with torch.no_grad():
        error = _distance(loaded(x), small(x))
    merged = tdfx.merge(small)
    reference = Net().to(bench.device)
    reference.load_state_dict(merged.state_dict())
    report = tdfx.verify(merged, reference, example_inputs=(x,))
    return Outcome({"loaded": error, "verified": report.ok}, error == 0.0 and report.ok, "other outputs, or no proof")


def _capture(bench: Bench) -> Outcome:
    """Replay a CUDA graph of a model that was rewritten."""
    model, x = _net(bench)
    small = tdfx.rewrite(model, HALF)
    with torch.no_grad():
        expected = small(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = small(x)
        graph.replay()
        error = _distance(out, expected)
    return Outcome({"error": error}, error < 1e-5, "above 1e-5")


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD foreach": ("SGD", {"momentum": 0.9, "foreach": True}),
    "AdamW foreach": ("AdamW", {"foreach": True}),
    "AdamW fused": ("AdamW", {"fused": True}),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
CASES: Cases = {
    **{
        f"{scheme}, {precision}, {name}": partial(_scheme, scheme, precision, layout)
        for scheme in SCHEMES
        for precision in BOUNDS
        for name, layout in LAYOUTS.items()
    },
    **{name: partial(_optimizer, *given) for name, given in OPTIMIZERS.items()},
    "GradScaler": _scaler,
    "deterministic": _deterministic,
    **{f"{kind} weights": partial(_degenerate, kind) for kind in ("zero", "identity")},
    "generators": _generators,
    "save, load, verify": _saved,
}
ON_CUDA: Cases = {
    "AdamW capturable": partial(_optimizer, "AdamW", {"capturable": True}),
    "capture after a rewrite": _capture,
}
SMALL: Cases = {
    name: CASES[name]
    for name in (
        "auto, float64, contiguous",
        "auto, bfloat16, channels last",
        "AdamW fused",
        "deterministic",
        "generators",
    )
}
