"""The former modules of classes that have moved, so that pickles of whole models from earlier versions still load.

``torch.save(model)`` writes each class as the name of its module and its own name, and loading imports that module. Files
of ``tdfx.save`` name no class and do not need this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tdfx.layers.factorized import Factorized, Origin
from tdfx.layers.frozen import FrozenFactors
from tdfx.layers.parameter import FactorizedParameter
from tdfx.passes.transform import graph_module
from tdfx.plans.plan import Plan, Reason, SitePlan

FORMER: dict[str, dict[str, Callable[..., Any]]] = {
    "tdfx.layers": {"Factorized": Factorized, "Origin": Origin, "Rest": FrozenFactors},
    "tdfx.parameters": {"FactorizedParameter": FactorizedParameter},
    "tdfx.passes.graph_module": {"_Reference": graph_module._Reference, "_restore": graph_module._restore},
    "tdfx.plan": {"Plan": Plan, "Reason": Reason, "SitePlan": SitePlan},
}
"""Former module -> name there -> what it is now."""


def register_former_modules() -> None:
    """Make the former names importable; a former module that no longer exists becomes a module of these names alone."""
    for name, members in FORMER.items():
        # An entry in sys.modules leaves tdfx.plan, the function, as it is: only an import of a file would replace it.
        vars(sys.modules.setdefault(name, ModuleType(name))).update(members)
