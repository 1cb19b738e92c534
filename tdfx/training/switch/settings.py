"""Check the settings of a ``Switch``."""

from __future__ import annotations

import math
from typing import get_args

from tdfx.checks import check_whole, is_number
from tdfx.errors import PolicyError
from tdfx.policies.policy import Policy
from tdfx.training.switch.when import When


def check_settings(
    policy: object, when: object, total_steps: int | None, recompile_seconds: float, rewarm: int
) -> None:
    """Raise PolicyError if a setting is out of range."""
    if not isinstance(policy, Policy):
        raise PolicyError(
            f"policy={policy!r} is a {type(policy).__name__}: a switch makes its plan later, from the weights of that "
            f"time, and needs a policy for it. Pass tdfx.Policy(rank=...)."
        )
    if not isinstance(when, get_args(When)):
        raise PolicyError(
            f"when={when!r} does not say when to switch. Pass for example when=tdfx.AtStep(500) or "
            f"when=tdfx.Settled(timeout=20_000)."
        )
    if total_steps is not None:
        check_whole("total_steps", total_steps, "the steps of the whole training", "total_steps=10_000")
    if not (is_number(recompile_seconds) and 0 <= recompile_seconds < math.inf):
        raise PolicyError(
            f"recompile_seconds={recompile_seconds!r} is not a time of at least 0: it is the time to compile the "
            f"rewritten model, in seconds. Leave it out if nothing is compiled."
        )
    if rewarm != 0:
        check_whole("rewarm", rewarm, "the steps of the re-warm-up, or 0 for none", "rewarm=200")
