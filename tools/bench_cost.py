"""How far times by arithmetic are from times measured on this machine, on the layers of some networks.

Each different call of a layer is timed dense, and with every scheme at four shares of its full ranks, in turns. Then what
the models of cost say is held against that: "times" is by which factor they are off once all are put to one scale, "gains"
by which factor they are off in how many times faster a layer gets, and "decided otherwise" how often they say something
else than the measurement does of whether that is at least the 1.05 times that a policy asks for. "fitted" is Modelled with
the three numbers that suit these very times best: what its formula could come to.

Takes about 10 minutes on one quiet core.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from bench_common import keep, own_times, set_clock
from bench_nets import BATCHES, Net, ready
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

import tdfx
from tdfx.cost.count import Flow
from tdfx.cost.modelled import Case, Cost
from tdfx.factors.operation import Operation
from tdfx.passes.analysis.find import Find
from tdfx.passes.analysis.shapes import ObserveInputs
from tdfx.passes.analysis.trace import Trace
from tdfx.passes.planning.candidates import schemes_for
from tdfx.passes.planning.proposals import rounded
from tdfx.passes.planning.site_cost import calls_of, current_chain, factor_chain
from tdfx.passes.program import Program, Site

SHARES = (0.125, 0.25, 0.5, 0.75)
"""Of the full ranks, at which each scheme is timed."""
POLICY = tdfx.Policy()

Logs = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timed:
    """One way to compute one call of a layer."""

    net: str
    name: str
    """Scheme and ranks."""
    dense: Case
    """The call as it is."""
    case: Case
    """The chain in its place."""
    dense_seconds: float
    seconds: float
    """What both take, as measured."""

    @property
    def gain(self) -> float:
        """How many times faster it is."""
        return self.dense_seconds / self.seconds


def sites_of(net: Net) -> tuple[Site, ...]:
    """Return the layers of a network that may be rewritten, with what flows through them."""
    program = Program(module=net.model, emit="graph")
    program = Find()(Trace()(program).program).program
    found = ObserveInputs((net.x,))(program).program.sites
    return tuple(one for one in found if one.reason is None and one.operation is not None and one.flows)


def options_of(site: Site) -> Iterator[tuple[str, list[Case]]]:
    """Yield a name for each way to compute a layer, and what each of its calls runs; the layer as it is comes first."""
    yield "dense", [(tuple(steps), flow) for steps, flow in calls_of(site, current_chain(site))]
    assert site.operation is not None
    for scheme in schemes_for(site.operation, POLICY):
        full = scheme.full_ranks(site.operation)
        some = [tuple(math.ceil(share * most) for most in full) for share in SHARES]
        for ranks in dict.fromkeys(rounded(one, full, POLICY, site, scheme) for one in some):
            if ranks != full:
                calls = calls_of(site, factor_chain(scheme, ranks))
                yield f"{scheme.name} {'/'.join(map(str, ranks))}", [(tuple(steps), flow) for steps, flow in calls]


def measured(net: Net, most_seconds: float, rounds: int) -> list[Timed]:
    """Time all that the layers of a network may become, each different call once."""
    groups: dict[Case, dict[Case, str]] = {}
    for site in sites_of(net):
        names, cases = zip(*options_of(site), strict=True)
        for calls in zip(*cases, strict=True):
            groups.setdefault(calls[0], dict(zip(calls, names, strict=True)))
    cost = tdfx.Measured(budget=most_seconds, rounds=rounds, autocast=net.autocast, update_bytes=0, cache=False)
    with own_times():
        found = cost.measure([list(group) for group in groups.values()])
        return [
            Timed(net.name, name, dense, case, found[dense], found[case])
            for dense, group in groups.items()
            if dense in found
            for case, name in group.items()
            if case != dense and case in found
        ]


def fitted(timed: Sequence[Timed]) -> tdfx.Modelled:
    """Return the model whose three numbers are nearest to the times, by the mean of the absolute logarithms."""
    cases = {one.case: one.seconds for one in timed} | {one.dense: one.dense_seconds for one in timed}
    start = tdfx.Modelled()

    def model(logs: Logs) -> tdfx.Modelled:
        flops, memory, call = np.exp(logs).tolist()
        return tdfx.Modelled(flops_per_second=flops, bytes_per_second=memory, seconds_per_call=call)

    def off(logs: Logs) -> float:
        made = model(logs)
        return float(np.mean([abs(math.log(made.seconds(*case) / seconds)) for case, seconds in cases.items()]))

    first = np.log([start.flops_per_second, start.bytes_per_second, start.seconds_per_call])
    return model(minimize(off, first, method="Nelder-Mead", options={"maxiter": 400}).x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far what a model says is from the measurements; factors, of which 1 is none."""

    net: str
    model: str
    cases: int
    times: tuple[float, float]
    """Median and 90th percentile for times, all in one scale."""
    gains: tuple[float, float]
    """The same for gains."""
    otherwise: float
    """Part of the decisions that differ."""


def distance(net: str, name: str, model: Cost, timed: Sequence[Timed]) -> Distance:
    """Hold what a model says against measurements."""
    both = [(model.seconds(*one.dense), model.seconds(*one.case)) for one in timed]
    times = np.log([said / one.seconds for (_, said), one in zip(both, timed, strict=True)])
    gains = np.log([before / after / one.gain for (before, after), one in zip(both, timed, strict=True)])
    least = POLICY.min_gain
    differ = [
        (before / after >= least) != (one.gain >= least) for (before, after), one in zip(both, timed, strict=True)
    ]
    return Distance(
        net=net,
        model=name,
        cases=len(timed),
        times=_factors(times - np.median(times)),
        gains=_factors(gains),
        otherwise=float(np.mean(differ)),
    )


def _factors(logs: Logs) -> tuple[float, float]:
    """Return the median and the 90th percentile of how far logarithms are from 0, as factors.

    >>> _factors(np.log([2.0, 0.5, 2.0]))
    (2.0, 2.0)
    """
    middle, high = np.exp(np.quantile(np.abs(logs), [0.5, 0.9]))
    return float(middle), float(high)


def table_of(distances: Sequence[Distance]) -> Table:
    """Return the distances as a table."""
    heads = ("model", "cases", "times off: median", "90 %", "gains off: median", "90 %", "decided otherwise")
    table = Table("network", *heads, box=None)
    for one in distances:
        factors = (f"{factor:.2f}x" for factor in (*one.times, *one.gains))
        table.add_row(one.net, one.model, str(one.cases), *factors, f"{one.otherwise:.1%}")
    return table


def _to_dict(one: Timed) -> dict[str, object]:
    (dense,), flow = one.dense
    assert flow is not None
    return {
        "net": one.net,
        "name": one.name,
        "dense": _shape(dense),
        "chain": [_shape(step) for step in one.case[0]],
        "flow": _flow(flow),
        "dense_seconds": one.dense_seconds,
        "seconds": one.seconds,
    }


def _shape(operation: Operation) -> dict[str, object]:
    return {name: value for name, value in asdict(operation).items() if value not in (None, False)}


def _flow(flow: Flow) -> dict[str, object]:
    last = flow.setting.channels_last
    return {"samples": flow.samples, "size": flow.size, "channels_last": last, "dtype": str(flow.setting.computes_in)}


@click.command(help=__doc__)
@click.option("--nets", default=",".join(BATCHES), show_default=True, help="Names, of tools/nets.py or torchvision.")
@click.option("--batch", type=click.IntRange(min=1), help="Images in a batch; else what suits each network.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Undisturbed samples of each.")
@click.option("--measure-seconds", default=120.0, show_default=True, help="What measuring may take, for each network.")
@click.option("--cpu-time", is_flag=True, help="Count the time of one thread's computation: for a loaded machine.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the distances to a file.")
@click.option("--times", "times_file", type=click.Path(path_type=Path), help="Write every time to a file.")
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
    timed: list[Timed] = []
    for name in nets.split(","):
        timed += measured(ready(name, batch=batch, device=device), measure_seconds, rounds)
    machine = tdfx.Modelled.of_machine(device)
    models = {"Modelled()": tdfx.Modelled(), "of_machine": machine, "fitted": fitted(timed)}
    distances = []
    for net in (*nets.split(","), "all"):
        own = [one for one in timed if net in (one.net, "all")]
        distances += [distance(net, name, model, own) for name, model in models.items()]
    Console(width=150).print(table_of(distances))
    for name, model in models.items():
        click.echo(f"{name}: {model!r}")
    settings = {"clock": clock.__name__, "models": {name: asdict(one) for name, one in models.items()}}
    keep(json_file, [asdict(one) for one in distances], **settings)
    keep(times_file, [_to_dict(one) for one in timed], **settings)


if __name__ == "__main__":
    main()
