"""The callbacks beside what else people use: other callbacks, several fits, averages, engines, changed settings."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import tdfx

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed: pip install 'tdfx[lightning]'")
transformers = pytest.importorskip(
    "transformers", reason="Transformers is not installed: pip install 'tdfx[transformers]'"
)
pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install 'tdfx[transformers]'")

import test_lightning as lit  # noqa: E402
import test_transformers as hf  # noqa: E402

from tdfx.integrations import lightning as for_lightning  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


IS_FOUR = transformers.__version__.startswith("4.")


def lit_callback(**settings: Any) -> Any:
    return for_lightning.SwitchCallback(lit.POLICY, **{"epoch": 1, "merge": False, "total_steps": None, **settings})


def fit(folder: Path, *callbacks: Any, module: Any = None, ckpt: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    module = lit.Classifier() if module is None else module
    lit.make_trainer(folder, list(callbacks), **settings).fit(module, lit.loader(), ckpt_path=ckpt)
    return module


def saving(folder: Path) -> Any:
    return pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)


# Transformers


class Saves(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Saves the model when the training ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        model.save_pretrained(self.folder)


class Averages(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Keeps an average of the model in a dict, and a copy of its weights as ``copy``."""

    def __init__(self, copy: Any = None) -> None:
        self.copy_of = copy
        self.averages: dict[str, AveragedModel] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        if self.copy_of is None:
            self.averages["ema"] = AveragedModel(model, avg_fn=lambda mean, now, count: now)
        else:
            self.kept = self.copy_of(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        for average in self.averages.values():
            average.update_parameters(model)


def hf_trainer(folder: Path, callbacks: list[Any], **settings: Any) -> Any:
    torch.manual_seed(0)
    trainer = hf.make_trainer(folder, hf.bert(), None, **{"save_strategy": "no", **settings})
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def test_callbacks_before_it_save_the_merged_model_and_averages_follow(tmp_path: Path) -> None:
    averages = Averages()
    trainer = hf_trainer(tmp_path, [Saves(tmp_path), averages, hf.make_callback(merge=True)])
    trainer.train()
    assert hf.sites(trainer.model) == 0
    loaded = type(trainer.model).from_pretrained(tmp_path)
    assert torch.equal(hf.outputs(loaded), hf.outputs(trainer.model))
    average: Any = averages.averages["ema"].module
    assert list(average.state_dict()) == list(trainer.model.state_dict())
    torch.testing.assert_close(hf.outputs(average), hf.outputs(trainer.model), rtol=1e-4, atol=1e-5)


def enclosed(copied: Any) -> Any:
    return lambda: copied


COPIES: dict[str, Any] = {
    "Averages.kept.copied holds a copy of the model": lambda model: enclosed(copy.deepcopy(model)),
    "Averages.kept holds a copy of the model": copy.deepcopy,
    "Averages.kept holds tensors under the names": lambda model: {
        name: parameter.detach().clone() for name, parameter in model.named_parameters()
    },
    "Averages.kept holds tensors of the shapes": lambda model: [each.detach().clone() for each in model.parameters()],
    "Trainer.kept.0 holds parameters of the model": lambda model: [list(model.parameters())[:2]],
}


def keeping(folder: Path, message: str) -> Any:
    """Return a Trainer that keeps a copy itself, as one of a user's class, or whose callback does."""
    if message.startswith("Averages"):
        return hf_trainer(folder, [Averages(COPIES[message]), hf.make_callback()])
    trainer = hf_trainer(folder, [hf.make_callback()])
    trainer.kept = COPIES[message](trainer.model)
    return trainer


@pytest.mark.parametrize("message", COPIES)
def test_other_copies_are_named_before_anything_changes(tmp_path: Path, message: str) -> None:
    trainer = keeping(tmp_path, message)
    with pytest.warns(tdfx.TdfxWarning, match=message):
        trainer.train()
    trainer = keeping(tmp_path, message)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", _raise)
        with pytest.raises(tdfx.TdfxWarning, match=message):
            trainer.train()
    assert hf.sites(trainer.model) == 0


def _raise(message: Any, category: Any = UserWarning, *rest: Any, **named: Any) -> None:
    if category is tdfx.TdfxWarning:
        raise category(message)


def test_an_average_that_is_passed_is_rewritten(tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path, [])
    average = AveragedModel(trainer.model)
    trainer.add_callback(hf.make_callback(averaged=lambda: average))
    trainer.train()
    assert hf.sites(average) == hf.sites(trainer.model) > 3


def test_an_average_that_was_merged_stays_so_when_the_best_checkpoint_has_factors(tmp_path: Path) -> None:
    average = Averages()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "closeness", "eval_strategy": "epoch"}
    trainer = hf_trainer(tmp_path, [average, hf.make_callback(merge=True)], save_strategy="epoch", **best)
    trainer.compute_metrics = lambda _: {"closeness": -abs(trainer.state.global_step - 2 * hf.PER_EPOCH)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"-{2 * hf.PER_EPOCH}")
    dense = hf.bert()
    for model in (trainer.model, average.averages["ema"].module):
        assert list(model.state_dict()) == list(dense.state_dict())


def test_the_best_model_is_loaded_whoever_made_the_model(tmp_path: Path) -> None:
    """With ``model_init`` there is a new model when the training begins, and the callback was added late."""
    best = hf.PER_EPOCH - 2
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    trainer = hf_trainer(
        tmp_path,
        [hf.make_callback(merge=True)],
        metric_for_best_model="closeness",
        load_best_model_at_end=True,
        **settings,
    )
    trainer.model_init = hf.bert
    trainer.compute_metrics = lambda _: {"closeness": -abs(trainer.state.global_step - best)}
    trainer.train()
    expected = hf.bert()
    path = tmp_path / f"checkpoint-{best}" / "model.safetensors"
    expected.load_state_dict(transformers.trainer.safetensors.torch.load_file(path))
    assert hf.sites(trainer.model) == 0
    assert hf.same(trainer.model, expected)


def test_a_run_is_resumed_with_model_init_and_other_epochs(tmp_path: Path) -> None:
    first = hf_trainer(tmp_path, [hf.make_callback()], save_strategy="epoch")
    first.train()
    changes: list[dict[str, Any]] = [{}, {"gradient_accumulation_steps": 2}]
    if not IS_FOUR:  # which goes on with the batch size of the checkpoint
        changes.append({"per_device_train_batch_size": 4})
    for changed in changes:
        callback = hf.make_callback()
        second = hf_trainer(tmp_path / "again", [callback], **changed)
        second.model_init = hf.bert
        second.train(resume_from_checkpoint=callback.resume(second, tmp_path / f"checkpoint-{2 * hf.PER_EPOCH}"))
        assert hf.sites(second.model) == hf.sites(first.model) > 3
        assert second.model_init is hf.bert
        assert hf.same(second.model, first.model) == (not changed)


@pytest.mark.skipif(IS_FOUR, reason="Transformers 4 goes on with the batch size of the checkpoint")
def test_an_epoch_of_another_length_ends_later(tmp_path: Path) -> None:
    first = hf_trainer(tmp_path, [hf.make_callback(epoch=2)], save_strategy="epoch", num_train_epochs=1)
    first.train()
    callback = hf.make_callback(epoch=2)
    second = hf_trainer(tmp_path / "again", [callback], per_device_train_batch_size=4, num_train_epochs=4)
    second.train(resume_from_checkpoint=callback.resume(second, tmp_path / f"checkpoint-{hf.PER_EPOCH}"))
    # One of two epochs was left, and has twice as many steps now.
    assert [event.step for event in callback.switch.events] == [3 * hf.PER_EPOCH]


def test_a_callback_begins_anew_with_another_model(tmp_path: Path) -> None:
    callback = hf.make_callback()
    for _ in range(2):
        trainer = hf_trainer(tmp_path, [callback])
        trainer.train()
        assert hf.sites(trainer.model) > 3
        assert len(callback.switch.events) == 1


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ({"deepspeed": True}, "DeepSpeed"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP1"),
        ({"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 1}}, "FSDP1"),
        ({"fsdp": True, "fsdp_config": {"xla": True}}, "FSDP of PyTorch/XLA"),
    ],
)
def test_transformers_with_an_engine_is_refused(engine: dict[str, Any], name: str) -> None:
    callback, model = hf.make_callback(), hf.bert()
    args: Any = SimpleNamespace(**{"deepspeed": None, "fsdp": None, **engine})
    state = SimpleNamespace(global_step=0)
    for event in (callback.on_init_end, callback.on_train_begin):
        with pytest.raises(tdfx.ModelError, match=rf"uses {name}, .*Train with FSDP2, .*'version': 2.*or with DDP"):
            event(args, state, SimpleNamespace(), model=model)
    assert not model._load_state_dict_pre_hooks


# Lightning


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy", "XLAFSDPStrategy"])
def test_lightning_with_an_engine_is_refused(tmp_path: Path, name: str) -> None:
    callback, module = lit_callback(), lit.Classifier()
    strategy = type("Mine", (type(name, (), {}),), {})()
    trainer: Any = SimpleNamespace(strategy=strategy, callbacks=[callback])
    with pytest.raises(
        tdfx.ModelError, match=r"uses Lightning's Mine, .*Train with FSDP2, by .*ModelParallel.*or with DDP"
    ):
        callback.setup(trainer, module, "fit")
    assert not module._load_state_dict_pre_hooks


class Tuned(lit.Classifier):
    """Has the attributes that the Tuner changes."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-2, 8

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(lit.loader().dataset, batch_size=self.batch_size)


@pytest.mark.parametrize("tune", ["lr_find", "scale_batch_size"])
def test_a_tuner_before_the_training_leaves_the_switch_alone(tmp_path: Path, tune: str) -> None:
    callback, module = lit_callback(), Tuned()
    trainer = lit.make_trainer(tmp_path, [callback])
    settings = {"lr_find": {"num_training": 6}, "scale_batch_size": {"max_trials": 2, "steps_per_trial": 2}}
    getattr(pl.tuner.Tuner(trainer), tune)(module, **settings[tune])
    trainer.fit(module)
    assert lit.sites(module) == 3
    assert [event.step for event in callback.switch.events] == [-(-32 // module.batch_size)]


def test_a_learning_rate_finder_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    class Finder(pl.callbacks.LearningRateFinder):  # type: ignore[misc, name-defined]
        def on_fit_start(self, *rest: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    callback = lit_callback(epoch=None, when=tdfx.AtStep(6))
    module = fit(tmp_path, callback, Finder(num_training_steps=3, update_attr=False), module=Tuned())
    assert [event.step for event in callback.switch.events] == [6]
    assert callback.switch.steps == 3 * lit.PER_EPOCH
    assert lit.sites(module) == 3


def test_a_checkpoint_from_before_the_training_begins_it(tmp_path: Path) -> None:
    callback, module = lit_callback(), lit.Classifier()
    trainer = lit.make_trainer(tmp_path, [callback])
    trainer.test(module, lit.loader(), verbose=False)
    trainer.save_checkpoint(tmp_path / "zero.ckpt")
    again = lit_callback()
    assert lit.sites(fit(tmp_path, again, ckpt=tmp_path / "zero.ckpt")) == 3
    assert [event.step for event in again.switch.events] == [lit.PER_EPOCH]


def test_layers_made_in_configure_model_are_loaded(tmp_path: Path) -> None:
    class Late(lit.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.model = None

        def configure_model(self) -> None:
            if self.model is None:
                torch.manual_seed(3)
                self.model = lit.net()

    whole = fit(tmp_path, lit_callback(attribute="model"), saving(tmp_path), module=Late(), enable_checkpointing=True)
    for epoch in (0, 1):
        callbacks = lit_callback(attribute="model"), saving(tmp_path / "again")
        ckpt = tmp_path / f"epoch={epoch}.ckpt"
        resumed = fit(tmp_path, *callbacks, module=Late(), ckpt=ckpt, enable_checkpointing=True)
        assert lit.sites(resumed) == 3
        assert lit.same(whole, resumed)


class Fine(lit.Classifier):
    """A backbone that is frozen at first, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.model[:4], self.model[4:]
        del self.model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x))
        return out

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], 1e-2)


def test_a_backbone_that_is_unfrozen_is_resumed(tmp_path: Path) -> None:
    def callbacks(folder: Path) -> list[Any]:
        unfreeze = pl.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)
        return [lit_callback(epoch=2), unfreeze, saving(folder)]

    settings = {"epochs": 4, "enable_checkpointing": True}
    fit(tmp_path, *callbacks(tmp_path), module=Fine(), **settings)
    resumed = fit(tmp_path, *callbacks(tmp_path / "again"), module=Fine(), ckpt=tmp_path / "epoch=2.ckpt", **settings)
    assert lit.sites(resumed) == 3


@pytest.mark.parametrize(("start", "switch"), [(1, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("norm", [True, False])
def test_stochastic_weight_averaging_follows(tmp_path: Path, start: int, switch: int, norm: bool) -> None:
    swa = pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=start)
    module = lit.Classifier()
    keys = [key for key in module.state_dict() if norm or not key.startswith("model.1.")]
    if not norm:
        module.model[1] = nn.Identity()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), 1e-2)  # type: ignore[method-assign]
    saves = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    callbacks = (swa, lit_callback(epoch=switch, merge=True), saves)
    fit(tmp_path, *callbacks, module=module, epochs=4, enable_checkpointing=True)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert list(module.state_dict()) == list(last) == keys
    assert not norm or all(torch.equal(last[key], value) for key, value in module.state_dict().items())
    assert all(layer.momentum == 0.1 for layer in module.modules() if isinstance(layer, nn.BatchNorm2d))
    assert swa._average_model is not None
    # With batch norm, Lightning goes on for an epoch after it has put the average into the module.
    for name, average in swa._average_model.named_parameters() if not norm else ():
        torch.testing.assert_close(module.get_parameter(name), average)


def test_the_last_checkpoint_is_dense_where_it_was_written_before_the_training_was_stopped(tmp_path: Path) -> None:
    class Stops(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    saves = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    callbacks = (Stops(), lit_callback(merge=True), saves)
    module = fit(tmp_path, *callbacks, epochs=4, enable_checkpointing=True)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(last["state_dict"]) == list(lit.Classifier().state_dict())
    assert all(torch.equal(last["state_dict"][key], value) for key, value in module.state_dict().items())
    again = fit(tmp_path, lit_callback(merge=True), ckpt=tmp_path / "last.ckpt", epochs=3)
    assert lit.sites(again) == 0


def test_two_fits_of_two_modules_are_switched(tmp_path: Path) -> None:
    callback = lit_callback(merge=True)
    for module in (lit.Classifier(), lit.Classifier()):
        fit(tmp_path, callback, module=module)
        assert [event.what for event in callback.switch.events] == ["switched"]
        assert callback.merged


def test_a_callback_before_it_saves_the_merged_module(tmp_path: Path) -> None:
    keys: list[str] = []

    class SavesFirst(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            keys.extend(pl_module.state_dict())

    module = fit(tmp_path, SavesFirst(), lit_callback(merge=True))
    assert keys == list(module.state_dict()) == list(lit.Classifier().state_dict())
