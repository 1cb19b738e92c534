"""The paper's table: rows in turns, figures calculated from given records, and the README's block."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
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
        steps=100,
        epochs=epochs,
        accuracy=accuracies[-1],
        loss=1.0 if policy == "full" else 1.1,
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


def run_rows(
    config: Any, *policies: str, seeds: int = 1, done: Mapping[Any, Any] | None = None, echo: Any = None
) -> list[Any]:
    """Run the rows of one config that are not done yet."""
    return list(
        tool("recipe.rows").rows(
            {"tiny": config},
            policies,
            range(seeds),
            clock=time.process_time,
            device=torch.device("cpu"),
            echo=echo or (lambda line: None),
            done=done or {},
        )
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
    assert full == ("full", "98.00 ± 0.00", "1.000 ± 0.000", "1.00", "", "", "", "100 %", "100 %", "")
    assert fast == ("fast", "97.50 ± 0.71", "1.100 ± 0.000", "4.00", "2.00", "-", "-", "40 %", "25 %", "3/5")


@pytest.mark.parametrize(
    ("accuracies", "seconds", "verdict"),
    [
        ((98.0, 99.0), 4.0, ("+3.50 ± 0.71", "yes")),
        ((94.0, 98.0), 4.0, ("+1.00 ± 2.83", "no")),
        ((94.0, 94.0), 4.0, ("-1.00 ± 0.00", "no")),
        ((95.0, 95.0), 4.0, ("+0.00 ± 0.00", "no")),
        ((99.0,), 4.0, ("+4.00", "one seed")),
        ((98.0, 99.0), 5.0, ("+3.50 ± 0.71", "took longer")),
    ],
)
def test_a_row_is_compared_with_the_dense_run_of_the_same_time(
    accuracies: tuple[float, ...], seconds: float, verdict: tuple[str, str]
) -> None:
    rows = [row("full", seed, 8.0, [98.0]) for seed in range(2)]
    rows += [row("fast", seed, seconds, [accuracy]) for seed, accuracy in enumerate(accuracies)]
    rows += [row("dense, same time", seed, 4.0, [95.0]) for seed in range(2)]
    _, fast, control = cells(rows)
    assert fast[5:7] == verdict
    assert control[3:7] == ("2.00", "", "", "")


def test_the_summary_is_over_all_tasks() -> None:
    rows = []
    for task, seconds, accuracy in (("a", 4.0, 97.0), ("b", 1.0, 98.5)):
        for seed in range(2):
            rows += [
                row("full", seed, 8.0, [98.0], run=task),
                row("tdfx default", seed, seconds, [accuracy - seed / 4], run=task),
                row("dense, same time", seed, seconds, [accuracy - 1.0 + task.count("b")], run=task),
            ]
    for each in rows:
        each.record.config["name"] = each.run
    *tables, summary = tool("recipe.table").tables(rows)
    assert len(tables) == 2
    assert [
        tuple(str(cell) for cell in line) for line in zip(*(each.cells for each in summary.columns), strict=True)
    ] == [
        ("a, 1 epochs", "2.00", "-", "-1.12", "-1.25", "+0.100", "+0.88 ± 0.18", "yes"),
        ("b, 1 epochs", "8.00", "-", "+0.38", "+0.25", "+0.100", "-0.12 ± 0.18", "no"),
        ("all", "4.00", "-", "-0.38", "-1.25", "+0.100", "+0.38 ± 0.60", "1 of 2"),
    ]


def test_a_row_that_is_slower_or_refused_shows_it() -> None:
    refused = row("none", 0, 1.0, [1.0], record=None, refused="cannot be kept")
    _, slow, last = cells([row("full", 0, 2.0, [90.0]), row("slow", 0, 4.0, [80.0]), refused])
    assert slow[3:5] == ("0.50", "-")
    assert last[:2] == ("none", "refused")


def test_policies_take_turns_and_finished_rows_are_not_run_again(tmp_path: Path) -> None:
    rows, table = tool("recipe.rows"), tool("paper_table")
    config = config_of(training__epochs=2)

    finished = run_rows(config, "VBMF as published", "full", seeds=2)
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
    assert read == sorted(finished[:3], key=lambda row: (row.policy != "full", row.seed))
    current = rows.current_rows(read, {"tiny": config})
    assert list(current.values()) == read
    (missing,) = run_rows(config, "full", "VBMF as published", seeds=2, done=current)
    assert missing.key == finished[3].key
    assert missing.record.accuracy == next_vbmf.accuracy


def test_a_policy_that_is_refused_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tool("recipe.rows")
    monkeypatch.setitem(rows.POLICIES, "absurd", {"switch.policy": "speedup:1000"})
    config = config_of(training__epochs=2)
    (refused,) = run_rows(config, "absurd")
    assert refused.record is None
    assert "cannot be kept" in refused.refused
    assert rows.current_rows([refused], {"tiny": config}) == {}


def test_rows_of_other_settings_are_run_again() -> None:
    rows, config = tool("recipe.rows"), config_of(training__epochs=2)
    finished = run_rows(config, "full")
    current = rows.current_rows(finished, {"tiny": config, "other": config})
    assert list(current) == [("tiny", "full", 0)]
    assert run_rows(config, "full", done=current) == []
    assert rows.current_rows(finished, {"tiny": config_of(training__epochs=2, output__evaluate=0)}) == current
    assert rows.current_rows(finished, {"tiny": config_of(training__epochs=3)}) == {}
    assert rows.current_rows([replace(finished[0], policy="unknown")], {"tiny": config}) == {}


def test_the_control_is_the_full_run_shortened_to_the_time_of_the_default() -> None:
    rows, config = tool("recipe.rows"), config_of(training__epochs=2, training__warmup=0.5, training__optimizer="sgd")
    full, default = row("full", 0, 8.0, [98.0]), row("tdfx default", 0, 4.5, [98.0])
    for each in (full, default):
        settings = rows.settings_of(each.key, config, {})
        object.__setattr__(each, "record", replace(each.record, steps=6, config=settings.model_dump(mode="json")))
    current = rows.current_rows([full, default], {"tiny": config})
    (control,) = run_rows(config, "dense, same time", done=current)
    # 6 steps of the full run took 8 s, so 4.5 s are enough for 3.375 steps.
    assert (control.record.steps, len(control.record.epochs)) == (3, 1)
    assert control.record.config["training"] == {**full.record.config["training"], "steps": 3, "warmup": 0.25}
    assert (control.record.factorized, control.cold) == ([], False)
    known = {**current, control.key: control}
    assert rows.current_rows(list(known.values()), {"tiny": config}) == known
    assert run_rows(config, "dense, same time", done=known) == []
    slower = replace(default, record=replace(default.record, seconds={"step": 6.0}))
    (longer,) = run_rows(config, "dense, same time", done={**known, default.key: slower})
    assert longer.record.steps == 4


def test_a_control_without_the_rows_that_say_its_length_is_left_out() -> None:
    lines: list[str] = []
    assert run_rows(config_of(training__epochs=2), "dense, same time", echo=lines.append) == []
    assert "left out, for it needs the rows 'full' and 'tdfx default'" in lines[0]


def test_the_command_lists_the_configs() -> None:
    result = CliRunner().invoke(tool("paper_table").main, ["--run", "digit5", "--threads", "1"])
    assert result.exit_code == 1
    assert (
        "--run digit5 names no config. There are: digits-resnet18, digits-resnet56, digits-vgg, text-" in result.output
    )
    (config,) = tool("paper_table").configs_of(["digits-v"], []).values()
    assert (config.model.name, config.output.evaluate) == ("vgg", 5)
    (config,) = tool("paper_table").configs_of(["digits-v"], ["output.evaluate=1"]).values()
    assert config.output.evaluate == 1
    assert len(tool("paper_table").configs_of([], [])) == 6


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
