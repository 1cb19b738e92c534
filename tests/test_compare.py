"""The comparison with other packages, on a task that takes no time."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import TOOLS, needs, tool
from click.testing import CliRunner
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

pytestmark = [needs("compare.py"), pytest.mark.usefixtures("same_clock")]


@pytest.fixture(scope="module", autouse=True)
def _tools() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool("compare"), "TASKS", (tiny_task(),))
        patch.setattr(tool("compare"), "stream_rate", lambda **settings: None)
        yield


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(256, 8)
    )


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(8, (8,), generator=generator)


def tiny_task() -> Any:
    """Return the class of a task with a tiny network."""

    class Tiny(tool("study_tasks").StudyTask):  # type: ignore[misc]
        name, steps, peak = "tiny", 20, 0.1

        def model(self) -> nn.Module:
            return net()

        def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
            return SGD(parameters, lr=0.1, momentum=0.9)

        def data(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                yield batch(seed)

        def held_out(self) -> tuple[Tensor, Tensor]:
            return batch(7)

    return Tiny


def method(name: str, apply: Any = None, **settings: Any) -> Any:
    """Return the method of a name, or a new one."""
    methods = {method.name: method for method in tool("compare_methods").all_methods(Path())}
    return methods.get(name) or tool("compare_methods").Method(name=name, apply=apply, **settings)


def results_of(*methods: Any, steps: int = 20) -> dict[str, Any]:
    clock = tool("bench_common").set_clock(True, 1)
    study = tool("compare_runs").MethodStudy(tiny_task()(), 0, steps, clock)
    return {result.method: result for result in study.results(methods, 0.25, dense=True)}


@pytest.mark.parametrize("name", ["compare", "compare_methods", "compare_runs"])
def test_its_examples_run(name: str) -> None:
    assert doctest.testmod(tool(name)).failed == 0


@pytest.mark.parametrize(("share", "same"), [(1.0, True), (0.25, False)])
def test_the_factorization_by_hand_is_exact_at_full_rank_alone(share: float, same: bool) -> None:
    model, (x, y) = net().double(), batch(0)
    before = model(x.double())
    rewritten, optimizer = method("TensorLy by hand").apply(model, SGD(model.parameters(), lr=0.1), share, (x, y))
    assert optimizer is None
    assert sum(isinstance(module, nn.Sequential) for module in rewritten.modules()) == 4
    assert torch.allclose(rewritten(x.double()), before, rtol=1e-10, atol=1e-12) == same


def test_the_ranks_for_the_papers_code_come_in_its_order() -> None:
    """The first convolution of a block has one rank, the others two; a block does not know the convolutions of another."""
    inner = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(4, 4))
    model = nn.Sequential(nn.Conv2d(4, 8, 3), inner, nn.Conv2d(32, 64, 3))
    assert tool("compare_methods")._conv_ranks(model, 0.25) == [2, 4, 2, 8, 4, 16, 8]


def test_every_method_is_timed_and_trained_from_the_same_state() -> None:
    results = results_of(method("tdfx, same ranks"), method("TensorLy by hand"))
    assert {name: result.failed for name, result in results.items()} == dict.fromkeys(
        ("dense", "tdfx, same ranks", "TensorLy by hand"), ""
    )
    tdfx_result, by_hand = results["tdfx, same ranks"], results["TensorLy by hand"]
    assert (tdfx_result.optimizer, by_hand.optimizer) == ("carried", "new, state lost")
    assert tdfx_result.parameters == by_hand.parameters < 0.6
    assert tdfx_result.error == pytest.approx(by_hand.error, rel=0.2)
    assert results["dense"].error == 0
    assert all(result.loss > 0 and result.step > 0 for result in results.values())


def test_an_optimizer_with_state_for_some_parameters_is_reported() -> None:
    def apply(model: nn.Module, optimizer: Optimizer, share: float, given: Any) -> Any:
        layer = nn.Linear(256, 8)
        optimizer.param_groups[0]["params"] += list(layer.parameters())
        return nn.Sequential(*list(model.children())[:-1], layer), optimizer

    with_state = sum(parameter.numel() for parameter in list(net().parameters())[:-2])
    share = with_state / (with_state + 256 * 8 + 8)
    assert results_of(method("partial", apply))["partial"].optimizer == f"goes on, state of {share:.0%}"


def test_a_method_that_fails_is_reported_and_stops_no_other() -> None:
    def bad(*arguments: Any) -> Any:
        raise RuntimeError("no\nreason")

    def later(model: nn.Module, optimizer: Optimizer, share: float, given: Any) -> Any:
        return nn.Sequential(model, nn.Linear(9, 8)), None

    results = results_of(method("bad", bad), method("later", later), method("tdfx, same ranks"))
    assert results["bad"].failed == "RuntimeError: no"
    assert results["later"].failed.startswith("RuntimeError: mat1 and mat2")
    assert results["tdfx, same ranks"].failed == ""


def test_a_method_that_is_too_slow_is_not_trained_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool("compare_runs"), "SLOWEST", 0.0)
    result = results_of(method("tdfx, same ranks"))["tdfx, same ranks"]
    assert result.failed.startswith("its step takes")
    assert result.step > 0


def test_the_program_prints_and_writes_a_table(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    compare = tool("compare")
    options = [
        "--method",
        "TensorLy by hand",
        "--method",
        "Composer",
        "--seeds",
        "2",
        "--cpu-time",
        "--json",
        str(file),
    ]
    result = CliRunner().invoke(compare.main, options)
    assert result.exit_code == 0, result.output
    if importlib.util.find_spec("composer") is None:
        assert re.search(r"Composer +failed: composer is not", result.stdout)
    written = json.loads(file.read_text(encoding="utf-8"))
    assert [(values["method"], values["seed"]) for values in written["results"]][:4] == [
        ("dense", 0), ("TensorLy by hand", 0), ("dense", 1), ("TensorLy by hand", 1)
    ]  # fmt: skip
    assert written["share"] == 0.25
    again = CliRunner().invoke(compare.main, ["--table", str(file)])
    assert again.stdout == result.stdout
    fewer = [values for values in written["results"] if values["method"] != "TensorLy by hand" or values["seed"] == 0]
    file.write_text(json.dumps({"results": fewer}), encoding="utf-8")
    result = CliRunner().invoke(compare.main, options)
    assert result.stderr.count("done") == 1
    assert {row.method for row in compare.read(file) if row.seed == 1} == {"dense", "TensorLy by hand"}


def test_rows_are_medians_and_the_fastest_come_first() -> None:
    new = tool("compare_runs").MethodResult
    rows = [
        new(task="t", method="dense", seed=0, torch=torch.__version__),
        *(new(task="t", method="slow", seed=seed, torch=torch.__version__, step=step, accuracy=90.0 + seed)
          for seed, step in enumerate((0.5, 0.8, 1.0))),
        new(task="t", method="failed", seed=0, torch=torch.__version__, failed="E: why"),
        new(task="t", method="fast", seed=0, torch="1.0+cu", step=0.25),
    ]  # fmt: skip
    lines = [re.split(r" {2,}", line.strip()) for line in tool("compare").report(rows).splitlines()]
    assert [line[:2] for line in lines[1:-1]] == [["dense", "1"], ["fast (torch 1.0)", "1"], ["slow", "3"]]
    assert [line[2] for line in lines[1:-1]] == ["1.00", "4.00", "1.25"]
    assert lines[3][6] == "91.00"
    assert lines[-1] == ["failed failed: E: why"]


def test_a_package_that_cannot_be_installed_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = tool("compare")
    monkeypatch.setattr(compare, "install", lambda method, environment: "error: no such thing")
    nothing = method("nothing", module="nothing_at_all")
    results = compare.run_in_environment(nothing, tmp_path, [tiny_task()()], [])
    assert [result.failed for result in results] == ["cannot be installed: error: no such thing"]


def test_the_readmes_table_is_that_of_the_results() -> None:
    readme, file = TOOLS / "README.md", TOOLS / "results" / "compare.json"
    block = re.search(
        r"<!-- python tools/compare.py --table .*?-->\n```\n(.*?)\n```", readme.read_text("utf-8"), re.DOTALL
    )
    assert block is not None
    assert block.group(1) == tool("compare").report(tool("compare").read(file))
