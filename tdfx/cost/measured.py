"""The time of a site as it is measured on this machine."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from tdfx.checks import is_number
from tdfx.cost.count import Flow, parameters
from tdfx.cost.machine import describe_machine
from tdfx.cost.modelled import Case, Modelled
from tdfx.cost.rates import stream_rate
from tdfx.cost.setting import Setting
from tdfx.cost.store import Store, cache_folder
from tdfx.cost.timing import Timing, take_turns
from tdfx.cost.workload import Workload
from tdfx.errors import PolicyError
from tdfx.factors.operation import Operation
from tdfx.progress import progress

_known: dict[str, float] = {}
"""What this process has measured or read, by key."""
_FRESH = 60.0
"""Seconds for which a time is that of the machine as it is now."""
_at: dict[str, float] = {}
"""When this process measured it, by key and clock."""
_hasty: set[str] = set()
"""Keys of times for which there was no time to take enough samples; they count in this process, and are not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Time forward and backward of each site, dense and factorized, with the shapes, dtype, layout and threads it will have.

    What competes for one place is timed in turns; the median of the samples that nothing disturbed counts, and equal work
    is timed once. Times are kept on disk by hardware, versions and shape (``tdfx cache`` shows and deletes them). The
    optimizer's share is added: the memory that its update of the weights reads and writes.

    Without example inputs nobody knows what will flow through a site, and ``Modelled`` answers, as it does for what is left
    when ``budget`` is spent; what is measured is never compared with what is not.
    """

    budget: float = 15.0
    """Seconds that measuring for one plan may take, positive; what is in the cache costs nothing."""
    rounds: int = 3
    """Undisturbed samples of each computation, at least 1."""
    autocast: torch.dtype | None = None
    """What the training loop's autocast computes in, where the plan is not made inside of it; None for what is in force."""
    cache: bool = True
    """Whether times are read from disk and written to it."""
    update_bytes: int = 28
    """Bytes that the optimizer reads and writes for each weight value in one step, not negative: 28 for Adam and 20 for SGD
    with momentum in float32."""
    modelled: Modelled = field(default_factory=Modelled, repr=False)
    """What answers where nothing was measured."""

    def __post_init__(self) -> None:
        whole = type(self.rounds) is int and self.rounds >= 1
        numbers = all(is_number(one) or one == math.inf for one in (self.budget, self.update_bytes))
        if not (numbers and isinstance(self.cache, bool) and self.budget > 0 and whole and self.update_bytes >= 0):
            raise PolicyError(
                f"{self!r} has a number out of range: budget is a positive time in seconds, rounds a whole number of at "
                f"least 1, update_bytes a number of bytes that is not negative, cache True or False. Leave a "
                f"field out to take its default."
            )

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        """Return the time of one training step through a chain, in seconds, measured now if it is not known yet."""
        case = (tuple(chain), flow)
        return self.measure([[case]]).get(case, self.modelled.seconds(chain, flow))

    def measure(self, groups: Iterable[Sequence[Case]], *, spent: float = 0.0) -> dict[Case, float]:
        """Return the times of cases in seconds; those of one group, which compete for one place, are timed in turns.

        What could not be timed, or not any more within the budget, is not there.

        Args:
            groups: What competes for each place, what is there now first.
            spent: Seconds of the budget that measuring for the same plan has taken already.
        """
        groups = [list(dict.fromkeys(group)) for group in groups]
        cases = [case for group in groups for case in group]
        keys: dict[Case, str] = {
            (chain, flow): self._key(chain, flow) for chain, flow in cases if flow is not None and _can_run(flow)
        }
        self._recall(keys.values())
        work = self._unknown(groups, keys)
        # What each group may take is its share of what is left, so that the last ones are not left out.
        weights = [sum(self.modelled.seconds(*case) for case in missing) for _, missing in work]
        done: set[str] = set()
        ends = time.perf_counter() + self.budget - spent
        with progress("timing layers", sum(len(missing) for _, missing in work)) as advance:
            for index, (first, missing) in enumerate(work):
                left = ends - time.perf_counter()
                if left > 0:
                    share = left * weights[index] / sum(weights[index:])
                    fresh = self._time_beside(first, missing, keys, share)
                    _known.update(fresh)
                    done.update(fresh)
                advance(len(missing))
        if self.cache and done - _hasty:
            Store(cache_folder()).put({key: _known[key] for key in done - _hasty})
        return {case: _known[key] + self._update(*case) for case, key in keys.items() if key in _known}

    def _unknown(self, groups: Iterable[Sequence[Case]], keys: Mapping[Case, str]) -> list[tuple[Case, list[Case]]]:
        """Return of each group its first case and those that are not known yet, each key once."""
        seen = set(_known)
        found = []
        for group in groups:
            missing = list({keys[case]: case for case in group if case in keys and keys[case] not in seen}.values())
            if missing:
                found.append((group[0], missing))
                seen |= {keys[case] for case in missing}
        return found

    def update_seconds(self, values: int, device: str) -> float:
        """Return how long an optimizer takes for its update of so many weight values, which only memory decides."""
        if not self.update_bytes:
            return 0.0
        return self.update_bytes * values / stream_rate(device, cache=self.cache)

    def _update(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        if flow is None or not _can_run(flow):
            return 0.0
        return self.update_seconds(parameters(chain), flow.setting.device)

    def _key(self, chain: tuple[Operation, ...], flow: Flow) -> str:
        return f"{describe_machine(flow.setting.device)} {(chain, flow.samples, flow.size, self._setting(flow))!r}"

    def _setting(self, flow: Flow) -> Setting:
        return flow.setting if self.autocast is None else replace(flow.setting, autocast=self.autocast)

    def _recall(self, keys: Iterable[str]) -> None:
        unknown = [key for key in dict.fromkeys(keys) if key not in _known]
        if self.cache and unknown:
            _known.update(Store(cache_folder()).get(unknown))

    def _time_beside(
        self, first: Case, missing: Sequence[Case], keys: Mapping[Case, str], most_seconds: float
    ) -> dict[str, float]:
        """Time what is missing in a group; its first, if known already, once more, to see how the machine is now."""
        is_old = time.perf_counter() - _at.get(keys[first], -math.inf) > _FRESH
        known = [first] if keys[first] in _known and is_old else []
        found = self._time([*known, *missing], most_seconds)
        _at.update({keys[case]: time.perf_counter() for case in found})
        _hasty.update(keys[case] for case, one in found.items() if len(one.trusted) < self.rounds)
        drift = [_known[keys[first]] / found[first].seconds for first in known if first in found]
        return {keys[case]: found[case].seconds * (drift or [1.0])[0] for case in missing if case in found}

    def _time(self, cases: Sequence[Case], most_seconds: float) -> dict[Case, Timing]:
        """Time cases in turns; one that cannot be run by itself, for want of memory or of a kernel, is left out."""
        works: dict[Case, Workload] = {}
        for case in cases:
            with contextlib.suppress(RuntimeError):
                chain, flow = case
                assert flow is not None
                flow = replace(flow, setting=self._setting(flow))
                works[case] = Workload(chain, flow, shares=tuple(works.values()))
        if not works:
            return {}
        device = next(iter(works.values())).setting.device
        runs = [work.run for work in works.values()]
        try:
            found = take_turns(runs, device=device, rounds=self.rounds, most_seconds=most_seconds)
        except RuntimeError:
            # One of them cannot compute its gradients, and the others can do without it.
            return (
                {} if len(cases) == 1 else {key: one for case in cases for key, one in self._time([case], 0.0).items()}
            )
        return {case: one.divided(works[case].steps) for case, one in zip(works, found, strict=True)}


def _can_run(flow: Flow) -> bool:
    return flow.setting.device_type != "meta"
