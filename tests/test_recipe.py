"""The training recipe, end to end: train, switch, stop, resume, merge, verify."""

from __future__ import annotations

import doctest
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import needs
from click.testing import CliRunner, Result
from recipe_runs import config_of, run_of, tool
from torch import Tensor

import tdfx

pytestmark = needs("train.py")

TOML = """
name = "tiny"
[model]
name = "tiny"
[data]
name = "digits"
batch = 300
[training]
epochs = 3
optimizer = "adamw"
lr = 0.01
[switch]
policy = "ratio:0.5"
min_gain = 0
weigh = false
"""


def command(tmp_path: Path, *arguments: str, text: str = TOML) -> Result:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    return CliRunner().invoke(tool("train").main, [str(tmp_path / "run.toml"), *arguments, "--threads", "1"])


def bits(run: Any) -> dict[str, Tensor]:
    values: dict[str, Tensor] = run.merged.state_dict()
    return values


def same(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("name", ["recipe.schedule", "recipe.data"])
def test_the_examples_run(name: str) -> None:
    result = doctest.testmod(tool(name))
    assert (result.failed, result.attempted > 0) == (0, True)


def test_a_run_trains_switches_merges_and_is_verified(tmp_path: Path) -> None:
    plot = [f"--plot={tmp_path / 'run.png'}"] if _has("matplotlib") else []
    result = command(tmp_path, f"--json={tmp_path / 'out.json'}", "--set", "training.ema=0.5", *plot)
    assert result.exit_code == 0, result.output
    assert "ONNX: the merged graph is the original's" in result.output
    assert not plot or (tmp_path / "run.png").stat().st_size > 1000
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    (record,) = written["results"]
    assert written["seeds"] == [0]
    assert (record["config"]["training"]["ema"], record["config"]["switch"]["policy"]) == (0.5, "ratio:0.5")
    assert [epoch["epoch"] for epoch in record["epochs"]] == [1, 2, 3]
    assert record["epochs"][0]["training_loss"] > record["epochs"][2]["training_loss"]
    assert {site["name"] for site in record["factorized"]} == {"0", "3", "7"}
    assert record["events"] == ["step 3: switched, 3 sites (0, 3, 7): the step that was asked for"]
    assert record["parameters_after"] < record["parameters"]
    assert record["flops_after"] < record["flops"]
    assert record["verified"] is True
    # A few hundred roundings of float32.
    assert 0 < record["merge_error"] < 1e-5
    seconds = record["seconds"]
    assert all(seconds[name] > 0 for name in ("data", "step", "planning", "rewriting", "merging", "evaluation"))
    assert (seconds["watching"], seconds["saving"]) == (0.0, 0.0)
    assert record["epochs"][-1]["seconds"] < sum(seconds.values()) - seconds["evaluation"]


def test_a_run_without_a_rewrite_has_nothing_to_merge() -> None:
    run = run_of(config_of(switch__policy="none"))
    assert run.train()
    record = tool("recipe.record").record_of(run)
    assert (record.factorized, record.flops, record.merge_error, record.verified) == ([], None, None, None)
    assert record.accuracy == record.epochs[-1]["accuracy"]


def test_a_run_of_few_steps_is_not_rewritten_by_default() -> None:
    run = run_of(config_of(switch__weigh=True))
    assert run.train()
    (event,) = run.switch.events
    assert (run.switch.plan, event.step, event.what) == (None, 3, "too_late")
    assert "in the 6 steps left" in event.why
    assert tool("recipe.settings").SwitchingSettings().weigh
    assert same(bits(run), run.model.state_dict())


@pytest.mark.parametrize(("every", "scored"), [(1, [1, 2, 3]), (2, [2]), (0, [])])
def test_held_out_data_are_scored_as_often_as_asked(every: int, scored: list[int], tmp_path: Path) -> None:
    run = run_of(config_of(output__evaluate=every))
    lines: list[str] = []
    run.train(lines.append)
    record = tool("recipe.record").record_of(run)
    assert [epoch["epoch"] for epoch in record.epochs if "accuracy" in epoch] == scored
    assert ["held out" in line for line in lines] == [epoch in scored for epoch in (1, 2, 3)]
    always = run_of(config_of())
    always.train()
    assert record.accuracy == tool("recipe.record").record_of(always).accuracy
    if _has("matplotlib"):
        tool("recipe.plot").plot_runs({"tiny": [record]}, tmp_path / "run.png")


def test_a_run_may_end_within_an_epoch() -> None:
    whole, short = run_of(config_of(switch__policy="none")), run_of(config_of(switch__policy="none", training__steps=5))
    assert short.train()
    record = tool("recipe.record").record_of(short)
    assert (record.steps, len(record.epochs)) == (5, 2)
    assert not whole.train(most_steps=5)
    # The data are those of the first steps of a longer run; the schedule is shorter.
    taken = {int(state["step"]) for run in (whole, short) for state in run.optimizer.state.values()}
    assert taken == {5}
    assert short.optimizer.param_groups[0]["lr"] < whole.optimizer.param_groups[0]["lr"]


SETTINGS: dict[str, dict[str, Any]] = {
    "average, warm-up again": {"training__ema": 0.8, "switch__rewarm": 4},
    "within an epoch": {"training__steps": 11},
    "settled, momentum": {
        "training__optimizer": "sgd",
        "switch__when": "settled",
        "switch__every": 1,
        "switch__epoch": 2,
        "training__clip": 1.0,
    },
}


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, steps) for number, name in enumerate(SETTINGS) for steps in sorted({2, 5, 8} - {2 + 3 * number})],
)
def test_a_stopped_run_resumes_to_the_same_bits(name: str, steps: int, tmp_path: Path) -> None:
    config = config_of(output__checkpoint=str(tmp_path / "run.tdfx"), output__every=2, **SETTINGS[name])
    uninterrupted = run_of(config)
    assert uninterrupted.train()
    assert not run_of(config).train(most_steps=steps)
    resumed = run_of(config)
    tool("recipe.checkpoint").resume(resumed, tmp_path / "run.tdfx")
    assert (resumed.progress.epoch, resumed.progress.step) == divmod(steps, 3)
    assert resumed.train()
    assert same(bits(resumed), bits(uninterrupted))
    assert resumed.switch.events == uninterrupted.switch.events
    assert len(uninterrupted.switch.plan.factorized) > 0
    histories = [[{**epoch, "seconds": 0} for epoch in run.history] for run in (uninterrupted, resumed)]
    assert histories[0] == histories[1]


def test_without_its_random_stream_a_resumed_run_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(output__checkpoint=str(tmp_path / "run.tdfx"), output__every=2)
    uninterrupted = run_of(config)
    uninterrupted.train()
    run_of(config).train(most_steps=5)
    resumed = run_of(config)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    tool("recipe.checkpoint").resume(resumed, tmp_path / "run.tdfx")
    resumed.train()
    assert not same(bits(resumed), bits(uninterrupted))


def test_the_command_resumes_after_the_last_epoch(tmp_path: Path) -> None:
    file = f"output.checkpoint={tmp_path / 'run.tdfx'}"
    first = command(tmp_path, "--set", file, "--set", "output.verify=false")
    resumed = command(tmp_path, "--set", file, "--set", "output.verify=false", "--resume")
    assert (first.exit_code, resumed.exit_code) == (0, 0), resumed.output
    outputs = [result.output for result in (first, resumed)]
    scores = [output[output.index("tiny: accuracy") :].splitlines()[0] for output in outputs]
    assert scores[0] == scores[1]
    assert "epoch 3 of 3" in first.output
    assert "epoch 3 of 3" not in resumed.output


def test_a_run_is_resumed_with_its_own_settings_only(tmp_path: Path) -> None:
    path = tmp_path / "run.tdfx"
    resume, error = tool("recipe.checkpoint").resume, tool("recipe.errors").RecipeError
    with pytest.raises(error, match=r"--resume found no checkpoint .*run.tdfx'. Set output.checkpoint"):
        resume(run_of(config_of()), path)
    run_of(config_of(output__checkpoint=str(path))).train(most_steps=3)
    with pytest.raises(error, match=r"with another training: .*'epochs': 3.* there and .*'epochs': 4.* here"):
        resume(run_of(config_of(training__epochs=4)), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(tdfx.CheckpointError, match="was cut off"):
        resume(run_of(config_of()), path)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_steps_in_half_precision_train(amp: str) -> None:
    run = run_of(config_of(training__amp=amp, training__channels_last=True))
    dtypes = set[torch.dtype]()
    run.model[3].register_forward_hook(lambda layer, inputs, output: dtypes.add(output.dtype))
    run.train()
    assert tool("recipe.run_state").DTYPES[amp] in dtypes
    assert run.history[2]["training_loss"] < run.history[0]["training_loss"]
    assert all(parameter.dtype == torch.float32 for parameter in run.merged.parameters())
    assert run.merged[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert run.scaler.is_enabled() == (amp == "fp16")


def test_tensorboard_gets_the_figures(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = run_of(config_of(output__tensorboard=str(tmp_path), training__epochs=2))
    run.train()
    written = events.EventAccumulator(str(tmp_path)).Reload()
    assert [scalar.value for scalar in written.Scalars("run/accuracy")] == pytest.approx(
        [epoch["accuracy"] for epoch in run.history]
    )


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = tool("recipe.errors").RecipeError
    with pytest.raises(error, match=r"asks for TensorBoard.*pip install tensorboard"):
        tool("recipe.plot").Board(str(tmp_path))
    with pytest.raises(error, match=r"pip install 'tdfx\[report\]'"):
        tool("recipe.plot").plot_runs({}, tmp_path / "run.png")


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_a_mistake_is_reported_without_a_traceback(tmp_path: Path) -> None:
    result = command(tmp_path, "--set", "training.epoch=3")
    assert (result.exit_code, result.output) == (
        1,
        "Error: There is no setting 'training.epoch'. Nearest: 'epochs', 'steps'.\n",
    )
