"""Lightning's Trainer with the callback: training, the switch, resuming to the same bits, merging, averages."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import tdfx
from tdfx.layers.factorized import Factorized

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed: pip install 'tdfx[lightning]'")

from tdfx.integrations.lightning import SwitchCallback  # noqa: E402

POLICY = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)
FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
PER_EPOCH = 4

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 32),
        nn.Linear(32, 4),
    )


class Classifier(pl.LightningModule):  # type: ignore[misc, name-defined]
    """A LightningModule whose network is a child."""

    def __init__(self, steps: int = 12) -> None:
        super().__init__()
        self.model: Any = net()
        self.steps = steps
        self.rates: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("test", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), 1e-2)
        scheduler = CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Flat(Classifier):
    """A LightningModule whose layers are its own children."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 32), nn.Linear(32, 4)
        del self.model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x.flatten(1)).relu())
        return out


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 3, 8, 8, generator=generator), torch.randint(4, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=32 // PER_EPOCH)


def make_trainer(folder: Path, callbacks: list[Any], epochs: int = 3, **settings: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"enable_checkpointing": False, "max_epochs": epochs, **settings}
    return pl.Trainer(default_root_dir=folder, callbacks=callbacks, **quiet, **settings)


def sites(model: nn.Module) -> int:
    return sum(isinstance(module, Factorized) for module in model.modules())


def fitted(
    folder: Path, module: Any, *, ckpt: Any = None, save: Any = None, policy: Any = POLICY, **settings: Any
) -> Any:
    """Train a module in a new Trainer; return the callback and the Trainer."""
    options = {"epoch": 1, "merge": False, "total_steps": None, **settings.pop("callback", {})}
    if "when" in options:
        del options["epoch"]
    callback = SwitchCallback(policy, **options)
    trainer = make_trainer(folder, [callback, *settings.pop("others", [])], **settings)
    trainer.fit(module, loader(), ckpt_path=ckpt)
    if save is not None:
        trainer.save_checkpoint(save)
    return callback, trainer


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def test_it_trains_switches_and_merges_in_place(tmp_path: Path) -> None:
    module = Classifier()
    model, keys = module.model, list(module.state_dict())
    callback, trainer = fitted(tmp_path, module, callback={"merge": True})
    assert [event.what for event in callback.switch.events] == ["switched"]
    assert callback.switch.events[0].step == PER_EPOCH
    assert module.model is model
    assert (sites(module), list(module.state_dict())) == (0, keys)
    assert not model._load_state_dict_pre_hooks
    assert not model._forward_pre_hooks
    held = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters()}
    assert all("exp_avg" in trainer.optimizers[0].state[parameter] for parameter in module.parameters())
    torch.testing.assert_close(module.rates, CosineSchedule(12), rtol=1e-9, atol=0)


def CosineSchedule(steps: int) -> list[float]:  # noqa: N802
    optimizer: Optimizer = AdamW([nn.Parameter(torch.zeros(1))], 1e-2)
    scheduler = CosineAnnealingLR(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_at_full_rank_the_switch_does_not_change_the_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = Classifier().double()
    torch.manual_seed(0)
    other = Classifier().double()
    x = next(iter(loader()))[0].double()
    # The switch is after the last step, so that no step is taken with factors.
    for module, callbacks in ((dense, []), (other, [SwitchCallback(FULL, epoch=1, merge=False, total_steps=None)])):
        make_trainer(tmp_path, callbacks, epochs=1, precision="64-true").fit(module, loader())
    assert (sites(dense), sites(other)) == (0, 3)
    # In train mode, because the switch estimates the running statistics of batch norms again.
    torch.testing.assert_close(other.train()(x), dense.train()(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, epochs: int) -> None:
    torch.manual_seed(0)
    uninterrupted = Classifier()
    fitted(tmp_path, uninterrupted)
    torch.manual_seed(0)
    fitted(tmp_path, Classifier(), epochs=epochs, save=tmp_path / "a.ckpt")
    torch.manual_seed(1)
    resumed = Classifier()
    callback, _ = fitted(tmp_path, resumed, ckpt=tmp_path / "a.ckpt")
    assert sites(resumed) == 3
    assert same(uninterrupted, resumed)
    assert [event.step for event in callback.switch.events] == [PER_EPOCH]


def test_a_run_that_is_resumed_from_before_the_switch_ends_with_the_same_bits(tmp_path: Path) -> None:
    late = {"callback": {"when": tdfx.AtStep(PER_EPOCH + 2), "rewarm": 3}}
    torch.manual_seed(0)
    uninterrupted = Classifier()
    fitted(tmp_path, uninterrupted, **copy.deepcopy(late))
    torch.manual_seed(0)
    fitted(tmp_path, Classifier(), epochs=1, save=tmp_path / "a.ckpt", **copy.deepcopy(late))
    resumed = Classifier()
    fitted(tmp_path, resumed, ckpt=tmp_path / "a.ckpt", **copy.deepcopy(late))
    assert sites(resumed) == 3
    assert same(uninterrupted, resumed)


def test_a_rewarmup_goes_on_after_a_restart(tmp_path: Path) -> None:
    warm = {"callback": {"epoch": 1, "rewarm": 6}}
    torch.manual_seed(0)
    uninterrupted = Classifier()
    fitted(tmp_path, uninterrupted, **copy.deepcopy(warm))
    torch.manual_seed(0)
    fitted(tmp_path, Classifier(), epochs=2, save=tmp_path / "a.ckpt", **copy.deepcopy(warm))
    resumed = Classifier()
    fitted(tmp_path, resumed, ckpt=tmp_path / "a.ckpt", **copy.deepcopy(warm))
    assert same(uninterrupted, resumed)
    torch.manual_seed(0)
    cold = Classifier()
    fitted(tmp_path, cold)
    assert not same(uninterrupted, cold)


def test_a_factorized_checkpoint_is_tested_in_another_process(tmp_path: Path) -> None:
    module = Classifier()
    _, trainer = fitted(tmp_path, module, save=tmp_path / "a.ckpt")
    expected = trainer.test(module, loader(), verbose=False)
    fresh = Classifier()
    again = make_trainer(tmp_path, [SwitchCallback(POLICY, epoch=1, total_steps=None)])
    assert again.test(fresh, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False) == expected
    assert sites(fresh) == 3


def test_a_dense_checkpoint_is_loaded_into_a_factorized_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    early = Classifier()
    make_trainer(tmp_path, [SwitchCallback(POLICY, epoch=2, total_steps=None)], epochs=1).fit(early, loader())
    module = Classifier()
    callback, trainer = fitted(tmp_path, module)
    assert sites(module) == 3
    callback.setup(trainer, module, "test")
    module.load_state_dict(early.state_dict())
    assert sites(module) == 0
    assert same(module, early)


def test_without_the_callback_a_factorized_checkpoint_is_refused_by_its_keys(tmp_path: Path) -> None:
    fitted(tmp_path, Classifier(), save=tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*factors"):
        make_trainer(tmp_path, []).fit(Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_factors_without_a_plan_are_refused(tmp_path: Path) -> None:
    module = Classifier()
    fitted(tmp_path, module)
    fresh = Classifier()
    callback = SwitchCallback(POLICY, epoch=1, total_steps=None)
    callback.setup(make_trainer(tmp_path, [callback]), fresh, "fit")
    with pytest.raises(tdfx.CheckpointError, match=r"factors of 3 sites, '0' first.*ckpt_path="):
        fresh.load_state_dict(module.state_dict())
    assert sites(fresh) == 0


STEPS: dict[str, tuple[dict[str, Any], int | None]] = {
    "epochs": ({}, 3 * PER_EPOCH),
    "accumulated": ({"accumulate_grad_batches": 2}, 3 * PER_EPOCH // 2),
    "steps": ({"epochs": -1, "max_steps": 9}, 9),
    "no end but a time": ({"epochs": -1, "max_time": {"seconds": 1}}, None),
}


@pytest.mark.parametrize(("settings", "total"), STEPS.values(), ids=STEPS)
def test_the_trainer_gives_the_total_steps(settings: dict[str, Any], total: int | None, tmp_path: Path) -> None:
    callback = SwitchCallback(POLICY, when=tdfx.AtStep(2))
    make_trainer(tmp_path, [callback], **settings).fit(Classifier(), loader())
    assert callback.switch.total_steps == total


def test_the_steps_left_are_counted_from_the_trainers_step(tmp_path: Path) -> None:
    """The callback has counted another training before, or was not there when this training began."""
    callback, module = SwitchCallback(POLICY, when=tdfx.AtStep(3 * PER_EPOCH + 2)), Classifier()
    make_trainer(tmp_path, [callback]).fit(module, loader())
    make_trainer(tmp_path, [callback]).fit(module, loader())
    (event,) = callback.switch.events
    assert f"in the {3 * PER_EPOCH - 2} steps left" in event.why
    late = SwitchCallback(POLICY, when=tdfx.AtStep(2))
    without = make_trainer(tmp_path, [])
    without.fit(module, loader())
    without.save_checkpoint(tmp_path / "a.ckpt")
    make_trainer(tmp_path, [late], epochs=4).fit(module, loader(), ckpt_path=tmp_path / "a.ckpt")
    (event,) = late.switch.events
    assert f"in the {PER_EPOCH - 2} steps left" in event.why


class Manual(Classifier):
    """Optimizes manually."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        optimizer = self.optimizers()
        loss = super().training_step(batch, index)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


def test_manual_optimization_has_no_total_of_steps(tmp_path: Path) -> None:
    module, callback = Manual(), SwitchCallback(POLICY, epoch=1, merge=False)
    make_trainer(tmp_path, [callback]).fit(module, loader())
    assert callback.switch.total_steps is None
    assert sites(module) == 3


def test_a_training_too_short_for_a_switch_is_not_switched(tmp_path: Path) -> None:
    module = Classifier()
    callback = SwitchCallback(POLICY, epoch=1)
    make_trainer(tmp_path, [callback]).fit(module, loader())
    (event,) = callback.switch.events
    assert (event.what, sites(module)) == ("too_late", 0)
    assert f"in the {2 * PER_EPOCH} steps left" in event.why
    callback = SwitchCallback(POLICY, epoch=1, total_steps=5)
    make_trainer(tmp_path, [callback]).fit(module, loader())
    assert callback.switch.total_steps == 5


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    callback, trainer = fitted(tmp_path, Classifier(), accumulate_grad_batches=2)
    assert trainer.global_step == 6
    assert callback.switch.events[0].step == 2


def test_bf16_autocast_is_kept(tmp_path: Path) -> None:
    module = Classifier()
    seen: list[torch.dtype] = []
    module.model[-1].register_forward_hook(lambda layer, x, out: seen.append(out.dtype))
    fitted(tmp_path, module, precision="bf16-mixed")
    assert sites(module) == 3
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_a_compiled_child_is_measured_on_its_first_batch_and_compiled_again(tmp_path: Path) -> None:
    class Compiled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.compile(self.model, backend="eager", fullgraph=True)

    torch.manual_seed(0)
    uninterrupted = Compiled()
    callback, _ = fitted(tmp_path, uninterrupted, epochs=2, save=tmp_path / "a.ckpt")
    assert sites(uninterrupted) == 3
    assert callback.switch.plan is not None
    # FLOPs are counted only with example inputs, which the callback took from the first batch.
    assert callback.switch.plan.flops_before
    resumed = Compiled()
    fitted(tmp_path, resumed, epochs=2, ckpt=tmp_path / "a.ckpt")
    assert same(uninterrupted, resumed)


def test_a_module_with_several_children_is_rewritten_as_a_whole(tmp_path: Path) -> None:
    module = Flat()
    fitted(tmp_path, module)
    assert isinstance(module.first, Factorized)
    assert isinstance(module.second, Factorized)


def test_an_attribute_names_the_module_to_rewrite(tmp_path: Path) -> None:
    module = Classifier()
    module.model = nn.Sequential(module.model[:4], module.model[4:])
    fitted(tmp_path, module, callback={"attribute": "model.1"})
    assert (sites(module.model[0]), sites(module.model[1])) == (0, 2)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [("modle", "Classifier has no module 'modle' to be rewritten. It has 'model'."), ("model.0", "a single Conv2d")],
)
def test_an_attribute_that_cannot_be_rewritten_is_refused(tmp_path: Path, attribute: str, message: str) -> None:
    with pytest.raises(tdfx.ModelError, match=message):
        fitted(tmp_path, Classifier(), callback={"attribute": attribute})


@pytest.mark.parametrize("given", [{"epoch": 1, "when": tdfx.AtStep(3)}])
def test_exactly_one_setting_says_when(given: dict[str, Any]) -> None:
    with pytest.raises(tdfx.PolicyError, match="only one of them can say when to switch"):
        SwitchCallback(POLICY, **given)


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(tdfx.PolicyError, match="epoch=0 is not a whole number"):
        SwitchCallback(POLICY, epoch=0)
    with pytest.raises(tdfx.PolicyError, match="rewarm=-1"):
        SwitchCallback(POLICY, epoch=1, rewarm=-1)


class Adversaries(pl.LightningModule):  # type: ignore[misc, name-defined]
    """Two modules, two optimizers, and manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.judge = nn.Sequential(nn.Linear(192, 32), nn.Linear(32, 192)), net()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        for optimizer in self.optimizers():
            images = self.maker(batch[0].flatten(1)).view_as(batch[0])
            loss = nn.functional.cross_entropy(self.judge(images), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return AdamW(self.maker.parameters(), 1e-2), AdamW(self.judge.parameters(), 1e-2)


def test_two_callbacks_rewrite_two_modules(tmp_path: Path) -> None:
    def run(module: Adversaries, epochs: int, ckpt: Path | None) -> Any:
        callbacks = [
            SwitchCallback(POLICY, epoch=epoch, attribute=name, merge=False, total_steps=None)
            for epoch, name in ((1, "maker"), (2, "judge"))
        ]
        trainer = make_trainer(tmp_path, callbacks, epochs=epochs)
        trainer.fit(module, loader(), ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return callbacks

    torch.manual_seed(0)
    uninterrupted = Adversaries()
    steps = [callback.switch.events[0].step for callback in run(uninterrupted, 3, None)]
    assert steps == [PER_EPOCH, 2 * PER_EPOCH]
    assert (sites(uninterrupted.maker), sites(uninterrupted.judge)) == (2, 3)
    for epochs in (1, 2):
        torch.manual_seed(0)
        run(Adversaries(), epochs, None)
        resumed = Adversaries()
        run(resumed, 3, tmp_path / f"{epochs}.ckpt")
        assert same(uninterrupted, resumed)


def test_the_other_package_of_lightning_takes_the_callback(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed beside Lightning")

    class Plain(other.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = net()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return AdamW(self.parameters(), 1e-2)

    module, callback = Plain(), SwitchCallback(POLICY, epoch=1, merge=False, total_steps=None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"max_epochs": 2, "enable_checkpointing": False}
    other.Trainer(default_root_dir=tmp_path, callbacks=[callback], **quiet, **settings).fit(module, loader())
    assert sites(module) == 3


def test_it_switches_when_the_ranks_have_settled(tmp_path: Path) -> None:
    when = tdfx.Settled(every=1, window=1, tolerance=10.0, moved=1e-4, timeout=8)
    module = Classifier()
    callback, _ = fitted(tmp_path, module, callback={"when": when})
    assert callback.switch.done
    assert sites(module) == 3


def test_an_average_in_the_module_is_rewritten(tmp_path: Path) -> None:
    class Averaging(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.ema = AveragedModel(self.model)

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.ema.update_parameters(self.model)

    module = Averaging()
    fitted(tmp_path, module)
    assert (sites(module.model), sites(module.ema)) == (3, 3)
    assert list(module.ema.module.state_dict()) == list(module.model.state_dict())


def test_the_average_of_a_callback_is_rewritten(tmp_path: Path) -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")

    def averaged(module: Any, **settings: Any) -> None:
        saving = callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        others = [callbacks.EMAWeightAveraging(decay=0.9), saving]
        fitted(tmp_path, module, others=others, enable_checkpointing=True, **settings)

    torch.manual_seed(0)
    uninterrupted = Classifier()
    averaged(uninterrupted)
    resumed = Classifier()
    # The checkpoint holds the average and the model.
    averaged(resumed, ckpt=tmp_path / "epoch=1.ckpt")
    assert sites(resumed) == 3
    assert same(uninterrupted, resumed)
    plain = Classifier()
    torch.manual_seed(0)
    fitted(tmp_path, plain)
    assert not same(uninterrupted, plain)


def test_a_callback_that_holds_layers_which_leave_is_warned_of(tmp_path: Path) -> None:
    class Prunes(pl.Callback):  # type: ignore[misc, name-defined]
        """Holds layers as ``ModelPruning`` does, from before the training on."""

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            layers = (module for module in pl_module.modules() if isinstance(module, nn.Linear | nn.Conv2d))
            self._parameters_to_prune = [(module, "weight") for module in layers]

    with pytest.warns(tdfx.TdfxWarning, match=r"Prunes holds \d layers .*, _parameters_to_prune\[\d\]"):
        fitted(tmp_path, Classifier(), others=[Prunes()])
