"""Short scripts as a new user writes them from the README, one for each trainer, through every outcome of a switch.

Each is killed in the middle and run again, and ends with a dense model that is saved and loaded into the user's own class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tdfx

RATIO = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, cost=tdfx.Modelled())
OUTCOMES: dict[str, dict[str, Any]] = {
    "switched": {"policy": RATIO, "total_steps": None},
    "kept": {"policy": tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=1e9, cost=tdfx.Modelled()), "total_steps": None},
    "too_late": {"policy": RATIO, "recompile_seconds": 1e9},
}
STEPS, AT, KILLED_AFTER = 8, 3, (2, 5)
outcomes = pytest.mark.parametrize("outcome", OUTCOMES)
each_kill = pytest.mark.parametrize("killed", KILLED_AFTER)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:(?!tdfx)"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Killed(Exception):  # noqa: N818 - what the test raises in the place of a signal
    """The end of a process."""


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4))


def data() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 8, 8, generator=draw), torch.randint(4, (4,), generator=draw)) for _ in range(STEPS)]


def make_switch(outcome: str) -> tdfx.Switch:
    settings = {"total_steps": STEPS, **OUTCOMES[outcome]}
    return tdfx.Switch(settings.pop("policy"), when=tdfx.AtStep(AT), collect=1, **settings)


def check(switch: tdfx.Switch, outcome: str, file: Path) -> None:
    """The switch decided as it should have, and the file loads into the user's class."""
    assert [event.what for event in switch.events] == [outcome]
    assert build().load_state_dict(torch.load(file, weights_only=True))


def plain(folder: Path, outcome: str, kill_after: int | None) -> tdfx.Switch:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    switch, first = make_switch(outcome), 0
    if (folder / "run.tdfx").exists():
        saved = tdfx.read(folder / "run.tdfx")
        model = tdfx.load(saved, model, optimizer=optimizer)
        switch.load_state_dict(saved["extra"]["switch"], optimizer=optimizer)
        first = saved["extra"]["step"]
    for step, (x, y) in enumerate(data()[first:], first):
        if step == kill_after:
            raise Killed
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        model = switch.step(model, optimizer=optimizer, example_inputs=(x,))
        extra = {"switch": switch.state_dict(), "step": step + 1}
        tdfx.save(model, folder / "run.tdfx", optimizer=optimizer, extra=extra)
    tdfx.merge_checkpoint(folder / "run.tdfx", folder / "merged.pt")
    model = tdfx.merge(model, optimizer=optimizer)
    torch.save(model.state_dict(), folder / "dense.pt")
    return switch


@outcomes
@each_kill
def test_a_plain_loop(tmp_path: Path, outcome: str, killed: int) -> None:
    with pytest.raises(Killed):
        plain(tmp_path, outcome, killed)
    switch = plain(tmp_path, outcome, None)
    check(switch, outcome, tmp_path / "dense.pt")
    check(switch, outcome, tmp_path / "merged.pt")
    whole = tmp_path / "whole"
    whole.mkdir()
    plain(whole, outcome, None)
    first, second = (torch.load(folder / "dense.pt", weights_only=True) for folder in (tmp_path, whole))
    assert all(torch.equal(first[name], second[name]) for name in second)


@outcomes
def test_accelerate(tmp_path: Path, outcome: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True)
    for killed in (5, None):
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        switch, first = make_switch(outcome), 0
        if killed is None:
            saved = tdfx.read(tmp_path / "run.tdfx")
            model = tdfx.load(saved, model, optimizer=optimizer)
            switch.load_state_dict(saved["extra"]["switch"], optimizer=optimizer)
            first = saved["extra"]["step"]
        model, optimizer = accelerator.prepare(model, optimizer)
        for step, (x, y) in enumerate(data()[first:killed], first):
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                model = switch.step(model, optimizer=optimizer, example_inputs=(x,), emit="modules")
            extra = {"switch": switch.state_dict(), "step": step + 1}
            tdfx.save(
                accelerator.unwrap_model(model), tmp_path / "run.tdfx", optimizer=optimizer.optimizer, extra=extra
            )
    model = accelerator.unwrap_model(tdfx.merge(model, optimizer=optimizer))
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    check(switch, outcome, tmp_path / "dense.pt")


@outcomes
def test_lightning(tmp_path: Path, outcome: str) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from tdfx.integrations.lightning import SwitchCallback

    class Classifier(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    x, y = (torch.cat(each) for each in zip(*data(), strict=True))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    for steps, resumed in ((5, None), (STEPS, tmp_path / "killed.ckpt")):
        module = Classifier()
        callback = SwitchCallback(when=tdfx.AtStep(AT), collect=1, merge=resumed is not None, **OUTCOMES[outcome])
        trainer = pl.Trainer(
            max_steps=steps, callbacks=[callback], default_root_dir=tmp_path, enable_checkpointing=False, **quiet
        )
        trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=4), ckpt_path=resumed)
        trainer.save_checkpoint(tmp_path / ("killed.ckpt" if resumed is None else "last.ckpt"))
    torch.save(module.net.state_dict(), tmp_path / "dense.pt")
    check(callback.switch, outcome, tmp_path / "dense.pt")
    for name in ("killed.ckpt", "last.ckpt"):
        tdfx.merge_checkpoint(tmp_path / name, tmp_path / "merged.ckpt")
        Classifier.load_from_checkpoint(tmp_path / "merged.ckpt")


@pytest.mark.parametrize("outcome", ["switched", "too_late"])
def test_transformers(tmp_path: Path, outcome: str) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from tdfx.integrations.transformers import SwitchCallback

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    rows = [{"input_ids": torch.arange(6), "labels": index % 3} for index in range(2 * STEPS)]
    for steps in (5, STEPS):
        model = transformers.BertForSequenceClassification(config)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=steps,
            save_steps=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        callback = SwitchCallback(when=tdfx.AtStep(AT), collect=1, **OUTCOMES[outcome])
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        trainer.train(resume_from_checkpoint=callback.resume(trainer, True) if steps == STEPS else None)
    assert [event.what for event in callback.switch.events] == [outcome]
    model.save_pretrained(tmp_path / "dense")
    tdfx.merge_checkpoint(tmp_path / f"checkpoint-{STEPS}", tmp_path / "merged")
    kinds = [
        transformers.BertForSequenceClassification.from_pretrained(tmp_path / name) for name in ("dense", "merged")
    ]
    first, second = (kind.state_dict() for kind in kinds)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(first["classifier.weight"], model.state_dict()["classifier.weight"])
