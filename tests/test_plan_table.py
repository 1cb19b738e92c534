"""The table of a plan fits its width, shows what matters most, and is whole in a pipe."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from budgeted import set_step_seconds
from rich.console import Console
from torch import nn

import tdfx
from tdfx.plans.plan import Plan, Reason, SitePlan
from tdfx.plans.table import fold, plan_view, render_plain

NOTE = "MultiheadAttention may read its weight without calling it"


def site(name: str, **changes: Any) -> SitePlan:
    counts = {"parameters_before": 2_359_296, "parameters_after": 278_528, "flops_before": 10**9, "flops_after": 10**8}
    times = {"seconds_before": 0.01234, "seconds_after": 0.00501, "gain": 2.45, "error": 0.123}
    decision = {"scheme": "tucker2", "ranks": (128, 64)}
    fixed: dict[str, Any] = {"kind": "Conv2d", "shape": (512, 512, 3, 3), "calls": 1}
    return SitePlan(name=name, **{**fixed, **counts, **times, **decision, **changes})


def kept(name: str, reason: Reason = Reason.READ_ELSEWHERE, note: str = NOTE) -> SitePlan:
    nothing = dict.fromkeys(("scheme", "ranks", "error", "gain", "seconds_before", "seconds_after"))
    return site(name, reason=reason, note=note, **nothing)


BLOCKS = [f"encoder.layers.encoder_layer_{number}" for number in range(12)]
PLAN = Plan(
    sites=tuple(
        decision
        for block in BLOCKS
        for decision in (kept(f"{block}.self_attention.in_proj_weight"), site(f"{block}.mlp.0"), site(f"{block}.mlp.3"))
    ),
    notes=("given back as VisionTransformer, not as a graph",),
    model="VisionTransformer",
)


def shown(plan: Plan, width: int | None, sites: tuple[SitePlan, ...] | None = None) -> list[str]:
    view = plan_view(plan, width, sites)
    if width is None:
        return render_plain(view).splitlines()
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def table(lines: list[str]) -> list[str]:
    return lines[: lines.index("") if "" in lines else next(i for i, line in enumerate(lines) if not line.strip())]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 160, 200, 300])
def test_no_line_is_wider_than_the_terminal_and_every_site_has_a_line(width: int) -> None:
    lines = shown(PLAN, width)
    assert max(map(len, lines)) <= width
    assert len(table(lines)) == 1 + len(PLAN)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160, 200])
def test_folded_names_still_differ(width: int) -> None:
    names = [line.split()[0] for line in table(shown(PLAN, width))[1:]]
    assert len(set(names)) == len(PLAN)
    assert all(name.startswith("enc") for name in names)
    assert [name.rpartition(".")[2] for name in names[1:3]] == ["0", "3"]


def test_a_wider_table_shows_more() -> None:
    titles = {width: set(table(shown(PLAN, width))[0].split()) for width in (30, 60, 80, 100, 120, 200)}
    assert titles[30] >= {"site", "scheme"}
    assert titles[60] >= {"site", "scheme", "params", "gain"}
    assert titles[80] >= titles[60] | {"ranks"}
    assert titles[120] >= titles[80] | {"error", "ms"}
    assert titles[200] == {"site", "layer", "scheme", "ranks", "error", "params", "FLOPs", "ms", "gain", "note"}
    assert all(titles[less] <= titles[more] | {"shape"} for less, more in ((30, 60), (60, 80), (80, 100), (100, 120)))


def test_in_a_pipe_nothing_is_cut() -> None:
    text = render_plain(plan_view(PLAN))
    assert "…" not in text
    line = next(line for line in text.splitlines() if line.startswith(f"{BLOCKS[11]}.self_attention.in_proj_weight"))
    assert line.endswith(NOTE)
    assert "read_elsewhere" in line
    (row,) = (line for line in text.splitlines() if line.startswith(f"{BLOCKS[7]}.mlp.3 "))
    cells = "Conv2d 512×512×3×3  tucker2  128/64  12.3%  2.36M → 279k  1G → 100M  12.3 → 5.01  2.45x"
    assert row.split() == [f"{BLOCKS[7]}.mlp.3", *cells.split()]


def test_a_long_note_is_cut_on_a_terminal() -> None:
    plan = Plan(sites=(kept("fc", note="n" * 200), site("conv")))
    row = table(shown(plan, 120))[1]
    assert row.rstrip().endswith("n…")
    assert "n" * 200 in render_plain(plan_view(plan))


def test_columns_that_would_be_empty_are_left_out() -> None:
    plan = tdfx.plan(nn.Linear(64, 64), tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
    assert shown(plan, None)[0].split() == ["site", "layer", "scheme", "ranks", "error", "params", "modelled"]


def test_a_gain_is_called_modelled_where_nothing_was_timed() -> None:
    modelled = Plan(sites=(site("conv", seconds_before=None, seconds_after=None), kept("fc")))
    assert shown(modelled, None)[0].split()[-2:] == ["modelled", "note"]
    mixed = shown(Plan(sites=(site("conv"), site("fc", seconds_before=None, seconds_after=None))), None)
    assert mixed[0].split()[-2:] == ["ms", "gain"]
    assert [line.split()[-1] for line in mixed[1:3]] == ["2.45x", "~2.45x"]


def test_what_has_not_run_is_called_predicted() -> None:
    plan = Plan(sites=(site("conv"),), step_seconds=0.02)
    assert shown(plan, None)[-2:] == [
        "training step: measured 20 ms now, predicted 12.7 ms after the rewrite (1.58x faster)",
        "total error 0.0151 (the sites' squared errors, summed; errors of the weights)",
    ]
    dense = Plan(sites=(kept("conv"),), step_seconds=0.02)
    assert shown(dense, None)[-1] == "training step: measured 20 ms now"
    estimated = Plan(sites=(site("conv", estimated=True),))
    assert "estimated, 1 sites: 12.3 → 5.01 ms a step (2.46x faster)" in shown(estimated, None)


def test_every_rule_shows_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    set_step_seconds(monkeypatch, 0.02)
    net = nn.Sequential(nn.Linear(64, 64))
    for rule in (tdfx.Ratio(of=0.25), tdfx.Energy(), tdfx.Budget(parameters=0.5)):
        plan = tdfx.plan(net, tdfx.Policy(rank=rule, min_gain=1e-9), example_inputs=torch.ones(2, 64))
        assert plan.step_seconds == 0.02
        assert "training step: measured 20 ms now" in str(plan)
    untimed = tdfx.plan(net, tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0), example_inputs=torch.ones(2, 64))
    assert untimed.step_seconds is None


def test_a_budget_of_time_that_measures_nothing_says_so() -> None:
    net = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    rule = tdfx.Budget(speedup=1.1, strict=False)
    note = r"speedup=1\.1.* is kept by modelled times, since there are no example inputs"
    assert re.search(note, str(tdfx.plan(net, tdfx.Policy(rank=rule))))
    by_cost = tdfx.plan(net, tdfx.Policy(rank=rule, cost=tdfx.Modelled()), example_inputs=torch.ones(2, 256))
    assert re.search(r"is kept by modelled times, since Modelled measures nothing", str(by_cost))


def test_a_table_of_some_sites_says_how_many_there_are() -> None:
    lines = shown(PLAN, 80, PLAN.factorized[:2])
    assert len(table(lines)) == 4
    assert lines[3].rstrip() == "shown: 2 of 36 sites; the totals are those of all sites"
    assert lines[5].rstrip() == "VisionTransformer: 24 of 36 sites factorized; kept: 12 read_elsewhere"
    assert shown(PLAN, 80, ())[0].rstrip() == "shown: 0 of 36 sites; the totals are those of all sites"
    assert "shown:" not in "".join(shown(PLAN, 80))


def test_control_characters_in_a_name_are_replaced() -> None:
    lines = shown(Plan(sites=(site("a\nb\x1b[31m"),)), None)
    assert lines[1].startswith("a�b�[31m ")


@pytest.mark.parametrize("width", range(1, 60))
def test_a_folded_name_fills_its_width_and_keeps_its_ends(width: int) -> None:
    name = "encoder.layers.encoder_layer_11.self_attention.out_proj"
    short = fold(name, width)
    assert len(short) <= width
    if width >= len(name):
        assert short == name
    elif width >= 25:
        assert len(short) > width - 8
        assert short.startswith("encoder…")
        assert "11" in short
        assert short.endswith("out_proj")


def test_a_name_without_parts_is_folded_too() -> None:
    assert fold("x" * 20 + "y" * 20, 10) == "xxx…yyyyyy"
    assert fold("a.bbbbbbbbbbbbbbbbbbbbbbbb", 10) == "a.b…bbbbbb"
