"""Forwards written at random out of what users do beside computing: a rewritten model does what the model did."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from checkout import needs, tool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = needs("check_forwards.py")
SOME = settings(deadline=None, max_examples=8, derandomize=True, suppress_health_check=list(HealthCheck))


@SOME
@given(st.randoms(use_true_random=False))
def test_a_forward_does_the_same_after_a_rewrite(dice: random.Random) -> None:
    program = tool("forward_programs").Program(dice)
    outcomes = tool("check_forwards").examine(program)
    assert not [outcome for outcome in outcomes if outcome.kind == "wrong"], program.text[
        program.text.index("class Bl") :
    ]


def test_both_forms_come_out() -> None:
    programs = [tool("forward_programs").Program(random.Random(seed)) for seed in (0, 1, 2, 3)]
    outcomes = [outcome for program in programs for outcome in tool("check_forwards").examine(program)]
    assert {"graph", "modules"} <= {outcome.emit for outcome in outcomes if outcome.kind == "right" and outcome.sites}


STATEFUL = [
    "self.count += 1",
    "self.kept['n'] = self.kept.get('n', 0) + 1",
    "h = h * next(self.numbers)",
    "LOG.append(h)",
]


@pytest.mark.parametrize("statement", STATEFUL)
def test_what_code_leaves_behind_is_compared(statement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewritten model that skips a statement is wrong."""
    forwards = tool("forward_programs")
    program = forwards.Program(random.Random(0))
    program.arguments = "plain"
    body = f"class Net(Base):\n    def forward(self, h):\n        {statement}\n        return self.a(h)\n"
    program.text = f"{forwards.PRELUDE}\n\n{body}"
    assert {outcome.kind for outcome in tool("check_forwards").examine(program)} == {"right"}
    checks = tool("check_forwards")
    real = checks.tdfx.rewrite

    def rewrite(model: Any, *args: Any, **named: Any) -> Any:
        result = real(model, *args, **named)
        vars(result)["forward"] = result.a.__call__
        return result

    monkeypatch.setattr(checks.tdfx, "rewrite", rewrite)
    assert {outcome.kind for outcome in checks.examine(program)} == {"wrong"}


def test_what_is_left_where_numbers_cancel_is_no_difference() -> None:
    checks = tool("check_forwards")
    facts = {"output": torch.full((2,), 1e-15), "weight": torch.full((2,), 3.0)}
    rounding = checks.ROUNDING * checks._largest(facts)
    checks._compare(facts | {"output": torch.zeros(2)}, facts, "here", rounding)
    for name, value in (("output", 1e-11), ("weight", 3.0001)):
        with pytest.raises(checks.DifferenceError, match=name):
            checks._compare(facts | {name: torch.full((2,), value)}, facts, "here", rounding)
