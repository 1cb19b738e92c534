"""A realistic run: scheduler, average, switch and re-warm-up together, saved, resumed and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tdfx

SWITCH, SAVED, END = 4, 7, 14
POLICY = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
EMA: Any = get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)
    )


class Run:
    """The state of a training script."""

    def __init__(self) -> None:
        self.model = build()
        self.optimizer = AdamW(self.model.parameters(), lr=1e-3)
        self.schedule = CosineAnnealingLR(self.optimizer, 40)
        self.average = AveragedModel(self.model, multi_avg_fn=EMA, use_buffers=True)
        self.switch = tdfx.Switch(POLICY, when=tdfx.AtStep(SWITCH), rewarm=5)

    def train(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 3, 6, 6, generator=generator)
            y = torch.randint(10, (8,), generator=generator)
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.schedule.step()
            self.average.update_parameters(self.model)
            self.model = self.switch.step(
                self.model, optimizer=self.optimizer, example_inputs=(x,), averaged=self.average
            )

    def save(self, path: Path) -> None:
        extra = {
            "schedule": self.schedule.state_dict(),
            "switch": self.switch.state_dict(),
            "average": tdfx.state(self.average.module),
            "updates": self.average.n_averaged,
        }
        tdfx.save(self.model, path, optimizer=self.optimizer, extra=extra)

    @classmethod
    def resume(cls, path: Path) -> Run:
        run, saved = cls(), tdfx.read(path)
        run.model = tdfx.load(saved, run.model, optimizer=run.optimizer).train()
        run.schedule.load_state_dict(saved["extra"]["schedule"])
        run.switch.load_state_dict(saved["extra"]["switch"], optimizer=run.optimizer)
        run.average.module = tdfx.load(saved["extra"]["average"], build).train()
        run.average.n_averaged.copy_(saved["extra"]["updates"])
        return run

    def bits(self) -> list[bytes]:
        values = [*self.model.state_dict().values(), *self.average.state_dict().values()]
        states = [
            self.optimizer.state[parameter]
            for parameter in self.model.parameters()
            if parameter in self.optimizer.state
        ]
        values += [state[key] for state in states for key in sorted(state)]
        return [value.detach().numpy().tobytes() for value in values]


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    for saved in (SWITCH - 1, SWITCH, SAVED):
        straight = Run()
        straight.train(0, saved)
        straight.save(tmp_path / "run.tdfx")
        straight.train(saved, END)
        assert straight.switch.done
        resumed = Run.resume(tmp_path / "run.tdfx")
        resumed.train(saved, END)
        assert resumed.bits() == straight.bits()
        assert resumed.schedule.get_last_lr() == straight.schedule.get_last_lr()
    forgetful = Run.resume(tmp_path / "run.tdfx")
    forgetful.optimizer.state.clear()
    forgetful.train(SAVED, END)
    assert forgetful.bits() != straight.bits()


def test_model_and_average_merge_into_the_original_class() -> None:
    run = Run()
    run.train(0, END)
    assert any(isinstance(module, tdfx.Factorized) for module in run.average.module.modules())
    merged = tdfx.merge(run.model, optimizer=run.optimizer, averaged=run.average)
    for model in (merged, run.average.module):
        build().load_state_dict(model.state_dict(), strict=True)
    held = [id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]]
    assert held == [id(parameter) for parameter in merged.parameters()]
