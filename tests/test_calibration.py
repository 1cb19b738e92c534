"""Estimated times, calibrated by the measured times of other candidates and of other sites."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from budgeted import Scaled, X, net

from tdfx.cost.count import Flow
from tdfx.distributed.processes import Solo
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme
from tdfx.passes.analysis.shapes import ObserveInputs
from tdfx.passes.pipeline import find_sites
from tdfx.passes.planning.calibration import Calibration, SiteCalibration
from tdfx.passes.planning.site_cost import Candidate, calls_of
from tdfx.passes.planning.times import SiteTimes, TimingRequest
from tdfx.passes.program import Site


def sites_of_net() -> dict[str, Site]:
    program = ObserveInputs((X,))(find_sites(net())).program
    return {site.name: site for site in program.sites}


class SlowFactors(Scaled):
    """A machine on which factorized sites take longer, in proportion, than estimated."""

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        return super().seconds(chain, flow) * (2.5 if len(chain) > 1 else 1.0)


def test_how_slow_the_timed_sites_are_is_expected_of_the_others() -> None:
    cost, times, sites = SlowFactors(7.0), SiteTimes(Solo()), sites_of_net()
    least, half = (Candidate(get_scheme("svd"), (rank,)) for rank in (4, 24))
    lowest = {"svd": least}
    times.prepare([TimingRequest(cost, sites["6"], (least,))])
    uncalibrated = Calibration(times, cost)
    learned = uncalibrated.learn([(sites["6"], lowest), (sites["7"], lowest)], None)
    assert learned.dense == pytest.approx(7)
    assert learned.lowest["svd"] == pytest.approx(2.5)
    timed, untimed, naive = (
        calibration.of_site(sites[name], (least, half), lowest)
        for name, calibration in (("6", learned), ("7", learned), ("7", uncalibrated))
    )
    assert timed.seconds(least) == times.measured(cost, sites["6"], least)
    ((steps, flow),) = calls_of(sites["7"], least)
    assert untimed.seconds(least) == pytest.approx(cost.seconds(steps, flow))

    def gain(calibration: SiteCalibration, candidate: Candidate) -> float:
        return calibration.seconds(None) / calibration.seconds(candidate)

    assert gain(untimed, least) == pytest.approx(gain(naive, least) / 2.5)
    # Between the lowest ranks and the dense site, the scale goes over from one to the other.
    assert gain(naive, half) / 2.5 < gain(untimed, half) < gain(naive, half)


class SlowStart(Scaled):
    """A machine on which every operation takes a while to start, which estimates do not know."""

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        return 2.0 + super().seconds(chain, flow)


def test_times_between_measured_ones_are_on_a_line() -> None:
    cost, times, site = SlowStart(7.0), SiteTimes(Solo()), sites_of_net()["6"]
    least, half = (Candidate(get_scheme("svd"), (rank,)) for rank in (4, 16))
    times.prepare([TimingRequest(cost, site, (least,))])
    calibration = Calibration(times, cost).of_site(site, (least, half), {"svd": least})
    ((steps, flow),) = calls_of(site, half)
    assert times.measured(cost, site, half) is None
    assert calibration.seconds(half) == pytest.approx(cost.seconds(steps, flow))
    assert calibration.seconds(least) < calibration.seconds(half) < calibration.seconds(None)
