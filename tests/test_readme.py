"""The README's code runs, and what it says of the options is what they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tdfx
from tdfx.plan import Reason

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


def test_the_defaults_are_those_of_the_code(text: str) -> None:
    policy = tdfx.Policy()
    assert f"`{policy.rank!r}`, the default" in text
    assert f"at least {policy.min_gain} times faster" in text
    assert f"multiples of {policy.round_to}" in text
    assert f"`{tdfx.Energy()!r}`" in text
