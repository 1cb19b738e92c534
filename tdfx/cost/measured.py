"""Measure the time of a site on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.optim import Optimizer

from tdfx.checks import is_count, is_number
from tdfx.cost.accelerators import ModelledByDevice
from tdfx.cost.count import Flow, parameters
from tdfx.cost.machine import describe_machine
from tdfx.cost.modelled import Case, Modelled
from tdfx.cost.rates import stream_rate
from tdfx.cost.setting import Setting
from tdfx.cost.store import Store, cache_folder
from tdfx.cost.timing import Timing, take_turns
from tdfx.cost.update import UpdateTime, time_update
from tdfx.cost.waiting import working_time
from tdfx.cost.workload import Workload
from tdfx.devices import free_memory, raise_if_broken
from tdfx.errors import PolicyError
from tdfx.factors.operation import Operation
from tdfx.progress import progress

_known: dict[str, float] = {}
"""Key -> the time that this process has measured or read from disk, in seconds."""
_FRESH = 60.0
"""Seconds for which a time is that of the machine as it is now."""
_measured_at: dict[str, float] = {}
"""Key -> when this process measured the time, by the clock."""
_loads: dict[str, float] = {}
"""Key -> the load of the machine when its time was taken: 2 if other processes had the processor for half of that time."""
_provisional: set[str] = set()
"""Keys of times with too few samples for lack of time; they count in this process, and are not kept on disk."""
_BUSY, _QUIET = 1.5, 1.1
"""Loads of a machine on which few samples have to do, since there is never time for more, and of one where they need not:
what was timed on the one is timed again on the other."""
_UPDATE_BYTES = 28
_load_now: list[float] = []
"""The load of the machine at each measurement of this process; the last one counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Time forward and backward of each site, dense and factorized, with the shapes, dtype, layout and threads it will have.

    Chains that compete for one place are timed in turns; the median of the undisturbed samples counts. Times are kept on
    disk by hardware, versions and shape (``tdfx cache`` shows and deletes them). The memory traffic of the optimizer's
    update is added. ``modelled`` estimates all times without example inputs, and what is left when ``budget`` is spent;
    measured times are never compared with estimated ones.
    """

    budget: float = 15.0
    """Seconds that measuring for one plan may take, positive; times from the cache cost nothing. Time for which other
    processes have the processor does not count, up to twice as much."""
    rounds: int = 3
    """Undisturbed samples of each computation, at least 1; two are enough where they agree closely."""
    autocast: torch.dtype | None = None
    """The dtype in which the training loop's autocast computes; None for the autocast in force where the plan is made."""
    cache: bool = True
    """Whether times are read from disk and written to it."""
    update_bytes: int = _UPDATE_BYTES
    """Bytes that the optimizer reads and writes for each weight value in one step, not negative: in float32 28 for Adam, 20
    for SGD with momentum. As many as are by default stand for an optimizer that is not known; one that ``plan``, ``rewrite``
    or ``Switch`` is given is timed."""
    update: UpdateTime | None = field(default=None, repr=False)
    """What the optimizer takes, in place of ``update_bytes``; None where it was not timed."""
    modelled: Modelled = field(default_factory=ModelledByDevice, repr=False)
    """The cost that estimates what was not measured."""

    def __post_init__(self) -> None:
        is_whole = is_count(self.rounds)
        numbers = all(is_number(value) or value == math.inf for value in (self.budget, self.update_bytes))
        if not (numbers and isinstance(self.cache, bool) and self.budget > 0 and is_whole and self.update_bytes >= 0):
            raise PolicyError(
                f"{self!r} has a number out of range: budget is a positive time in seconds, rounds a whole number of at "
                f"least 1, update_bytes a number that is not negative, cache True or False. Leave fields out for defaults."
            )

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        """Return the time of one training step through a chain, in seconds, measured now if it is unknown."""
        case = (tuple(chain), flow)
        return self.measure([[case]]).get(case, self.modelled.seconds(chain, flow))

    def measure(self, groups: Iterable[Sequence[Case]], *, spent: float = 0.0) -> dict[Case, float]:
        """Return the times of cases in seconds; cases that could not be timed within the budget are missing.

        Args:
            groups: Cases that compete for one place are one group, and are timed in turns; the present one is first.
            spent: Seconds of the budget that measuring for the same plan has taken already.
        """
        groups = [list(dict.fromkeys(group)) for group in groups]
        cases = [case for group in groups for case in group]
        flows = [(case, flow) for case in cases if (flow := case[1]) is not None and flow.setting.device_type != "meta"]
        keys = {case: self._key(case[0], flow) for case, flow in flows}
        self._read(keys.values())
        if _load_now and _load_now[-1] < _QUIET:
            for key in keys.values():
                if _loads.get(key, 1.0) > _BUSY:
                    _known.pop(key, None)
        work = self._unknown(groups, keys)
        # Each group may take its share of the time that is left, so that the last groups are measured too.
        weights = [sum(self.modelled.seconds(*case) for case in missing) for _, missing in work]
        measured: set[str] = set()
        count = sum(len(missing) for _, missing in work)
        with working_time() as worked, progress("timing layers", count) as advance:
            for index, (first, missing) in enumerate(work):
                if (left := self.budget - spent - worked()) > 0:
                    share = left * weights[index] / sum(weights[index:])
                    times = self._time_beside(first, missing, keys, share)
                    _known.update(times)
                    measured.update(times)
                advance(len(missing))
        self._write(measured - _provisional)
        return {
            case: _known[keys[case]] + self.update_seconds(parameters(case[0]), flow.setting.device, len(case[0]))
            for case, flow in flows
            if keys[case] in _known
        }

    def recall(self, names: Iterable[str | Case]) -> dict[str | Case, tuple[float, float]]:
        """Return times that were measured before, without the optimizer's share, and the loads of the machine then."""
        keys = {name: self._key_of(name) for name in names}
        self._read(keys.values())
        return {name: (_known[key], _loads.get(key, 1.0)) for name, key in keys.items() if key in _known}

    def record(self, times: Mapping[str | Case, tuple[float, float]], load: float) -> None:
        """Keep times of cases, or of anything under a name of its own, with their loads; ``load`` is that of now."""
        _load_now[:] = [load]
        keys = {self._key_of(name): pair for name, pair in times.items()}
        _known.update({key: seconds for key, (seconds, _) in keys.items()})
        _loads.update({key: load for key, (_, load) in keys.items()})
        _measured_at.update(dict.fromkeys(keys, time.perf_counter()))
        self._write(keys)

    def _read(self, keys: Iterable[str]) -> None:
        """Read times from disk that this process does not know."""
        unknown = [key for key in dict.fromkeys(keys) if key not in _known]
        if self.cache and unknown:
            entries = Store(cache_folder()).entries(unknown)
            _known.update({key: seconds for key, (seconds, _) in entries.items()})
            _loads.update({key: load for key, (_, load) in entries.items()})

    def _write(self, keys: Iterable[str]) -> None:
        """Keep times on disk."""
        if self.cache and (times := {key: _known[key] for key in keys}):
            Store(cache_folder()).put(times, {key: _loads[key] for key in times if key in _loads})

    def _key_of(self, name: str | Case) -> str:
        if isinstance(name, str):
            return name
        chain, flow = name
        assert flow is not None
        return self._key(chain, flow)

    def _unknown(self, groups: Iterable[Sequence[Case]], keys: Mapping[Case, str]) -> list[tuple[Case, list[Case]]]:
        """Return the first case of each group and its cases of unknown time, each key once."""
        seen = set(_known)
        work = []
        for group in groups:
            missing = {keys[case]: case for case in group if case in keys and keys[case] not in seen}
            if missing:
                work.append((group[0], list(missing.values())))
                seen.update(missing)
        return work

    def with_optimizers(self, optimizers: Sequence[Optimizer]) -> Measured:
        """Return the cost with the time of these optimizers' steps, unless it has the bytes of an update by its user."""
        if self.update_bytes != _UPDATE_BYTES or self.update is not None:
            return self
        return replace(self, update=time_update(optimizers))

    def update_seconds(self, values: int, device: str, tensors: int = 1) -> float:
        """Return how long an optimizer takes to update so many weight values, in so many tensors.

        Of an optimizer that was not timed only the memory traffic counts.
        """
        if self.update is not None:
            return self.update.seconds(values, tensors)
        return self.update_bytes * values / stream_rate(device, cache=self.cache) if self.update_bytes else 0.0

    def _key(self, chain: tuple[Operation, ...], flow: Flow) -> str:
        # The machine's description names the hardware of the device, so its index does not matter.
        setting = replace(self._setting(flow), device=flow.setting.device_type)
        again = " recomputed" if flow.recomputes else ""
        return f"{describe_machine(flow.setting.device)} {(chain, flow.samples, flow.size, setting)!r}{again}"

    def _setting(self, flow: Flow) -> Setting:
        return flow.setting if self.autocast is None else replace(flow.setting, autocast=self.autocast)

    def _time_beside(
        self, first: Case, missing: Sequence[Case], keys: Mapping[Case, str], most_seconds: float
    ) -> dict[str, float]:
        """Time the missing cases of a group; if its first case has an old time, scale by the ratio to its time now."""
        is_old = time.perf_counter() - _measured_at.get(keys[first], -math.inf) > _FRESH
        again = [first] if keys[first] in _known and is_old else []
        timings = self._time([*again, *missing], most_seconds)
        _measured_at.update({keys[case]: time.perf_counter() for case in timings})
        _loads.update({keys[case]: timing.load for case, timing in timings.items() if case in missing})
        few = [case for case, timing in timings.items() if not timing.is_settled(self.rounds) and timing.load < _BUSY]
        _provisional.update(keys[case] for case in few)
        ratios = [_known[keys[first]] / timings[first].seconds for first in again if first in timings]
        return {keys[case]: timings[case].seconds * (ratios or [1.0])[0] for case in missing if case in timings}

    def workload(self, case: Case, shares: Sequence[Workload] = ()) -> Workload:
        """Return what is timed for a case, sharing inputs with others of the same shapes."""
        chain, flow = case
        assert flow is not None
        return Workload(chain, replace(flow, setting=self._setting(flow)), shares)

    def _time(self, cases: Sequence[Case], most_seconds: float) -> dict[Case, Timing]:
        """Time cases in turns; a case that cannot be run alone, for lack of memory or of a kernel, is left out."""
        works: dict[Case, Workload] = {}
        for case in cases:
            try:
                works[case] = self.workload(case, tuple(works.values()))
            except RuntimeError as error:
                raise_if_broken(error)
        if not works:
            return {}
        runs = [work.run for work in works.values()]
        device = works[next(iter(works))].setting.device
        try:
            timings = take_turns(runs, device=device, rounds=self.rounds, most_seconds=most_seconds)
            return {case: timing.divided(works[case].steps) for case, timing in zip(works, timings, strict=True)}
        except RuntimeError as error:
            raise_if_broken(error)
        # One of the cases cannot compute its gradients, or all together need too much memory: each is timed by itself.
        works.clear()
        runs.clear()
        free_memory(device)
        return (
            {}
            if len(cases) == 1
            else {key: timing for case in cases for key, timing in self._time([case], 0.0).items()}
        )
