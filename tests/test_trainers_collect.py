"""The callbacks choose an early step by themselves, and collect moments before it, in both trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tdfx

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed: pip install 'tdfx[lightning]'")
pytest.importorskip("transformers", reason="Transformers is not installed: pip install 'tdfx[transformers]'")
pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install 'tdfx[transformers]'")

import test_lightning as lit  # noqa: E402
import test_transformers as hf  # noqa: E402

from tdfx.integrations import lightning as for_lightning  # noqa: E402
from tdfx.integrations import transformers as for_transformers  # noqa: E402

EARLY = 10
"""The step that is chosen of twelve."""
KEEP = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=1e9)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Hooks(pl.Callback):  # type: ignore[misc, name-defined]
    """Counts the hooks of the first layer after each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.counts.append(len(pl_module.model[0]._forward_hooks))


def fit(
    folder: Path, policy: Any = lit.POLICY, *, epochs: int = 3, ckpt: Any = None, others: Any = (), **settings: Any
) -> Any:
    """Train as ``test_lightning.fitted`` does, without a word about when to switch."""
    trainer_settings = {key: settings.pop(key) for key in ("accumulate_grad_batches",) if key in settings}
    callback = for_lightning.SwitchCallback(policy, **{"merge": False, "total_steps": None, **settings})
    torch.manual_seed(0)
    module = lit.Classifier()
    trainer = lit.make_trainer(folder, [callback, *others], epochs=epochs, **trainer_settings)
    trainer.fit(module, lit.loader(), ckpt_path=ckpt)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module, callback


def train(folder: Path, policy: Any = lit.POLICY, *, resume: Any = None, seed: int = 0, **settings: Any) -> Any:
    callback = for_transformers.SwitchCallback(policy, **{"merge": False, "total_steps": None, **settings})
    torch.manual_seed(seed)
    model = hf.bert()
    trainer = hf.make_trainer(folder, model, callback)
    trainer.train(resume_from_checkpoint=None if resume is None else callback.resume(trainer, resume))
    return model, callback


def metrics(callback: Any) -> set[str]:
    return {site.metric for site in callback.plan.factorized}


def test_lightning_switches_early_in_the_metric_of_the_loss(tmp_path: Path) -> None:
    hooks = Hooks()
    _, callback = fit(tmp_path, others=[hooks])
    assert [(event.step, event.what) for event in callback.switch.events] == [(EARLY, "switched")]
    assert metrics(callback) == {"loss"}
    # The first step is 2, because moments of 8 steps are collected before step 10.
    assert [count > 0 for count in hooks.counts] == [2 <= step < EARLY for step in range(1, 13)]


def test_transformers_switches_early_in_the_metric_of_the_loss(tmp_path: Path) -> None:
    model, callback = train(tmp_path)
    assert [(event.step, event.what) for event in callback.switch.events] == [(EARLY, "switched")]
    assert metrics(callback) == {"loss"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_collected_is_passed_on(tmp_path: Path) -> None:
    for run in (fit, train):
        _, callback = run(tmp_path, collect=0, policy=tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
        assert metrics(callback) == {"weights"}


@pytest.mark.parametrize("run", [fit, train])
def test_collecting_does_not_change_the_training(tmp_path: Path, run: Any) -> None:
    with_moments, callback = run(tmp_path / "a", KEEP)
    without, _ = run(tmp_path / "b", KEEP, collect=0)
    assert [event.what for event in callback.switch.events] == ["kept"]
    assert lit.same(with_moments, without)


def test_a_lightning_run_killed_while_it_collects_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "whole")
    fit(tmp_path / "part", epochs=2)
    saved = torch.load(tmp_path / "part" / "2.ckpt", weights_only=False)
    (state,) = (value for key, value in saved["callbacks"].items() if "SwitchCallback" in key)
    assert state["switch"]["moments"]["units"] == 6
    # A run of two epochs chose step 10 too.
    resumed, callback = fit(tmp_path / "again", ckpt=tmp_path / "part" / "2.ckpt")
    assert metrics(callback) == {"loss"}
    assert lit.same(whole, resumed)
    state["switch"]["moments"] = None
    torch.save(saved, tmp_path / "without.ckpt")
    other, _ = fit(tmp_path / "other", ckpt=tmp_path / "without.ckpt")
    assert not lit.same(whole, other)


def test_a_transformers_run_killed_while_it_collects_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    resumed, callback = train(tmp_path / "again", resume=tmp_path / "whole" / "checkpoint-8", seed=1)
    assert metrics(callback) == {"loss"}
    assert lit.same(whole, resumed)


def test_each_accumulated_batch_is_collected(tmp_path: Path) -> None:
    seen: list[int] = []

    class Units(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            state = callback.switch.state_dict()["moments"]
            seen.append(0 if state is None else state["units"])

    callback = for_lightning.SwitchCallback(lit.POLICY, when=tdfx.AtStep(3), merge=False, total_steps=None)
    trainer = lit.make_trainer(tmp_path, [callback, Units()], epochs=2, accumulate_grad_batches=2)
    trainer.fit(lit.Classifier(), lit.loader())
    assert seen == [1, 2, 3, 4, 5, 0, 0, 0]
    assert metrics(callback) == {"loss"}


def test_a_training_without_a_length_needs_a_moment(tmp_path: Path) -> None:
    callback = for_lightning.SwitchCallback()
    trainer = lit.make_trainer(tmp_path, [callback], epochs=-1, max_time={"seconds": 1})
    with pytest.raises(tdfx.PolicyError, match=r"Neither when= nor epoch= .*when=tdfx.AtStep\(500\).*max_steps="):
        trainer.fit(lit.Classifier(), lit.loader())


def test_a_compiled_lightning_module_runs_eagerly_while_it_collects(tmp_path: Path) -> None:
    torch._dynamo.reset()
    callback = for_lightning.SwitchCallback(lit.POLICY, when=tdfx.AtStep(3), merge=False, total_steps=None)
    module = lit.Classifier()
    lit.make_trainer(tmp_path, [callback]).fit(torch.compile(module, backend="eager"), lit.loader())
    assert metrics(callback) == {"loss"}
    assert lit.sites(module) == 3


def test_hooks_are_removed_where_the_training_ends_first(tmp_path: Path) -> None:
    callback = for_lightning.SwitchCallback(lit.POLICY, when=tdfx.AtStep(20), collect=16)
    module = lit.Classifier()
    trainer = lit.make_trainer(tmp_path, [callback])
    trainer.fit(module, lit.loader())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    assert callback.switch.state_dict()["moments"]["units"] == 8


def test_policy_none_is_the_default_policy() -> None:
    for callback in (for_lightning.SwitchCallback(None), for_transformers.SwitchCallback(None)):
        assert repr(callback.switch.policy) == repr(tdfx.Policy())
