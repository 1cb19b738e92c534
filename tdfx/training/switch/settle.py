"""Whether the stable ranks of a model have settled, at one step of a ``Switch``."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from tdfx.passes.analysis.observe import Inputs
from tdfx.plans.plan import Emit
from tdfx.policies.policy import Policy
from tdfx.training.switch.state import SwitchState
from tdfx.training.switch.watch import RankWatch
from tdfx.training.switch.when import Settled
from tdfx.wrappers.unwrap import Unwrapped


def look_at_ranks(
    state: SwitchState, when: Settled, wrapped: Unwrapped, policy: Policy, inputs: Inputs | None, emit: Emit
) -> tuple[SwitchState, str | None]:
    """Look at the stable ranks; return the state after that, and why it is time to switch, or None if it is not."""
    watch = state.watch or RankWatch.begin(when, wrapped, policy, inputs, emit)
    if not watch.sites:
        why = "the policy wants no site of the model that may be rewritten"
        return replace(state.record("kept", (), why), done=True), None
    if state.step == 1 or state.step % watch.interval == 0:
        watch = watch.look(wrapped.model)
    timed_out = when.timeout is not None and state.step >= when.timeout
    settled = 0 if timed_out else cast("int", wrapped.processes.broadcast_object(len(watch.settled())))
    state = replace(state, watch=watch, next=watch.next_look(state.step))
    if timed_out:
        return state, "the timeout"
    if 2 * settled < len(watch.sites):
        return state, None
    ranks = f"the stable rank{'s' * (settled != 1)} of {settled} of {len(watch.sites)} sites"
    return state, f"{ranks} held within {when.tolerance:g} over {when.window} looks"
