"""Compare modelled layer times with times measured on this machine, on the layers of some networks.

Each different call of a layer is timed dense, and with every scheme at four shares of its full ranks, in turns. The cost
models are compared with that. "times off" is the factor by which modelled times are wrong, after one common scale is
removed. "gains off" is the factor by which a model is wrong about how many times faster a layer gets. "decided otherwise"
is how often a model and the measurement disagree on whether that is at least the 1.05 times that a policy asks for.
"fitted" is Modelled with the three numbers that suit these times best: the best that its formula can do.

Takes about 10 minutes on one idle core.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import options
from bench_common import separate_times, set_clock, write_results
from bench_nets import BATCHES, BenchmarkNet, prepare_net
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

import tdfx
from tdfx.cost.modelled import Case, Cost
from tdfx.factors.operation import Operation
from tdfx.passes.analysis.find import Find
from tdfx.passes.analysis.shapes import ObserveInputs
from tdfx.passes.analysis.trace import Trace
from tdfx.passes.planning.by_budget import schemes_for
from tdfx.passes.planning.proposals import rounded
from tdfx.passes.planning.site_cost import Candidate, calls_of, current_chain
from tdfx.passes.program import Program, Site

SHARES = (0.125, 0.25, 0.5, 0.75)
"""Shares of the full ranks at which each scheme is timed."""
POLICY = tdfx.Policy()

Logs = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TimedChain:
    """One way to compute one call of a layer, with its measured time."""

    net: str
    name: str
    """Scheme and ranks."""
    dense: Case
    """The call of the dense layer."""
    case: Case
    """The chain of factors in its place."""
    dense_seconds: float
    seconds: float

    @property
    def gain(self) -> float:
        """How many times faster than the dense call it is."""
        return self.dense_seconds / self.seconds


def sites_of(net: BenchmarkNet) -> tuple[Site, ...]:
    """Return the sites of a network that may be rewritten, with the inputs that reach them."""
    program = Program(module=net.model, emit="graph")
    program = Find()(Trace()(program).program).program
    sites = ObserveInputs((net.x,))(program).program.sites
    return tuple(site for site in sites if site.reason is None and site.operation is not None and site.flows)


def chains_of(site: Site) -> Iterator[tuple[str, list[Case]]]:
    """Yield each way to compute a site by name, with a case for each of its calls; the dense layer comes first."""
    yield "dense", [(tuple(steps), flow) for steps, flow in calls_of(site, current_chain(site))]
    assert site.operation is not None
    for scheme in schemes_for(site.operation, POLICY):
        full = scheme.full_ranks(site.operation)
        shares = [tuple(math.ceil(share * rank) for rank in full) for share in SHARES]
        for ranks in dict.fromkeys(rounded(ranks, full, POLICY, site, scheme) for ranks in shares):
            if ranks != full:
                calls = calls_of(site, Candidate(scheme, tuple(ranks)))
                yield f"{scheme.name} {'/'.join(map(str, ranks))}", [(tuple(steps), flow) for steps, flow in calls]


def measure(net: BenchmarkNet, most_seconds: float, rounds: int) -> list[TimedChain]:
    """Time every way to compute the layers of a network, each different call once."""
    groups: dict[Case, dict[Case, str]] = {}
    for site in sites_of(net):
        names, cases = zip(*chains_of(site), strict=True)
        for same_call in zip(*cases, strict=True):
            groups.setdefault(same_call[0], dict(zip(same_call, names, strict=True)))
    cost = tdfx.Measured(budget=most_seconds, rounds=rounds, autocast=net.autocast, update_bytes=0, cache=False)
    with separate_times():
        seconds = cost.measure([list(group) for group in groups.values()])
    return [
        TimedChain(net.name, name, dense, case, seconds[dense], seconds[case])
        for dense, group in groups.items()
        if dense in seconds
        for case, name in group.items()
        if case != dense and case in seconds
    ]


def fitted(timed: Sequence[TimedChain]) -> tdfx.Modelled:
    """Return the model that is closest to the measured times, by the mean absolute difference of logarithms."""
    seconds_of = {chain.case: chain.seconds for chain in timed} | {chain.dense: chain.dense_seconds for chain in timed}
    start = tdfx.Modelled()

    def model(logs: Logs) -> tdfx.Modelled:
        flops, memory, call = np.exp(logs).tolist()
        return tdfx.Modelled(flops_per_second=flops, bytes_per_second=memory, seconds_per_call=call)

    def mean_difference(logs: Logs) -> float:
        candidate = model(logs)
        return float(np.mean([abs(math.log(candidate.seconds(*case) / s)) for case, s in seconds_of.items()]))

    start_logs = np.log([start.flops_per_second, start.bytes_per_second, start.seconds_per_call])
    return model(minimize(mean_difference, start_logs, method="Nelder-Mead", options={"maxiter": 400}).x)


@dataclass(frozen=True, slots=True)
class ModelDeviation:
    """How far a cost model is from the measurements; factors, where 1 means no deviation."""

    net: str
    model: str
    cases: int
    times: tuple[float, float]
    """Median and 90th percentile for times, after one common scale is removed."""
    gains: tuple[float, float]
    """The same for gains, without a scale."""
    otherwise: float
    """Share of the decisions that differ."""


def deviation(net: str, name: str, model: Cost, timed: Sequence[TimedChain]) -> ModelDeviation:
    """Compare a cost model with measurements."""
    modelled = [(model.seconds(*chain.dense), model.seconds(*chain.case)) for chain in timed]
    pairs = list(zip(modelled, timed, strict=True))
    times = np.log([after / chain.seconds for (_, after), chain in pairs])
    gains = np.log([before / after / chain.gain for (before, after), chain in pairs])
    least = POLICY.min_gain
    differ = [(before / after >= least) != (chain.gain >= least) for (before, after), chain in pairs]
    factors = _factors(times - np.median(times)), _factors(gains)
    return ModelDeviation(net, name, len(timed), *factors, otherwise=float(np.mean(differ)))


def _factors(logs: Logs) -> tuple[float, float]:
    """Return the median and the 90th percentile of the distances of logarithms from 0, as factors.

    >>> _factors(np.log([2.0, 0.5, 2.0]))
    (2.0, 2.0)
    """
    middle, high = np.exp(np.quantile(np.abs(logs), [0.5, 0.9]))
    return float(middle), float(high)


def table_of(deviations: Sequence[ModelDeviation]) -> Table:
    """Return the deviations as a table."""
    heads = ("model", "cases", "times off: median", "90 %", "gains off: median", "90 %", "decided otherwise")
    table = Table("network", *heads, box=None)
    for row in deviations:
        factors = (f"{factor:.2f}x" for factor in (*row.times, *row.gains))
        table.add_row(row.net, row.model, str(row.cases), *factors, f"{row.otherwise:.1%}")
    return table


def _to_dict(chain: TimedChain) -> dict[str, object]:
    (dense,), flow = chain.dense
    assert flow is not None
    setting = {"channels_last": flow.setting.channels_last, "dtype": str(flow.setting.computes_in)}
    return {
        "net": chain.net,
        "name": chain.name,
        "dense": _operation_dict(dense),
        "chain": [_operation_dict(step) for step in chain.case[0]],
        "flow": {"samples": flow.samples, "size": flow.size, **setting},
        "dense_seconds": chain.dense_seconds,
        "seconds": chain.seconds,
    }


def _operation_dict(operation: Operation) -> dict[str, object]:
    return {name: value for name, value in asdict(operation).items() if value not in (None, False)}


@options.command(__doc__)
@options.networks("--nets", ",".join(BATCHES))
@options.batch
@options.device
@options.threads(1)
@options.rounds(3, "samples of each call")
@options.measure_seconds(120.0, "each network")
@options.cpu_time
@options.json_file("Write the deviations to a file.")
@click.option("--times", "times_file", type=click.Path(path_type=Path), help="Write every measured time to a file.")
def main(
    nets: str,
    batch: int | None,
    device: str,
    threads: int,
    rounds: int,
    measure_seconds: float,
    cpu_time: bool,
    json_file: Path | None,
    times_file: Path | None,
) -> None:
    """Time, model, compare, print."""
    clock = set_clock(cpu_time, threads)
    names = nets.split(",")
    prepared = (prepare_net(name, batch=batch, device=device) for name in names)
    timed = [chain for net in prepared for chain in measure(net, measure_seconds, rounds)]
    models = {"Modelled()": tdfx.Modelled(), "of_machine": tdfx.Modelled.of_machine(device), "fitted": fitted(timed)}
    deviations = [
        deviation(net, name, model, [chain for chain in timed if net in (chain.net, "all")])
        for net, (name, model) in product([*names, "all"], models.items())
    ]
    Console(width=150).print(table_of(deviations))
    for name, model in models.items():
        click.echo(f"{name}: {model!r}")
    settings = {"clock": clock.__name__, "models": {name: asdict(model) for name, model in models.items()}}
    write_results(json_file, [asdict(row) for row in deviations], **settings)
    write_results(times_file, [_to_dict(chain) for chain in timed], **settings)


if __name__ == "__main__":
    main()
