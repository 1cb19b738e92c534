"""The comparison with what others offer, on a task that takes no time."""

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
        patch.setattr(tool("compare"), "TASKS", (task(),))
        patch.setattr(tool("compare"), "stream_rate", lambda **settings: None)
        yield


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(256, 8)
    )


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(8, (8,), generator=generator)


def task() -> Any:
    """Return a task of a tiny network."""

    class Tiny(tool("study_tasks").Task):  # type: ignore[misc]
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
    found = [one for one in tool("compare_methods").methods(Path()) if one.name == name]
    return found[0] if found else tool("compare_methods").Method(name=name, apply=apply, **settings)


def outcomes(*methods: Any, steps: int = 20) -> dict[str, Any]:
    clock = tool("bench_common").set_clock(True, 1)
    study = tool("compare_runs").Comparison(task()(), 0, steps, clock)
    return {one.method: one for one in study.outcomes(methods, 0.25, dense=True)}


@pytest.mark.parametrize("name", ["compare", "compare_methods", "compare_runs"])
def test_its_examples_run(name: str) -> None:
    assert doctest.testmod(tool(name)).failed == 0


@pytest.mark.parametrize(("share", "same"), [(1.0, True), (0.25, False)])
def test_what_is_made_by_hand_is_the_same_at_full_rank_alone(share: float, same: bool) -> None:
    model, (x, y) = net().double(), batch(0)
    before = model(x.double())
    made, optimizer = method("TensorLy by hand").apply(model, SGD(model.parameters(), lr=0.1), share, (x, y))
    assert optimizer is None
    assert sum(isinstance(one, nn.Sequential) for one in made.modules()) == 4
    assert torch.allclose(made(x.double()), before, rtol=1e-10, atol=1e-12) == same


def test_the_ranks_for_the_papers_code_come_in_its_order() -> None:
    """One for the first convolution of a block, two for the others; a block does not see what came in another."""
    inner = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(4, 4))
    model = nn.Sequential(nn.Conv2d(4, 8, 3), inner, nn.Conv2d(32, 64, 3))
    assert tool("compare_methods")._conv_ranks(model, 0.25) == [2, 4, 2, 8, 4, 16, 8]


def test_every_method_is_timed_and_trained_from_the_same_moment() -> None:
    found = outcomes(method("tdfx, same ranks"), method("TensorLy by hand"))
    assert {name: one.failed for name, one in found.items()} == dict.fromkeys(
        ("dense", "tdfx, same ranks", "TensorLy by hand"), ""
    )
    own, hand = found["tdfx, same ranks"], found["TensorLy by hand"]
    assert (own.optimizer, hand.optimizer) == ("carried", "new, state lost")
    assert own.parameters == hand.parameters < 0.6
    assert own.error == pytest.approx(hand.error, rel=0.2)
    assert found["dense"].error == 0
    assert all(one.loss > 0 and one.step > 0 for one in found.values())


def test_an_optimizer_that_knows_some_of_the_parameters_is_seen() -> None:
    def apply(model: nn.Module, optimizer: Optimizer, share: float, given: Any) -> Any:
        layer = nn.Linear(256, 8)
        optimizer.param_groups[0]["params"] += list(layer.parameters())
        return nn.Sequential(*list(model.children())[:-1], layer), optimizer

    known = sum(one.numel() for one in list(net().parameters())[:-2])
    share = known / (known + 256 * 8 + 8)
    assert outcomes(method("partial", apply))["partial"].optimizer == f"goes on, state of {share:.0%}"


def test_what_fails_is_told_and_stops_nobody_else() -> None:
    def bad(*arguments: Any) -> Any:
        raise RuntimeError("no\nreason")

    def later(model: nn.Module, optimizer: Optimizer, share: float, given: Any) -> Any:
        return nn.Sequential(model, nn.Linear(9, 8)), None

    found = outcomes(method("bad", bad), method("later", later), method("tdfx, same ranks"))
    assert found["bad"].failed == "RuntimeError: no"
    assert found["later"].failed.startswith("RuntimeError: mat1 and mat2")
    assert found["tdfx, same ranks"].failed == ""


def test_what_is_too_slow_is_not_trained_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool("compare_runs"), "SLOWEST", 0.0)
    found = outcomes(method("tdfx, same ranks"))["tdfx, same ranks"]
    assert found.failed.startswith("its step takes")
    assert found.step > 0


def test_the_program_prints_and_keeps_a_table(tmp_path: Path) -> None:
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
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert [(one["method"], one["seed"]) for one in kept["results"]][:4] == [
        ("dense", 0), ("TensorLy by hand", 0), ("dense", 1), ("TensorLy by hand", 1)
    ]  # fmt: skip
    assert kept["share"] == 0.25
    again = CliRunner().invoke(compare.main, ["--table", str(file)])
    assert again.stdout == result.stdout
    fewer = [one for one in kept["results"] if one["method"] != "TensorLy by hand" or one["seed"] == 0]
    file.write_text(json.dumps({"results": fewer}), encoding="utf-8")
    result = CliRunner().invoke(compare.main, options)
    assert result.stderr.count("done") == 1
    assert {one.method for one in compare.read(file) if one.seed == 1} == {"dense", "TensorLy by hand"}


def test_rows_are_medians_and_the_fastest_come_first() -> None:
    made = tool("compare_runs").Outcome
    rows = [
        made(task="t", method="dense", seed=0, torch=torch.__version__),
        *(made(task="t", method="slow", seed=seed, torch=torch.__version__, step=step, accuracy=90.0 + seed)
          for seed, step in enumerate((0.5, 0.8, 1.0))),
        made(task="t", method="failed", seed=0, torch=torch.__version__, failed="E: why"),
        made(task="t", method="fast", seed=0, torch="1.0+cu", step=0.25),
    ]  # fmt: skip
    lines = [re.split(r" {2,}", line.strip()) for line in tool("compare").report(rows).splitlines()]
    assert [line[:2] for line in lines[1:-1]] == [["dense", "1"], ["fast (torch 1.0)", "1"], ["slow", "3"]]
    assert [line[2] for line in lines[1:-1]] == ["1.00", "4.00", "1.25"]
    assert lines[3][6] == "91.00"
    assert lines[-1] == ["failed failed: E: why"]


def test_a_package_that_cannot_be_installed_is_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = tool("compare")
    monkeypatch.setattr(compare, "install", lambda method, environment: "error: no such thing")
    found = compare.elsewhere(method("nothing", module="nothing_at_all"), tmp_path, [task()()], [])
    assert [one.failed for one in found] == ["cannot be installed: error: no such thing"]


def test_the_readmes_table_is_that_of_the_results() -> None:
    readme, file = TOOLS / "README.md", TOOLS / "results" / "compare.json"
    block = re.search(
        r"<!-- python tools/compare.py --table .*?-->\n```\n(.*?)\n```", readme.read_text("utf-8"), re.DOTALL
    )
    assert block is not None
    assert block.group(1) == tool("compare").report(tool("compare").read(file))
