"""The parts of the training recipe: rates, averages, losses, time, settings, networks, scores."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import TOOLS, needs
from recipe_runs import config_of, run_of, tool
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

import tdfx

pytestmark = needs("train.py")


def training(**settings: Any) -> Any:
    return tool("recipe.settings").TrainingSettings(**settings)


def rates(settings: Any, steps: int) -> list[float]:
    return [tool("recipe.schedule").rate_at(step, steps, settings) for step in range(settings.epochs * steps)]


def torch_rates(scheduler_class: Any, count: int, **settings: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler, rates = scheduler_class(optimizer, **settings), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_the_cosine_schedule_is_that_of_torch() -> None:
    expected = torch_rates(CosineAnnealingLR, 40, T_max=40)
    assert rates(training(epochs=10, lr=0.4), 4) == pytest.approx(expected, abs=1e-12)


def test_the_step_schedule_is_that_of_torch() -> None:
    settings = training(epochs=10, lr=0.4, schedule="step", milestones=[0.5, 0.75], gamma=0.2)
    assert rates(settings, 4) == pytest.approx(torch_rates(MultiStepLR, 40, milestones=[20, 30], gamma=0.2))


@pytest.mark.parametrize("schedule", [{}, {"schedule": "step", "milestones": [0.5]}], ids=["cosine", "step"])
def test_rates_rise_before_they_fall(schedule: dict[str, Any]) -> None:
    all_rates = rates(training(epochs=10, lr=0.4, warmup=2.5, **schedule), 4)
    assert all_rates[:10] == pytest.approx([0.04 * (step + 1) for step in range(10)])
    assert all(before >= after for before, after in itertools.pairwise(all_rates[9:]))
    assert all_rates[-1] < 0.1


@pytest.mark.parametrize("schedule", [{}, {"schedule": "step", "milestones": [0.5]}], ids=["cosine", "step"])
def test_a_training_of_so_many_steps_has_the_rates_of_one_that_is_as_long(schedule: dict[str, Any]) -> None:
    whole = training(epochs=3, lr=0.4, warmup=0.5, **schedule)
    by_steps = training(epochs=30, steps=12, lr=0.4, warmup=0.5, **schedule)
    assert rates(whole, 4) == rates(by_steps, 4)[:12]
    assert rates(whole, 4) != rates(training(epochs=30, lr=0.4, warmup=0.5, **schedule), 4)[:12]


def test_the_average_follows_its_formula() -> None:
    layers: Any = nn.Linear(2, 2), nn.BatchNorm1d(2)
    model: Any = nn.Sequential(*layers).double()
    average = tool("recipe.schedule").make_average(model, 0.5)
    expected = None
    for count in range(8):
        with torch.no_grad():
            model[0].weight.normal_()
            model[1](torch.randn(4, 2, dtype=torch.float64))
        average.update_parameters(model)
        decay = min(0.5, (1 + count) / (10 + count))
        now = torch.cat([model[0].weight.detach().flatten(), model[1].running_mean])
        expected = now if expected is None else decay * expected + (1 - decay) * now
    averaged = torch.cat([average.module[0].weight.detach().flatten(), average.module[1].running_mean])
    assert expected is not None
    assert torch.allclose(averaged, expected, rtol=1e-12)
    assert average.module[1].num_batches_tracked == 8
    assert not torch.allclose(averaged, now, rtol=1e-3)


def test_the_average_is_scored() -> None:
    run = run_of(config_of(training__ema=0.9))
    run.train()
    scored = tool("recipe.score").score(run.average.module, run.data, run.device, run.layout)
    assert run.final_score() == scored
    plain = tool("recipe.score").score(run.model, run.data, run.device, run.layout)
    assert plain != scored


def test_label_smoothing_spreads_labels_over_all_classes() -> None:
    outputs, y = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    logs = outputs.log_softmax(-1)
    labelled = logs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    expected = -(0.9 * labelled + 0.1 * logs.mean(-1)).mean()
    assert torch.allclose(tool("recipe.score").loss_of(outputs, y, 0.1), expected)


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    for clip in (0.0, 1e-3):
        run = run_of(config_of(training__clip=clip, training__optimizer="sgd"))
        parameters = list(run.model.parameters())
        step = run.optimizer.step

        def record_norm(parameters: Any = parameters, step: Any = step) -> None:
            norms.append(float(torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()))
            step()

        monkeypatch.setattr(run.optimizer, "step", record_norm)
        run.train(most_steps=1)
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_scoring_preserves_the_mode_of_every_layer() -> None:
    run = run_of(config_of())
    run.model[1].eval()
    before = [module.training for module in run.model.modules()]
    score = tool("recipe.score").score(run.model, run.data, run.device, run.layout)
    assert [module.training for module in run.model.modules()] == before
    x, y = run.data.test
    outputs = run.model.eval()(x).detach()
    assert score.accuracy == pytest.approx(100 * float((outputs.argmax(1) == y).double().mean()))
    assert score.loss == pytest.approx(float(nn.functional.cross_entropy(outputs, y)), rel=1e-5)


def test_time_counts_to_the_phase_in_which_it_passes() -> None:
    now = [0.0]
    phases = tool("recipe.phases").Phases(lambda: now[0], torch.device("cpu"))
    for name, seconds in (("data", 1.0), ("step", 2.0), ("evaluation", 4.0), ("step", 8.0)):
        with phases.of(name):
            now[0] += seconds
    phases.add("planning", 16.0)
    assert {name: seconds for name, seconds in phases.seconds.items() if seconds} == {
        "data": 1.0,
        "step": 10.0,
        "evaluation": 4.0,
        "planning": 16.0,
    }
    assert phases.training == 27.0


@pytest.mark.parametrize(
    ("settings", "given"),
    [({"when": "auto"}, {"total_steps"}), ({"when": "epoch"}, {"when", "total_steps"}), ({"weigh": False}, {"when"})],
)
def test_the_moment_of_the_switch_is_left_to_it_unless_it_is_given(
    settings: dict[str, Any], given: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_state, passed = tool("recipe.run_state"), list[set[str]]()
    monkeypatch.setattr(run_state.tdfx, "Switch", lambda policy, **options: passed.append(set(options)))
    overrides = {f"switch__{name}": value for name, value in {"weigh": True, **settings}.items()}
    run_state.make_switch(config_of(**overrides), 10)
    assert passed == [given | {"rewarm", "clock"}]


def test_the_default_policy_is_that_of_tdfx() -> None:
    settings = tool("recipe.settings").SwitchingSettings()
    assert settings.policy_with(tdfx.Policy().cost) == tdfx.Policy()
    assert settings.policy_with(tdfx.Measured(budget=settings.measure)) == tdfx.Policy()


# Settings.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=0", "training.epochs=0 is not allowed: it should be greater than or equal to 1"),
        ("training.epochs='many'", "training.epochs='many' is not allowed: it should be a valid integer"),
        ("training.lr=true", "training.lr=True is not allowed: it should be a valid number"),
        ("training.warmup=3", r"training.warmup=3.0 is not in \[0, 3\), the epochs"),
        ("training.schedule=step", "'step' needs milestones"),
        ("training.milestones=[0.5]", "'cosine' takes none"),
        ("training.optimizer=adam", "training.optimizer='adam' is not allowed: it should be 'sgd' or 'adamw'"),
        ("training.label_smoothing=1.0", "training.label_smoothing=1.0 is not allowed: it should be less than 1"),
        ("model.nmae=tiny", "There is no setting 'model.nmae'. Nearest: 'name'"),
        ("data=digits", r"data='digits' is not a table of settings. Write \[data\]"),
        ("name.first=a", "'name.first' names a part of 'name', which is a single setting"),
        ("epochs", "--set 'epochs' does not say which setting gets which value"),
        ("switch.policy=vmbf", r"\[switch\] has settings that no policy can have: 'vmbf' names no rank rule"),
        ("switch.min_gain=-1.0", r"\[switch\] has settings that no policy can have: min_gain=-1.0"),
        ("switch.measure=0", "switch.measure=0 is not allowed: it should be greater than 0"),
        ("switch.epoch=0", "switch.epoch=0 is below 1"),
        ("switch={when='auto', weigh=false}", "switch.when='auto' and switch.weigh=False do not go together"),
        ("training.milestones=[0.5, 2.0]", "are not shares of the training in"),
        ("training.milestones=['a']", "training.milestones.0='a' is not allowed: it should be a valid number"),
        ("switch.epoch=3", "switch.epoch=3 leaves none of the training.epochs=3 after the switch"),
        ("data.batch=2000", "data.batch=2000 is more than the 1198 samples"),
        (
            "model.name=resnet55",
            "model.name='resnet55' is no network of the recipe or of torchvision. Nearest: 'resnet5",
        ),
        ("model.name=transformer", "model.name='transformer' does not go with images"),
        ("data.name=text", "model.name='tiny' does not go with pieces of text"),
    ],
)
def test_a_wrong_setting_is_named(override: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('name = "tiny"\nmodel.name = "tiny"\ndata.name = "digits"\ntraining.epochs = 3\n', encoding="utf-8")
    with pytest.raises(tool("recipe.errors").RecipeError, match=message):
        run_of(tool("recipe.config").read_config(file, [override]))


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    read, error = tool("recipe.config").read_config, tool("recipe.errors").RecipeError
    with pytest.raises(error, match=r"could not be read: .*tools/configs holds some"):
        read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ", encoding="utf-8")
    with pytest.raises(error, match="is not TOML"):
        read(tmp_path / "bad.toml")
    (tmp_path / "short.toml").write_text('name = "short"\nmodel.name = "tiny"', encoding="utf-8")
    with pytest.raises(error, match="The setting 'data' is missing"):
        read(tmp_path / "short.toml")


def test_every_config_of_the_repository_is_valid() -> None:
    files = sorted((TOOLS / "configs").glob("*.toml"))
    assert len(files) >= 10
    for file in files:
        config = tool("recipe.config").read_config(file)
        tool("recipe.run_state").make_switch(config, 10)


# Networks.


@pytest.mark.parametrize("name", ["vgg", "vgg19", "resnet14-small", "resnet18-small", "resnet56", "densenet40"])
@pytest.mark.parametrize(("colors", "side"), [(1, 8), (3, 32)])
def test_networks_take_the_images_of_the_data(name: str, colors: int, side: int) -> None:
    models, settings = tool("recipe.models"), tool("recipe.settings")
    width = 8 if name in {"vgg", "resnet18-small"} else 0
    model = models.build(settings.ModelSettings(name=name, width=width), models.DataShape(7, colors, side))
    assert model.eval()(torch.rand(2, colors, side, side)).shape == (2, 7)


@pytest.mark.parametrize(("name", "last"), [("resnet18", 4), ("mobilenet_v2", 4)])
def test_networks_of_torchvision_keep_more_detail_of_small_images(name: str, last: int) -> None:
    models, settings = tool("recipe.models"), tool("recipe.settings")
    model = models.build(settings.ModelSettings(name=name), models.DataShape(7, 1, 32))
    sides = []
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    convolutions[-1].register_forward_hook(lambda layer, inputs, output: sides.append(output.shape[-1]))
    assert model.eval()(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    assert sides == [last]


def test_a_network_of_one_width_says_so() -> None:
    models, settings = tool("recipe.models"), tool("recipe.settings")
    with pytest.raises(tool("recipe.errors").RecipeError, match=r"model.width=8: 'vgg19' comes in one width only"):
        models.build(settings.ModelSettings(name="vgg19", width=8), models.DataShape(7, 3, 32))
