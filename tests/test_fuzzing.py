"""Any plan file, policy file or policy string is accepted, or refused with an error of tdfx."""

from __future__ import annotations

import contextlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tdfx
from tdfx.cli import main
from tdfx.cli.inspect import SORTS
from tdfx.cli.rows import ordered, to_csv
from tdfx.errors import PassError, TdfxError
from tdfx.factors.registry import scheme_names
from tdfx.plans.plan import Plan, Reason
from tdfx.plans.table import plan_view, render_plain
from tdfx.ranks.registry import parse_rule, rule_names

MANY = settings(deadline=None, max_examples=150)
FEW = settings(deadline=None, max_examples=60)

HUGE = st.sampled_from([10**400, -(10**400), 2**63, -1, 0, 1, 2])
NUMBERS = st.integers(-3, 3) | HUGE | st.floats()
WORDS = st.sampled_from(
    ["*", "0", "fc", "auto", "svd", "tucker2", "cp", "keep", "vbmf", "ratio:0.5", "\ud800", "\x1b[1m\n"]
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@contextlib.contextmanager
def accepted_or_refused() -> Any:
    """Ignore errors of tdfx, except those that report a defect of tdfx."""
    try:
        yield
    except PassError:
        raise
    except TdfxError:
        return


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))  # type: ignore[no-any-return]


@cache
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@cache
def plan_text() -> str:
    return tdfx.plan(net(), tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0)).to_json()


PLACES = st.sampled_from([*Plan.__dataclass_fields__, "format"])
SITE_PLACES = st.sampled_from(sorted(tdfx.SitePlan.__dataclass_fields__))
VALUES = NUMBERS | JSON | st.sampled_from([*map(str, Reason), *scheme_names(), "graph", "modules", [8], [8, 4], [1, 1]])


def use(plan: Plan) -> None:
    """Use a plan that was read in every way."""
    for width in (None, 20, 80):
        render_plain(plan_view(plan, width))
    for key in SORTS:
        with accepted_or_refused():
            to_csv(ordered(plan.sites, key))
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    with accepted_or_refused():
        tdfx.rewrite(net(), plan)


@MANY
@given(JSON)
def test_a_plan_file_of_any_json(value: Any) -> None:
    with accepted_or_refused():
        Plan.from_json(json.dumps(value))
    with accepted_or_refused():
        Plan.from_json(json.dumps({"format": 1, "sites": value}))


@MANY
@given(st.text())
def test_a_plan_file_of_any_text(text: str) -> None:
    with accepted_or_refused():
        Plan.from_json(text)


@MANY
@given(of_plan=st.dictionaries(PLACES, VALUES, max_size=2), of_site=st.dictionaries(SITE_PLACES, VALUES, max_size=3))
def test_a_plan_file_with_changed_fields(of_plan: dict[str, Any], of_site: dict[str, Any]) -> None:
    data = json.loads(plan_text())
    for site in data["sites"][: 1 + len(of_plan) % 2]:
        site.update(of_site)
    data.update(of_plan)
    with accepted_or_refused():
        use(Plan.from_json(json.dumps(data)))


@FEW
@given(st.integers(0, 1000), st.integers(0, 20), st.text(max_size=3))
def test_a_plan_file_with_text_replaced(start: int, length: int, text: str) -> None:
    whole = plan_text()
    with accepted_or_refused():
        use(Plan.from_json(whole[:start] + text + whole[start + length :]))


RULE_PARTS = st.sampled_from(
    [
        *rule_names(),
        *":,|= ",
        "at_least=",
        "at_most=",
        "round_to=",
        "0.5",
        "2",
        "1e999",
        "nan",
        "-1",
        "9" * 5000,
        "²",
        "٣",
    ]
)
RULE_TEXTS = st.text(max_size=12) | st.lists(RULE_PARTS | st.text(max_size=2), max_size=6).map("".join)


@MANY
@given(RULE_TEXTS)
def test_a_policy_of_any_text(text: str) -> None:
    with accepted_or_refused():
        rule = parse_rule(text)
        tdfx.plan(net(), tdfx.Policy(rank=rule, cost=tdfx.Modelled(), min_gain=0))


KEYS = ("rank", "scheme", "include", "exclude", "min_gain", "round_to", "cost", "speedup", "seconds", "flops")
LIMITS = ("parameters", "memory", "error")
COSTS = st.fixed_dictionaries(
    {"use": st.sampled_from(["measured", "modelled"])},
    optional=dict.fromkeys(("budget", "rounds", "flops_per_second", "seconds_per_call", "cache", "autocast"), JSON),
)
TABLES = st.fixed_dictionaries({}, optional=dict.fromkeys((*KEYS, *LIMITS), JSON | WORDS | COSTS))
POLICIES = st.builds(
    lambda table, overrides, cost: {**table, **overrides, "cost": table.get("cost", cost)},
    TABLES,
    st.fixed_dictionaries({}, optional={"overrides": st.dictionaries(WORDS, TABLES | JSON, max_size=2) | JSON}),
    st.sampled_from(["modelled"]),
)


@MANY
@given(POLICIES | st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_a_policy_of_any_mapping(table: dict[str, Any]) -> None:
    with accepted_or_refused():
        policy = tdfx.read_policy(table)
        hash(policy)
        tdfx.plan(net(), policy)


@MANY
@given(
    text=st.text(max_size=40)
    | st.binary(max_size=20)
    | st.sampled_from(
        ["a" * 3 + "[" * 50_000, "rank = 0x" + "f" * 5000, "min_gain = 0x" + "f" * 5000, "rank = 1979-05-27"]
    )
    | POLICIES.map(lambda table: json.dumps(table)),
    ending=st.sampled_from([".toml", ".json"]),
)
def test_a_policy_file_of_any_content(text: str | bytes, ending: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"policy{ending}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        with accepted_or_refused():
            tdfx.read_policy(path)


def test_a_defect_is_detected() -> None:
    with pytest.raises(PassError), accepted_or_refused():
        raise PassError("a pass broke its contract")
    with pytest.raises(KeyError), accepted_or_refused():
        raise KeyError("conv")


OPTIONS = st.sampled_from(
    ["--policy", "--input", "--include", "--exclude", "--min-gain", "--sort", "--filter", "--device"]
)


@FEW
@given(
    st.lists(st.tuples(OPTIONS, RULE_TEXTS | WORDS | st.sampled_from(["2,4,8,8", "meta", "cpu", "gain"])), max_size=3)
)
def test_any_command_line_ends_with_an_exit_code(options: list[tuple[str, str]]) -> None:
    arguments = [f"{name}={value}" for name, value in options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tdfx.cli.references.find_model", lambda reference: net)
        result = CliRunner().invoke(main, ["inspect", "nets:build", "--modelled", *arguments])
    assert result.exit_code in {0, 2}
    assert "Traceback" not in result.output
    assert "where it should not have" not in result.output, result.output
