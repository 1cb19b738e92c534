"""Plans are made for the precision and the memory format of the training loop, wherever the plan itself is made."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx.cost.count import Flow
from tdfx.cost.setting import Setting, autocast_now
from tdfx.passes.analysis.loop import LoopSettings, SiteSetting, warn_of_full_precision
from tdfx.passes.planning.training_step import TrainingStep

BF16 = torch.bfloat16
LAST = torch.channels_last


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.out(self.conv(x).relu().mean((2, 3))))


def train(model: Any, policy: tdfx.Policy, *, autocast: torch.dtype | None, layout: Any, wrap: bool = False) -> None:
    """Train as a user does: the forward inside of autocast, the switch outside, with plain example inputs."""
    if wrap:
        model = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    switch = tdfx.Switch(policy, when=tdfx.AtStep(2), collect=2)
    x = torch.rand(4, 3, 8, 8)
    for _ in range(2):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = model(x.contiguous(memory_format=layout)).float().square().mean()
        loss.backward()
        optimizer.step()
        model = switch.step(model, optimizer=optimizer, example_inputs=(x,))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Setting]:
    """The settings in which sites would have been measured, by the number of input channels."""
    settings: dict[str, Setting] = {}

    def measure(self: Any, groups: Iterable[Any], *, spent: float = 0.0) -> dict[Any, float]:
        for (operation, *_), flow in (case for group in groups for case in group):
            settings.setdefault({3: "conv", 16: "out"}[operation.in_channels], flow.setting)
        return {}

    monkeypatch.setattr(tdfx.Measured, "measure", measure)
    return settings


@pytest.mark.parametrize("metric", ["loss", "weights"])
@pytest.mark.parametrize("autocast", [BF16, None])
def test_a_switch_outside_of_autocast_times_in_it(
    metric: Any, autocast: Any, timed: dict[str, Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[torch.dtype | None] = []
    forward = TrainingStep._forward

    def recorded(step: TrainingStep) -> Any:
        steps.append(autocast_now("cpu"))
        return forward(step)

    monkeypatch.setattr(TrainingStep, "_forward", recorded)
    train(Net(), tdfx.Policy(metric=metric), autocast=autocast, layout=LAST)
    assert {setting.autocast for setting in timed.values()} == {autocast}
    # Moments see each layer's input; a look at the model's call does not.
    assert timed["conv"].channels_last == (metric == "loss")
    assert set(steps) == {autocast}, "the step as a whole is timed in the same precision"


def test_a_compiled_model_is_watched_at_its_wrapper(timed: dict[str, Setting]) -> None:
    train(Net(), tdfx.Policy(metric="weights"), autocast=BF16, layout=LAST, wrap=True)
    assert timed["conv"].autocast == BF16


def test_what_the_policy_says_counts_more() -> None:
    with torch.autocast("cpu", torch.float16), LoopSettings("cpu", BF16).restored():
        assert autocast_now("cpu") == torch.float16
    with LoopSettings("cpu", BF16).restored():
        assert autocast_now("cpu") == BF16
    with LoopSettings("cpu", None).restored():
        assert autocast_now("cpu") is None


def test_weights_that_compute_in_another_dtype_are_timed_in_it() -> None:
    """As with FSDP2's MixedPrecisionPolicy: float32 shards, bfloat16 products, no autocast."""
    loop = LoopSettings("cuda", None, {"a.weight": SiteSetting(BF16, None, True)})
    flow = Flow(4, (8, 8), setting=Setting(device="cuda"))
    assert loop.apply("a.weight", flow).setting == Setting(device="cuda", dtype=BF16, channels_last=True)
    assert loop.apply("b.weight", flow) is flow
    under_autocast = LoopSettings("cuda", BF16, {"a.weight": SiteSetting(BF16, BF16, False)})
    assert under_autocast.apply("a.weight", flow) == flow


@pytest.mark.parametrize(
    "setting",
    [Setting(device="cuda", autocast=BF16), Setting(device="cuda", dtype=BF16), Setting(), Setting(device="xpu")],
)
def test_float32_on_cuda_is_warned_of(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings(action="error"):
        warn_of_full_precision([Flow(4, setting=setting)])
    full = [Flow(4, setting=Setting(device="cuda"))]
    with pytest.warns(tdfx.TdfxWarning, match=r"timed in float32 without TF32.*Measured\(autocast=torch\.bfloat16\)"):
        warn_of_full_precision(full)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    with warnings.catch_warnings(action="error"):
        warn_of_full_precision(full)
