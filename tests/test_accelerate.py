"""The loop with Accelerate in the trainers' README, and autocast and re-warm-up under Accelerate."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from readmes import ROOT, read
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tdfx
from tdfx.layers.factorized import Factorized

accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install 'tdfx[transformers]'")

README = ROOT / "tdfx" / "integrations" / "README.md"


def names(precision: str, rewarm: int = 0) -> dict[str, Any]:
    """Return the names that the README's loop uses."""
    accelerate.state.AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = TensorDataset(torch.randn(32, 3, 8, 8), torch.randint(4, (32,)))
    return {
        "torch": torch,
        "tdfx": tdfx,
        "accelerator": accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2),
        "model": model,
        "optimizer": optimizer,
        "loader": DataLoader(data, batch_size=4),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        "policy": tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0),
        "steps": [],
    }


def loop() -> str:
    """Return the README's code, changed to switch after two steps and to record the model after each."""
    block = re.search(r"<!-- accelerate -->\n```py\n(.*?)```", read(README), re.DOTALL)
    assert block is not None
    text = block.group(1).replace("AtStep(500)", "AtStep(2)")
    line = 'emit="modules")\n'
    assert text.count(line) == 1
    return text.replace(line, line + "        steps.append((model, model(x).dtype))\n")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_readmes_loop_switches_and_merges(precision: str) -> None:
    namespace = names(precision)
    exec(compile(loop(), str(README), "exec"), namespace)
    sites = [sum(isinstance(module, Factorized) for module in model.modules()) for model, _ in namespace["steps"]]
    assert sites == [0, 2, 2, 2]
    # Accelerate converts outputs to float32.
    assert {dtype for _, dtype in namespace["steps"]} == {torch.float32}
    model, optimizer = namespace["model"], namespace["optimizer"]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    # The factors began with new moments, after two of the four steps.
    steps = {name: int(optimizer.state[parameter]["step"]) for name, parameter in model.named_parameters()}
    assert steps == {"0.weight": 2, "0.bias": 4, "3.weight": 2, "3.bias": 4}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**4)


def test_the_readmes_loop_survives_a_model_that_is_kept() -> None:
    namespace = names("no")
    namespace["policy"] = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=1e9, cost=tdfx.Modelled())
    exec(compile(loop(), str(README), "exec"), namespace)
    assert [event.what for event in namespace["switch"].events] == ["kept"]
    assert list(namespace["model"].state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_the_rewritten_model_runs_under_autocast() -> None:
    namespace = names("bf16")
    exec(compile(loop(), str(README), "exec"), namespace)
    seen: list[torch.dtype] = []
    factorized = namespace["steps"][-1][0]
    factorized[0].register_forward_hook(lambda layer, x, out: seen.append(out.dtype))
    factorized(torch.randn(2, 3, 8, 8))
    assert seen == [torch.bfloat16]


def test_a_prepared_optimizer_is_rewarmed() -> None:
    namespace = names("no")
    model, optimizer = namespace["accelerator"].prepare(namespace["model"], namespace["optimizer"])
    switch = tdfx.Switch(namespace["policy"], when=tdfx.AtStep(1), rewarm=4)
    model = switch.step(model, optimizer=optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Adam's first step has the size of the rate, here scaled by a tenth, plus weight decay.
    moved = max(float((a - b.detach()).abs().max()) for a, b in zip(before, model.parameters(), strict=True))
    assert moved == pytest.approx(1e-3, rel=0.05)
