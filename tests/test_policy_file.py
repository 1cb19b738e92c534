"""Policies from TOML, JSON and mappings equal those made in Python; errors name the file and the key."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import tdfx
from tdfx.errors import PolicyError
from tdfx.ranks.registry import parse_rule

TOML = """
rank = "vbmf,at_least=8 | ratio:0.5"
scheme = "tucker2:refine=2"
include = ["layer*"]
exclude = ["layer1.*"]
min_gain = 1.2
round_to = "auto"

[cost]
use = "measured"
budget = 30
autocast = "bfloat16"

[overrides]
"layer4.*" = {rank = {"*.conv1" = 64, "*" = [32, 16]}, scheme = "spatial"}
fc = "keep"
"""
EXPECTED = tdfx.Policy(
    rank=tdfx.VBMF().at_least(8) | tdfx.Ratio(of=0.5),
    scheme="tucker2:refine=2",
    include=("layer*",),
    exclude=("layer1.*",),
    min_gain=1.2,
    round_to="auto",
    cost=tdfx.Measured(budget=30, autocast=torch.bfloat16),
    overrides={
        "layer4.*": tdfx.Policy(
            rank=tdfx.Fixed({"*.conv1": 64, "*": (32, 16)}),
            scheme="spatial",
            min_gain=1.2,
            round_to="auto",
            cost=tdfx.Measured(budget=30, autocast=torch.bfloat16),
        ),
        "fc": None,
    },
)


def test_toml_json_and_mappings_give_the_policy_of_python(tmp_path: Path) -> None:
    import tomllib

    (tmp_path / "p.toml").write_text(TOML)
    table = tomllib.loads(TOML)
    (tmp_path / "p.JSON").write_text(json.dumps(table))
    for source in (tmp_path / "p.toml", str(tmp_path / "p.JSON"), table):
        assert tdfx.read_policy(source) == EXPECTED
    assert tdfx.read_policy({}) == tdfx.Policy()
    assert tdfx.read_policy({**table, "min_gain": 1.3}) != EXPECTED


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"speedup": 2}, tdfx.Policy(speedup=2)),
        ({"parameters": 0.5, "flops": 10**9, "error": "weights"}, tdfx.Policy(parameters=0.5, flops=10**9)),
        ({"seconds": 0.25, "memory": 0.5}, tdfx.Policy(seconds=0.25, memory=0.5)),
        ({"cost": "modelled"}, tdfx.Policy(cost=tdfx.Modelled())),
        ({"cost": {"use": "modelled", "seconds_per_call": 0}}, tdfx.Policy(cost=tdfx.Modelled(seconds_per_call=0))),
        ({"cost": {"rounds": 5, "cache": False}}, tdfx.Policy(cost=tdfx.Measured(rounds=5, cache=False))),
        ({"overrides": {"fc": None}}, tdfx.Policy(overrides={"fc": None})),
        (
            {"speedup": 2, "overrides": {"fc": {"rank": "stable"}}},
            tdfx.Policy(speedup=2, overrides={"fc": tdfx.Policy(rank=tdfx.StableRank())}),
        ),
    ],
)
def test_every_setting_is_read(table: dict[str, Any], expected: tdfx.Policy) -> None:
    assert tdfx.read_policy(table) == expected


def test_an_override_inherits_what_it_leaves_out() -> None:
    policy = tdfx.read_policy(
        {"rank": "ratio:0.5", "min_gain": 0, "round_to": 1, "overrides": {"fc": {"scheme": "svd"}}}
    )
    assert policy.for_site("fc") == tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1, scheme="svd")


def test_every_setting_of_a_policy_has_its_key() -> None:
    budgets = {"speedup", "seconds", "flops", "parameters", "memory", "error"}
    with pytest.raises(PolicyError) as caught:
        tdfx.read_policy({"colour": "red"})
    named = str(caught.value).rpartition("all of them: ")[2].rstrip(".").split(", ")
    assert set(named) == {field.name for field in fields(tdfx.Policy) if not field.name.startswith("_")} | budgets


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"min_gian": 1}, "has the unknown key 'min_gian'. Nearest: 'min_gain'; all of them: rank, scheme, "),
    ({"overrides": {"fc": {"rnak": 1}}}, "has the unknown key 'rnak' under overrides.'fc'. Nearest: 'rank'"),
    ({"cost": {"use": "measured", "bugdet": 1}}, "has the unknown key 'bugdet' under cost. Nearest: 'budget'"),
    ({"cost": {"use": "modelled", "budget": 1}}, "has the unknown key 'budget' under cost."),
    ({"rank": "vmbf"}, ", key rank: 'vmbf' names no rank rule"),
    ({"rank": "ratio:2"}, ", key rank: of=2.0 is not in (0, 1]"),
    ({"rank": 3}, ', key rank: 3 is not a rule. Write for example "energy:0.9", or a table of ranks by site.'),
    ({"rank": {"fc": 0}}, ", key rank: Fixed rank 0 for 'fc' is not a whole number of at least 1"),
    ({"min_gain": "much"}, ", key min_gain: min_gain='much' is not a number of at least 0"),
    ({"scheme": "tuker2"}, ", key scheme: scheme='tuker2' is not known"),
    ({"include": "layer*"}, ", key include: include='layer*' is not a tuple of patterns"),
    ({"round_to": 0}, ", key round_to: round_to=0 is not a whole number of at least 1"),
    ({"speedup": 0.5}, ", key speedup: speedup=0.5 is not a number above 1"),
    ({"speedup": 2, "error": "loss"}, ", key error: error='loss' is not known"),
    ({"error": "weights"}, ", key error: error='weights' says what a budget keeps small, and no budget is given"),
    ({"rank": "vbmf", "speedup": 2}, ": rank=VBMF(floor=0.25, weaken=1.0) and speedup=2 both say which ranks to take"),
    (
        {"cost": "guessed"},
        ", key cost: 'guessed' is not a cost. Nearest: 'measured'. Write \"measured\" or \"modelled\"",
    ),
    ({"cost": {"budget": -1}}, ", key cost: Measured(budget=-1, "),
    ({"cost": {"use": "modelled", "flops_per_second": "fast"}}, ", key cost: Modelled(flops_per_second='fast', "),
    (
        {"cost": {"autocast": "int8"}},
        ", key cost.autocast: 'int8' is not one of bfloat16, float16. Leave it out for none.",
    ),
    ({"overrides": 3}, ', key overrides: 3 is not a table from patterns to policies. Write for example "layer4.*" = '),
    ({"overrides": {"fc": 3}}, ", key overrides.'fc': 3 is not a table of settings. Write for example rank = "),
    ({"overrides": {"fc": {"rank": "ratio:2"}}}, ", key overrides.'fc'.rank: of=2.0 is not in (0, 1]"),
    ({"speedup": 2, "overrides": {"fc": {"flops": 0.5}}}, ", key overrides: An override has a budget"),
]


@pytest.mark.parametrize(("table", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_an_error_names_the_file_and_the_key(table: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(
        PolicyError, match=re.escape(f"The policy{message}" if message[0] in ",:" else f"The policy {message}")
    ):
        tdfx.read_policy(table)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(table))
    with pytest.raises(
        PolicyError, match=re.escape(f"The policy {str(path)!r}" + (message if message[0] in ",:" else f" {message}"))
    ):
        tdfx.read_policy(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.toml", None, "could not be read: No such file or directory. Name a file that exists."),
        ("p.toml", "rank = \n", r"is not TOML: .*line 1.*Correct the file there\."),
        ("p.json", "{", r"is not JSON: .*line 1.*Correct the file there\."),
        ("p.json", "[1]", r": \[1\] is not a table of settings"),
        ("p.json", "[" * 100_000, "is not JSON: "),
        ("p.toml", "rank = 0x" + "f" * 5000, "key rank: a number of thousands of digits is not a rule"),
        ("p.yaml", "rank: vbmf", r"is neither TOML nor JSON by its name. Name a file that ends in \.toml or \.json"),
    ],
)
def test_a_file_that_is_not_a_policy_is_refused(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(PolicyError, match=f"The policy '.*{re.escape(name)}'.*{message}"):
        tdfx.read_policy(tmp_path / name)


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_bytes(b"scheme = '\xff'")
    with pytest.raises(PolicyError, match="is not TOML: 'utf-8' codec can't decode"):
        tdfx.read_policy(tmp_path / "p.toml")


def test_rules_in_a_string_equal_those_of_python() -> None:
    assert parse_rule("vbmf:0.5,at_most=0.5 |energy| ratio:0.25") == (
        tdfx.VBMF(floor=0.5).at_most(0.5) | tdfx.Energy() | tdfx.Ratio(of=0.25)
    )
    with pytest.raises(PolicyError, match="'' names no rank rule"):
        parse_rule("vbmf|")


def test_an_override_may_be_part_of_the_budget_around_it() -> None:
    policy = tdfx.read_policy({"parameters": 0.5, "cost": "modelled", "overrides": {"fc": {"scheme": "svd"}}})
    assert policy == tdfx.Policy(parameters=0.5, cost=tdfx.Modelled(), overrides={"fc": tdfx.Policy(scheme="svd")})


def test_overrides_nested_without_end_are_refused(tmp_path: Path) -> None:
    deep: dict[str, Any] = {}
    for _ in range(sys.getrecursionlimit()):
        deep = {"overrides": {"*": deep}}
    with pytest.raises(PolicyError, match="The policy has overrides within overrides without end"):
        tdfx.read_policy(deep)
    # The parser limits the depth of a file too, but at a greater depth than policies can have.
    depth = sys.getrecursionlimit() // 4
    (tmp_path / "p.json").write_text('{"overrides": {"*": ' * depth + "{}" + "}}" * depth)
    with pytest.raises(PolicyError, match=r"The policy '.*p\.json' (has overrides within|is not JSON)"):
        tdfx.read_policy(tmp_path / "p.json")
    shallow = tdfx.read_policy({"overrides": {"*": {"overrides": {"fc": "keep"}}}})
    assert shallow.for_site("fc") is None
