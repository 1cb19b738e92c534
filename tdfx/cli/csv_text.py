"""Write the sites of a plan as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

from tdfx.plans.plan import SitePlan


def to_csv(sites: Sequence[SitePlan]) -> str:
    """Return a line of titles, and a line for each site with its numbers unrounded.

    >>> site = SitePlan(name="fc", kind="Linear", shape=(4, 8), calls=1, scheme="svd", ranks=(2,), parameters_before=32,
    ...                 parameters_after=24)
    >>> to_csv([site]).splitlines()[1][:32]
    'fc,Linear,4x8,1,1,False,,svd,2,,'
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([field.name for field in fields(SitePlan)])
    table.writerows([_cell(value) for value in astuple(site)] for site in sites)
    return text.getvalue().rstrip("\n")


def _cell(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value
