"""The paper's table: rows in turns, figures calculated from given records, and the README's block."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import TOOLS, needs
from click.testing import CliRunner
from recipe_runs import config_of, tool

README = TOOLS / "README.md"
pytestmark = needs("paper_table.py")


def row(policy: str, seed: int, seconds: float, accuracies: list[float], **changes: Any) -> Any:
    """Return a row of a run whose epochs all took the same time."""
    epochs = [
        {"epoch": index + 1, "accuracy": accuracy, "seconds": seconds * (index + 1) / len(accuracies)}
        for index, accuracy in enumerate(accuracies)
    ]
    phases = dict.fromkeys(tool("recipe.phases").PHASES, 0.0)
    record = tool("recipe.record").RunRecord(
        config={"name": "tiny", "training": {"epochs": len(accuracies)}},
        processes=1,
        device="cpu",
        epochs=epochs,
        accuracy=accuracies[-1],
        loss=1.0,
        seconds={**phases, "step": seconds - 1.0, "planning": 1.0, "evaluation": 50.0, "saving": 50.0},
        parameters=100,
        parameters_after=100 if policy == "full" else 40,
        flops=None if policy == "full" else 1000,
        flops_after=None if policy == "full" else 250,
        sites=5,
        factorized=[] if policy == "full" else [{}] * 3,
    )
    return tool("recipe.rows").PaperRow(
        **{"run": "tiny", "policy": policy, "seed": seed, "cold": False, "record": record, **changes}
    )


def cells(rows: list[Any]) -> list[tuple[str, ...]]:
    table = tool("recipe.table").table_of(rows)
    return [tuple(str(cell) for cell in line) for line in zip(*(column.cells for column in table.columns), strict=True)]


def test_figures_are_those_of_the_records() -> None:
    rows = [
        row("full", 0, 8.0, [50.0, 98.0]),
        row("full", 1, 8.0, [97.9, 98.0]),
        row("fast", 0, 4.0, [97.0, 98.0], cold=True),
        row("fast", 1, 2.0, [50.0, 97.0]),
    ]
    full, fast = cells(rows)
    assert full == ("full", "98.00 ± 0.00", "1.000 ± 0.000", "1.00", "", "1.00 (2/2)", "100 %", "100 %", "")
    # With seed 0 both reach 98 in their last epoch, after 8 s and 4 s; with seed 1 the fast run never does.
    assert fast == ("fast", "97.50 ± 0.71", "1.000 ± 0.000", "4.00", "2.00", "2.00 (1/2)", "40 %", "25 %", "3/5")


def test_a_row_that_is_slower_or_refused_shows_it() -> None:
    refused = row("none", 0, 1.0, [1.0], record=None, refused="cannot be kept")
    _, slow, last = cells([row("full", 0, 2.0, [90.0]), row("slow", 0, 4.0, [80.0]), refused])
    assert slow[3:6] == ("0.50", "-", "never (0/1)")
    assert last[:2] == ("none", "refused")


def test_policies_take_turns_and_finished_rows_are_not_run_again(tmp_path: Path) -> None:
    rows, table = tool("recipe.rows"), tool("paper_table")
    config = config_of(training__epochs=2)

    def run(done: tuple[Any, ...] = (), seeds: int = 2) -> list[Any]:
        return list(
            rows.rows(
                {"tiny": config},
                ["full", "VBMF as published"],
                range(seeds),
                clock=time.process_time,
                device=torch.device("cpu"),
                echo=lambda line: None,
                done=done,
            )
        )

    finished = run()
    assert [row.key[1:] for row in finished] == [
        ("full", 0),
        ("VBMF as published", 0),
        ("full", 1),
        ("VBMF as published", 1),
    ]
    full, vbmf, next_full, next_vbmf = (row.record for row in finished)
    assert vbmf.config["switch"] == {**full.config["switch"], "policy": "vbmf:0", "round_to": 1}
    assert full.config["seed"] != next_full.config["seed"]
    assert full.epochs[0]["training_loss"] == vbmf.epochs[0]["training_loss"]
    table.write_rows(tmp_path / "out", finished[:3], seeds=2)
    read = table.read_rows(tmp_path / "out")
    assert read == finished[:3]
    (missing,) = run(tuple(read))
    assert missing.key == finished[3].key
    assert missing.record.accuracy == next_vbmf.accuracy


def test_a_policy_that_is_refused_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tool("recipe.rows")
    monkeypatch.setitem(rows.POLICIES, "absurd", {"switch.policy": "speedup:1000"})
    (refused,) = rows.rows(
        {"tiny": config_of(training__epochs=2)},
        ["absurd"],
        [0],
        clock=time.process_time,
        device=torch.device("cpu"),
        echo=lambda line: None,
    )
    assert refused.record is None
    assert "cannot be kept" in refused.refused


def test_the_command_lists_the_configs() -> None:
    result = CliRunner().invoke(tool("paper_table").main, ["--run", "digit5", "--threads", "1"])
    assert result.exit_code == 1
    assert (
        "--run digit5 names no config. There are: digits-resnet18, digits-resnet56, digits-vgg, text-" in result.output
    )
    assert set(tool("paper_table").configs_of(["digits-v"], [])) == {"digits-vgg"}


def test_the_block_replaces_the_former_one() -> None:
    table = tool("recipe.table")
    text = f"before\n{table.BEGIN}```\nold\n```{table.END}\nafter\n"
    assert table.with_block(text, "new \\1") == f"before\n{table.BEGIN}```\nnew \\1\n```{table.END}\nafter\n"
    with pytest.raises(tool("recipe.errors").RecipeError, match="The README has no place for the table"):
        table.with_block("before", "new")


def test_the_readme_shows_the_results_in_the_repository() -> None:
    table = tool("paper_table")
    text = README.read_text(encoding="utf-8")
    assert tool("recipe.table").with_block(text, table.render(table.read_rows(table.RESULTS))) == text
