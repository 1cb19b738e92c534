"""tools/bench_gpu.py in small: rows that hold, fail, die and come too late."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkout import TOOLS, needs, tool
from click.testing import CliRunner

pytestmark = needs("bench_gpu.py")


def bench(small: bool = True) -> Any:
    rows = tool("gpu.rows")
    return rows.Bench(device="cpu", small=small)


def fake_sections(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a section into the program's place whose cases hold, are off, raise, die, and would come after that."""
    program = folder / "program.py"
    program.write_text(
        "import json, os, sys, time\n"
        "from functools import partial\n"
        f"sys.path.insert(0, {str(TOOLS)!r})\n"
        "from gpu.rows import Bench, Outcome, run_cases\n"
        "def raises(_): raise ValueError('no kernel')\n"
        "cases = {'holds': lambda _: Outcome({'x': 1.0}), 'off': lambda _: Outcome({}, False, 'x'), 'raises': raises,\n"
        "         'dies': (lambda _: os._exit(3)) if '--small' in sys.argv else (lambda _: time.sleep(60)),\n"
        "         'late': lambda _: Outcome({})}\n"
        "print('row: ' + json.dumps(list(cases)), flush=True)\n"
        "for row in run_cases('correctness', cases, Bench(device='cpu', small=True)):\n"
        "    print('row: ' + json.dumps(row.to_dict()), flush=True)\n"
    )
    module = tool("bench_gpu")
    monkeypatch.setattr(module, "__file__", str(program))
    return module


def test_every_case_is_a_row_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_sections(tmp_path, monkeypatch)
    file = tmp_path / "rows.json"
    arguments = ["--small", "--section", "correctness", "--deadline", "1000", "--json", str(file)]
    result = CliRunner().invoke(module.main, arguments)
    assert result.exit_code == 1, result.output
    rows = json.loads(file.read_text(encoding="utf-8"))["results"]
    statuses = {row["name"]: row["status"] for row in rows}
    expected = {"holds": "ok", "off": "falsified", "raises": "FAILED", "dies": "FAILED", "late": "not run"}
    assert statuses == expected
    assert rows[2]["values"] == {"error": "ValueError: no kernel"}
    assert rows[3]["values"] == {"error": "exit code 3"}


def test_a_deadline_ends_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_sections(tmp_path, monkeypatch)
    rows = list(module.run_section("correctness", bench(small=False), 1e-3))
    assert {row.status for row in rows} == {"not run"}


def test_only_correctness_decides_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    module, rows = tool("bench_gpu"), tool("gpu.rows")
    for section, code in (("steps", 0), ("correctness", 1)):
        row = rows.Row(section=section, name="x", status="falsified")
        monkeypatch.setattr(module, "run_section", lambda *_, row=row: iter([row]))
        assert CliRunner().invoke(module.main, ["--small", "--section", section]).exit_code == code


def test_every_section_has_cases_and_eight_minutes_suffice() -> None:
    sections = tool("gpu.sections").SECTIONS
    assert sum(section.seconds for section in sections.values()) <= 480
    for section in sections.values():
        small, full = section.rows(bench()), section.rows(bench(small=False))
        assert small
        assert len(full) >= len(small)


@pytest.mark.parametrize("name", ["ceilings"])
def test_sections_run_in_small_on_a_cpu(name: str) -> None:
    rows = tool("gpu.rows")
    cases = tool("gpu.sections").SECTIONS[name].rows(bench())
    results = list(rows.run_cases(name, cases, bench()))
    assert [row.status for row in results] == ["ok"] * len(cases), [row.values for row in results]


@pytest.mark.parametrize(
    "case", ["auto, float64, contiguous", "auto, bfloat16, channels last", "AdamW fused", "deterministic"]
)
def test_correctness_holds_on_a_cpu(case: str) -> None:
    cases = tool("gpu.correctness").CASES
    outcome = cases[case](bench())
    assert outcome.holds, outcome.values


def test_a_wrong_result_is_falsified(monkeypatch: pytest.MonkeyPatch) -> None:
    correctness = tool("gpu.correctness")
    monkeypatch.setattr(correctness, "BOUNDS", {"float64": 1e-30})
    assert not correctness.CASES["auto, float64, contiguous"](bench()).holds
