"""The benchmarks of steps, costs, switches and default policies, on networks that take no time."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import TOOLS, needs, tool
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


@pytest.mark.parametrize("name", ["bench_common", "bench_cost", "bench_planning", "study_data", "study_default"])
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
    output = run("bench_planning", f"--against={tmp_path}", "--net=tiny", "--batch=2", "--repeats=1", code=1)
    assert "first on its path imported tdfx from" in output


# The study of default policies.


@pytest.fixture(scope="module")
def study(_tools: None) -> Any:
    class Tiny(tool("study_tasks").Vgg):  # type: ignore[misc]
        name, steps = "tiny", 10

        def model(self) -> nn.Module:
            return build_model(16)

    return tool("study_runs").Study(Tiny(), 0, 10, time.process_time)


@pytest.fixture(scope="module")
def dense(study: Any) -> Any:
    return study.dense()


def test_a_run_with_nothing_rewritten_is_the_dense_run(study: Any, dense: Any) -> None:
    unchanged = study.with_policy("none", tdfx.Policy(exclude=("*",)), {})
    assert (unchanged.accuracy, unchanged.loss) == (dense.accuracy, dense.loss)
    assert (unchanged.factorized, unchanged.error) == (0, 0.0)


def test_a_run_with_low_ranks_differs(study: Any, dense: Any) -> None:
    # The policy asks for some gain, so that layers are measured, and any gain is enough.
    times, policy = dict[str, float](), tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0.01)
    low = study.with_policy("low", policy, times)
    assert low.loss != dense.loss
    assert (low.factorized, low.error > 0, low.refused) == (7, True, "")
    assert low.first_plan > 0
    assert times
    assert study.with_policy("low", policy, times).first_plan == 0.0


def test_a_refused_policy_is_recorded(study: Any, dense: Any) -> None:
    refused = study.with_policy("fast", tdfx.Policy(speedup=1000.0), {})
    assert "cannot be kept" in refused.refused
    assert tool("study_default").read_runs(None) == []


def test_the_time_of_a_run_is_that_of_its_parts(dense: Any) -> None:
    low = replace(dense, dense_seconds=10.0, step=0.5, first_plan=4.0, plan=1.0, rewrite=0.5, merge=0.5)
    assert low.faster(measuring=False) == pytest.approx(10 / (2 + 4 + 1 + 0.5 + 0.5))
    assert low.faster(measuring=True) == pytest.approx(10 / (2 + 4 + 4 + 0.5 + 0.5))
    assert replace(low, first_plan=0.0).faster(measuring=True) == low.faster(measuring=False)


def test_runs_in_a_file_are_not_repeated(study: Any, dense: Any, tmp_path: Path) -> None:
    tools, policies = tool("study_default"), {"none": tdfx.Policy(exclude=("*",))}
    runs = list(tools.runs_of([study.task], policies, 1, 1.0, time.process_time))
    assert [run.policy for run in runs] == ["dense", "none"]
    file = tmp_path / "out.json"
    tool("bench_common").write_results(file, [tools.asdict(run) for run in runs])
    read = tuple(tools.read_runs(file))
    assert read == tuple(runs)
    assert list(tools.runs_of([study.task], policies, 1, 1.0, time.process_time, read)) == []
    (missing,) = tools.runs_of([study.task], policies, 1, 1.0, time.process_time, read[:1])
    assert (missing.policy, missing.loss) == ("none", runs[1].loss)


def test_the_summary_has_the_worst_task_and_the_mean_speed(dense: Any) -> None:
    runs = []
    for task, step, accuracy in (("first", 0.5, 97.0), ("second", 0.125, 98.5)):
        full = replace(dense, task=task, accuracy=98.0, loss=1.0, dense_seconds=1.0)
        runs += [full, replace(full, policy="p", accuracy=accuracy, loss=1.1, step=step)]
    for table in (tool("study_default").summary(runs), tool("study_default").table_of("first", runs)):
        assert all(column.header for column in table.columns)
    (row,) = zip(*(column.cells for column in tool("study_default").summary(runs).columns), strict=True)
    assert row[:4] == ("p", "+1.00", "+0.100", "4.00")


def test_text_is_held_out_and_labels_are_the_next_bytes() -> None:
    task = tool("study_tasks").Characters()
    x, y = next(task.data(0))
    assert (x.shape, y.shape) == ((8, 64), (8, 64))
    assert torch.equal(x[:, 1:], y[:, :-1])
    train, test = (bytes(part.tolist()) for part in task.text)
    assert not any(test[start : start + 1000] in train for start in range(0, len(test) - 1000, 5000))


def test_every_candidate_has_its_own_name() -> None:
    candidates = tool("study_default").candidates()
    assert len(candidates) == 17
    assert tdfx.Policy() in candidates.values()
