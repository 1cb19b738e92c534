"""The README's code runs, and what it says of the options is what they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tdfx
import tdfx.errors as errors_of_tdfx
from tdfx.cli import main
from tdfx.cli.inspect import inspect
from tdfx.plans.plan import Reason

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def text() -> str:
    if not README.is_file():
        pytest.skip("the README is not beside the tests")
    return README.read_text(encoding="utf-8")


def test_the_python_blocks_run_one_after_the_other(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["report"].ok
    out = capsys.readouterr().out
    assert "of 21 sites factorized" in out
    assert names["made"].parameters_after <= 0.5 * names["made"].parameters_before
    assert re.search(r"training step .* ms → .* ms: .*x faster; .*x was predicted", out)
    held = {id(one) for group in names["optimizer"].param_groups for one in group["params"]}
    assert held == {id(one) for one in names["small"].parameters()}
    assert isinstance(names["model"], torch.nn.Module)
    (site,) = tdfx.plan(names["Projection"](64, 64), tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
    assert (site.kind, site.ranks) == ("Projection", (16,))


def test_every_reason_is_explained(text: str) -> None:
    explained = set(re.findall(r"`(\w+)`", text.partition("## Why a layer is kept")[2].partition("\n## ")[0]))
    assert {str(reason) for reason in Reason} <= explained


def test_every_error_is_explained(text: str) -> None:
    section = text.partition("## When something is refused")[2].partition("\n## ")[0]
    explained = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    errors = {one for one in vars(errors_of_tdfx).values() if isinstance(one, type) and issubclass(one, tdfx.TdfxError)}
    assert sorted(explained) == sorted(one.__name__ for one in errors - {tdfx.TdfxError})


def test_the_policy_file_is_one(text: str, tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "policy.toml").write_text(block, encoding="utf-8")
    policy = tdfx.read_policy(tmp_path / "policy.toml")
    assert policy.rank == tdfx.VBMF().at_least(8) | tdfx.Ratio(of=0.5)
    assert policy.cost == tdfx.Measured(budget=30)
    assert policy.overrides["fc"] is None
    assert policy.for_site("layer4.0.conv1") == tdfx.Policy(
        rank=tdfx.Ratio(of=0.25), scheme="spatial", min_gain=1.1, cost=tdfx.Measured(budget=30)
    )


def test_the_commands_are_those_of_the_program(text: str) -> None:
    """What the shell blocks ask of inspect are options that it has; its table is one of 80 columns."""
    section = text.partition("## On the command line")[2].partition("\n## ")[0]
    commands = [line for line in section.splitlines() if line.startswith("tdfx ")]
    assert {line.split()[1] for line in commands} <= set(main.commands)
    named = {word for line in commands if " inspect " in line for word in line.split() if word.startswith("--")}
    assert named <= {name for one in inspect.params for name in one.opts}
    table = section.partition("<!-- COLUMNS=80")[2].partition("```\n")[2].partition("```")[0]
    assert 60 < max(map(len, table.splitlines())) <= 80


def test_the_defaults_are_those_of_the_code(text: str) -> None:
    policy = tdfx.Policy()
    assert f"`{policy.rank!r}`, the default" in text
    assert f"at least {policy.min_gain} times faster" in text
    assert f"multiples of {policy.round_to}" in text
    assert f"`{tdfx.Energy()!r}`" in text
