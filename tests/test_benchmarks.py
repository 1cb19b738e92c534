"""The benchmarks of steps, costs, switches and default policies, on networks that take no time."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import TOOLS, needs, tool
from click import ClickException
from click.testing import CliRunner
from torch import nn

import tdfx
from tdfx.cost.timing import take_turns
from tdfx.demo.run import build_model
from tdfx.training.step_check import StepCheck

pytestmark = [needs("bench_step.py"), pytest.mark.usefixtures("same_clock")]


@pytest.fixture(scope="module", autouse=True)
def _tools() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tool("nets").NETS, "tiny", (tiny, 8))
        yield


def tiny() -> nn.Module:
    """Return a network whose middle layer is worth a rewrite."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.Flatten(), nn.Linear(4096, 10)
    )


def run(name: str, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(tool(name).main, [*arguments, "--cpu-time"])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize(
    "name", ["bench_common", "bench_cost", "bench_planning", "profile_step", "study_data", "study_runs"]
)
def test_the_examples_of_the_benchmarks_run(name: str) -> None:
    result = doctest.testmod(tool(name))
    assert (result.failed, result.attempted > 0) == (0, True)


# The clock, separate layer times, and result files.


@pytest.mark.parametrize(("cpu_time", "counts"), [(True, False), (False, True)])
def test_cpu_time_does_not_count_waiting(cpu_time: bool, counts: bool) -> None:
    threads = torch.get_num_threads()
    tool("bench_common").set_clock(cpu_time, threads)
    (waiting,) = take_turns([lambda: time.sleep(0.02)], rounds=1)
    assert (waiting.seconds >= 0.02) == counts
    assert torch.get_num_threads() == threads


def test_separate_times_stay_separate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDFX_CACHE_DIR", str(tmp_path))
    measured = importlib.import_module("tdfx.cost.measured")
    before, times = dict(measured._known), dict[str, float]()
    with tool("bench_common").separate_times(times):
        tdfx.plan(tiny(), tdfx.Policy(rank=tdfx.Ratio(of=0.25)), example_inputs=(torch.rand(2, 3, 8, 8),))
    assert times
    assert measured._known == before
    assert not any(tmp_path.iterdir())


def test_results_are_written_with_the_command_and_the_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(TOOLS / "bench_step.py"), "--json", str(tmp_path / "out.json")])
    tool("bench_common").write_results(tmp_path / "out.json", [1.5], seeds=3)
    tool("bench_common").write_results(None, [1.5])
    (file,) = tmp_path.iterdir()
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["command"] == "python tools/bench_step.py --json out.json"
    assert (written["results"], written["seeds"], written["versions"]["torch"]) == ([1.5], 3, torch.__version__)
    assert str(tmp_path) not in file.read_text(encoding="utf-8")


def test_the_command_that_is_written_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench_common, config = tool("bench_common"), tmp_path / "own.toml"
    config.write_text("", encoding="utf-8")
    for arguments, expected in (
        (["configs/text.toml", "--json", "run.json"], "tools/configs/text.toml --json run.json"),
        ([str(TOOLS / "configs" / "text.toml"), "--set", "lr=0.1"], "tools/configs/text.toml --set lr=0.1"),
        ([str(config), f"--json={config}", "--plot", str(config)], f"{config} --json=own.toml --plot own.toml"),
        (["--set", "output.checkpoint=/no/such/run.ckpt"], "--set output.checkpoint=run.ckpt"),
    ):
        monkeypatch.chdir(TOOLS)
        assert bench_common.command(["train.py", *arguments]) == f"python tools/train.py {expected}"


# Steps.


def test_a_step_is_timed_and_predicted(tmp_path: Path) -> None:
    run("bench_step", "--nets=tiny", "--batch=8", "--rounds=1", "--policy=ratio:0.125", f"--json={tmp_path / 'out'}")
    (row,) = json.loads((tmp_path / "out").read_text(encoding="utf-8"))["results"]
    assert row["faster"] == pytest.approx(row["dense_ms"] / row["tdfx_ms"])
    assert row["off"] == pytest.approx(row["faster"] / row["predicted"] - 1)
    assert (row["net"], row["batch"], row["policy"], row["sites"]) == ("tiny", 8, "ratio:0.125", 3)
    assert row["factorized"] > 0


def test_a_budget_is_compared_with_uniform_ranks_of_equal_time(tmp_path: Path) -> None:
    run("bench_step", "--nets=tiny", "--batch=16", "--rounds=1", "--speedup=1.3", f"--json={tmp_path / 'out'}")
    budget, uniform = json.loads((tmp_path / "out").read_text(encoding="utf-8"))["results"]
    assert (budget["policy"], uniform["policy"].startswith("Ratio(of=")) == ("speedup=1.3", True)
    assert budget["total_error"] > 0
    assert uniform["factorized"] > 0


@pytest.mark.parametrize(("second", "code"), [(0.99, 0), (0.97, 1)])
def test_a_step_counts_as_slower_after_two_measurements(
    second: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, speeds = tool("bench_step"), iter([0.9, second])
    monkeypatch.setattr(bench, "classifiers", lambda most: (["tiny"], ["giant"]))
    monkeypatch.setattr(bench.StepBenchmark, "check", lambda *_: StepCheck(
        seconds_before=next(speeds), seconds_after=1.0, seconds_predicted=1.0))  # fmt: skip
    output = run("bench_step", "--never-slower", code=code)
    assert ("slower: tiny" in output) == (code == 1)
    assert "left out for their size: giant" in output
    assert next(speeds, None) is None


def test_a_network_that_fails_is_named() -> None:
    output = run("bench_step", "--nets=tiny", "--batch=2", "--rounds=1", "--speedup=50", code=1)
    assert "failed: tiny: PolicyError: Budget(speedup=50.0) cannot be kept" in output


def test_classifiers_are_all_but_the_large_ones() -> None:
    names, large = tool("bench_step").classifiers(2e6)
    assert "squeezenet1_0" in names
    assert "resnet18" in large
    assert not {"fasterrcnn_resnet50_fpn", "raft_small", "r3d_18"} & {*names, *large}


# Costs.


def timed(model: tdfx.Modelled) -> list[Any]:
    """Return the measurements of a machine whose times are exactly as modelled."""
    bench = tool("bench_cost")
    net = tool("bench_nets").BenchmarkNet(
        name="tiny", model=tiny(), x=torch.rand(8, 3, 8, 8), layout="default", autocast=None
    )
    chains = []
    for site in bench.sites_of(net):
        (_, (dense,)), *others = bench.chains_of(site)
        chains += [
            bench.TimedChain("tiny", name, dense, case, model.seconds(*dense), model.seconds(*case))
            for name, (case,) in others
        ]
    return chains


SLOW = tdfx.Modelled(flops_per_second=3e10, bytes_per_second=5e9, seconds_per_call=2e-5)


def test_a_model_does_not_deviate_from_itself_in_another_scale() -> None:
    scaled = tdfx.Modelled(flops_per_second=6e10, bytes_per_second=1e10, seconds_per_call=1e-5)
    deviation = tool("bench_cost").deviation("tiny", "scaled", scaled, timed(SLOW))
    assert deviation.times == pytest.approx((1.0, 1.0))
    assert deviation.gains == pytest.approx((1.0, 1.0))
    assert deviation.otherwise == 0.0


def test_a_model_without_arithmetic_deviates_a_lot() -> None:
    wrong = tdfx.Modelled(flops_per_second=1e15, bytes_per_second=1e15, seconds_per_call=1e-4)
    deviation = tool("bench_cost").deviation("tiny", "wrong", wrong, timed(SLOW))
    # Only the number of operations counts in this model, so it never sees a gain.
    gains = [
        chain.gain * (1 if "/" not in chain.name and len(chain.case[0]) == 1 else len(chain.case[0]))
        for chain in timed(SLOW)
    ]
    median = float(torch.tensor(gains).log().abs().quantile(0.5))
    assert math.log(deviation.gains[0]) == pytest.approx(median, rel=1e-2)
    assert deviation.otherwise == pytest.approx(sum(chain.gain >= 1.05 for chain in timed(SLOW)) / len(gains))
    assert deviation.otherwise > 0.2


def test_the_fit_recovers_the_numbers_of_the_model() -> None:
    model = tool("bench_cost").fitted(timed(SLOW))
    assert model.flops_per_second == pytest.approx(SLOW.flops_per_second, rel=0.02)
    assert model.bytes_per_second == pytest.approx(SLOW.bytes_per_second, rel=0.02)
    assert model.seconds_per_call == pytest.approx(SLOW.seconds_per_call, rel=0.02)


def test_layers_are_timed_dense_and_factorized(tmp_path: Path) -> None:
    files = tmp_path / "deviations", tmp_path / "times"
    run("bench_cost", "--nets=tiny", "--batch=2", "--rounds=1", f"--json={files[0]}", f"--times={files[1]}")
    deviations, times = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    assert {row["net"] for row in deviations["results"]} == {"tiny", "all"}
    assert set(deviations["models"]) == {"Modelled()", "of_machine", "fitted"}
    for chain in times["results"]:
        assert chain["seconds"] > 0
        assert len(chain["chain"]) in (2, 3)


# Switches.


@pytest.mark.skipif(not (TOOLS.parent / "tdfx").is_dir(), reason="there is no checkout to compare with")
def test_a_switch_is_timed_in_turns_with_that_of_another_checkout(tmp_path: Path) -> None:
    file = tmp_path / "out"
    options = [f"--against={TOOLS.parent}", "--net=tiny", "--batch=2", "--repeats=2", f"--json={file}"]
    output = run("bench_planning", *options)
    assert "this / against" in output
    written = json.loads(file.read_text(encoding="utf-8"))
    this, other = written["results"]
    assert (this["version"], other["version"]) == ("this", "against")
    for row in (this, other):
        assert len(row["switches"]) == 2
        assert row["planning"] > 0
        assert row["both"] == pytest.approx(row["planning"] + row["rewriting"])
    assert written["ratios"]["both"] == pytest.approx(this["both"] / other["both"])


def test_a_checkout_whose_tdfx_is_not_imported_is_refused(tmp_path: Path) -> None:
    settings = {"net": "tiny", "batch": 2, "total_steps": 10, "cpu_time": True, "threads": 1}
    with pytest.raises(ClickException, match="first on its path imported tdfx from"):
        tool("bench_planning").measure({"against": tmp_path}, 1, settings)


# The study of the default.


@pytest.fixture(scope="module")
def task(_tools: None) -> Any:
    class Tiny(tool("study_tasks").Vgg):  # type: ignore[misc]
        name, steps = "tiny", 10

        def model(self) -> nn.Module:
            return build_model(16)

    return Tiny()


class Settings:
    """Settings of a policy, with a switch after the second step, however little it saves."""

    name, tail, carry_state = "low", None, None

    def __init__(self, policy: tdfx.Policy) -> None:
        self.policy = policy

    def switch(self, steps: int, clock: Any) -> tdfx.Switch:
        return tdfx.Switch(self.policy, when=tdfx.AtStep(2), clock=clock)

    def constants(self) -> Any:
        return nullcontext()


def study_run(task: Any, policy: tdfx.Policy, times: dict[str, float] | None = None) -> Any:
    """Train for 10 steps with a policy."""
    return tool("study_runs").train_with(
        Settings(policy), task, 0, 10, time.process_time, {} if times is None else times
    )


@pytest.fixture(scope="module")
def dense(task: Any) -> Any:
    return tool("study_runs").train(task, "dense", 0, 10, time.process_time)


def test_a_run_with_nothing_rewritten_is_the_dense_run(task: Any, dense: Any) -> None:
    unchanged = study_run(task, tdfx.Policy(exclude=("*",)))
    assert (unchanged.accuracy, unchanged.loss) == (dense.accuracy, dense.loss)
    assert (unchanged.factorized, unchanged.error, unchanged.cold) == (0, 0.0, False)


def test_a_run_with_low_ranks_differs(task: Any, dense: Any) -> None:
    # The policy asks for some gain, so that layers are measured, and any gain is enough.
    times, policy = dict[str, float](), tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0.01)
    low = study_run(task, policy, times)
    assert low.loss != dense.loss
    assert (low.factorized, low.error > 0, low.refused, low.at) == (7, True, "", 2)
    assert low.seconds > low.switching > 0
    assert low.cold
    assert times
    assert not study_run(task, policy, times).cold


def test_a_refused_policy_is_recorded(task: Any) -> None:
    assert "cannot be kept" in study_run(task, tdfx.Policy(speedup=1000.0)).refused
    assert tool("study_default").read_runs(None) == []


def test_a_shorter_dense_run_has_the_whole_schedule(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(type(task), "take_step", lambda self, model, optimizer, batch, share: shares.append(share))
    tool("study_runs").train(task, "dense, 40 %", 0, 4, time.process_time)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_every_run_has_its_control_and_runs_in_a_file_are_not_repeated(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, settings = tool("study_default"), [Settings(tdfx.Policy(exclude=("*",)))]
    monkeypatch.setattr(tools, "control_of", lambda run, full: ("dense, 40 %", 4))

    def missing(done: Any = ()) -> list[Any]:
        return list(tools.runs_of([task], settings, 1, 1.0, time.process_time, done))

    runs = missing()
    assert [(run.policy, run.steps) for run in runs] == [("dense", 10), ("low", 10), ("dense, 40 %", 4)]
    file = tmp_path / "out.json"
    tool("bench_common").write_results(file, [tools.asdict(run) for run in runs])
    read = tools.read_runs(file)
    assert read == runs
    assert missing(read) == []
    again, control = missing(read[:1])
    assert (again.policy, again.loss) == ("low", runs[1].loss)
    assert (control.policy, control.loss) == ("dense, 40 %", runs[2].loss)
    for table in (tools.table_of("tiny", runs), tools.summary(runs)):
        assert all(column.header for column in table.columns)


def test_the_summary_compares_with_the_full_runs_and_the_controls() -> None:
    new, runs = tool("study_runs").StudyRun, []
    for task, seconds, control, accuracy in (("first", 4.1, "dense, 45 %", 97.0), ("second", 1.0, "dense, 10 %", 98.5)):
        runs += [
            new(task=task, policy="dense", seed=0, accuracy=98.0, loss=1.0, steps=100, seconds=10.0),
            new(task=task, policy="p", seed=0, accuracy=accuracy, loss=1.1, seconds=seconds, cold=task == "first"),
            new(task=task, policy=control, seed=0, accuracy=96.0, loss=1.2, steps=45, seconds=4.5),
            new(task=task, policy="none", seed=0, refused="cannot be kept"),
        ]
    (row,) = zip(*(column.cells for column in tool("study_default").summary(runs).columns), strict=True)
    assert row == ("p", "10.00", "2.44", "-0.25", "+0.1000", "-1.00", "+1.75", "-0.1000", "2")
    table = tool("study_default").table_of("first", runs[:4])
    assert list(table.columns[0].cells) == ["dense", "p", "dense, 45 %", "none"]
    assert list(table.columns[1].cells) == ["98.00", "97.00", "96.00", "refused"]
    assert tool("study_runs").control_of(replace(runs[1], seconds=12.0), runs[0]) == ("dense", 100)


def test_text_is_held_out_and_labels_are_the_next_bytes() -> None:
    task = tool("study_tasks").Characters()
    x, y = next(task.data(0))
    assert (x.shape, y.shape) == ((8, 64), (8, 64))
    assert torch.equal(x[:, 1:], y[:, :-1])
    train, test = (bytes(part.tolist()) for part in task.text)
    assert not any(test[start : start + 1000] in train for start in range(0, len(test) - 1000, 5000))


def test_every_candidate_has_its_own_name() -> None:
    study, settings = tool("study_default"), tool("study_runs").StudySettings
    chosen = study.settings_named((), ())
    assert len(chosen) == len({each.name for each in chosen}) == len(study.CANDIDATES)
    assert chosen[0] == settings()
    assert chosen[0].policy() == tdfx.Policy()
    assert [each.name for each in study.settings_named(("floor=0.4",), ("flops=0.3 moment=0.02",))] == [
        "floor=0.4",
        "flops=0.3 moment=0.02",
    ]
    assert study.settings_named((), ("collect=4",)) == [settings(collect=4)]
    assert study.settings_named(("speedup=4",), ()) == [settings(speedup=4)]


def test_settings_become_a_policy_and_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    study_runs, default = tool("study_runs"), tdfx.Policy().rank
    assert isinstance(default, tdfx.Budget)
    parse, passed = study_runs.StudySettings.parse, list[dict[str, Any]]()
    assert parse("speedup=3 floor=0.2").policy().rank == replace(default, speedup=3.0, floor=0.2, noise_floor=0.2)
    assert parse("flops=0.25").policy().rank == replace(default, speedup=None, flops=0.25)
    monkeypatch.setattr(tdfx, "Switch", lambda policy, **options: passed.append(options))
    for name in ("default", "moment=0.05 collect=4"):
        parse(name).switch(200, time.process_time)
    common = {"total_steps": 200, "clock": time.process_time}
    assert passed == [common, {**common, "when": tdfx.AtStep(10), "collect": 4}]
    monkeypatch.setattr(study_runs, "DAMPING", "study_runs.PERCENT")
    with parse("damping=0.1").constants():
        assert study_runs.PERCENT == 0.1
    assert study_runs.PERCENT == 5


@pytest.mark.parametrize("added", ["speed=3", "speedup", "speedup=fast"])
def test_a_wrong_setting_of_the_study_is_named(added: str) -> None:
    result = CliRunner().invoke(tool("study_default").main, ["--add", added])
    assert result.exit_code == 2
    assert f"'{added}'" in result.output
    assert "Write for example 'speedup=3 moment=0.05'" in " ".join(result.output.replace("│", " ").split())


# First factors side by side, and the profile of a step.


@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12)])
def test_first_factors_side_by_side_compute_what_each_computes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(12, out, bias=out > 8) for out in (8, 12, 16)).double()
    siblings = tool("bench_siblings")
    factorized = siblings.factorized(layers, tdfx.Fixed(ranks={"0": 3, "*": 5}))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs = [siblings.project(x, list(factorized), joined) for joined in (False, True)]
    weights = [x, *factorized.parameters()]
    assert [tuple(layer.factors[0].weight.shape) for layer in factorized] == [(3, 12), (5, 12), (5, 12)]
    alone, joined = ([*out, *torch.autograd.grad(sum(each.pow(2).sum() for each in out), weights)] for out in outputs)
    torch.testing.assert_close(joined, alone)


def test_a_profile_counts_the_products_of_a_step_forward_and_backward() -> None:
    profile = tool("profile_step").profile_step(tiny(), torch.randn(2, 3, 8, 8), 1, time.process_time)
    first, second, head = 2 * 2 * 64 * 3 * 9 * 64, 2 * 2 * 64 * 64 * 9 * 64, 2 * 2 * 4096 * 10
    # Nobody asks for the gradient of the images.
    counts = {"1x1 convolutions": 0, "other convolutions": 2 * first + 3 * second, "matrix products": 3 * head}
    assert profile.flops == counts
    assert profile.in_products > 0
    assert profile.parts["optimizer"] > 0
    assert profile.parts["batch norm"] == 0


def test_the_limit_of_a_step_is_its_products_at_a_higher_rate() -> None:
    profiles = tool("profile_step")
    dense = profiles.Profile(whole=10.0)
    factorized = profiles.Profile(whole=5.0, flops=dict.fromkeys(profiles.PRODUCTS, 4.0))
    factorized.parts |= dict.fromkeys(profiles.PRODUCTS, 1.0)
    assert profiles.limit(dense, factorized, 6.0) == 10 / (2 + 12 / 6)
    assert profiles.limit(dense, factorized, 1.0) == 2.0  # faster already than the large matrices


def test_the_profile_prints_a_table_for_each_network() -> None:
    printed = run("profile_step", "--nets", "tiny", "--batch", "2", "--rounds", "1")
    assert [line.split("  ")[0].strip() for line in printed.splitlines()[:2]] == ["tiny", "other convolutions"]
    assert "whole step" in printed
    assert re.search(r"batch 2: [\d.]+x faster; [\d.]+x with products as fast as the dense ones", printed)
