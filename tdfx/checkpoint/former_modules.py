"""The former modules of classes that have moved, so that pickles of whole models from earlier versions still load.

``torch.save(model)`` writes each class as the name of its module and its own name, and loading imports that module. Files
of ``tdfx.save`` name no class and do not need this.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

_FACTORIZED, _GRAPH, _PLAN = "tdfx.layers.factorized", "tdfx.passes.transform.graph_module", "tdfx.plans.decisions"

FORMER: dict[str, dict[str, tuple[str, str]]] = {
    "tdfx.layers": {
        "Factorized": (_FACTORIZED, "Factorized"),
        "Origin": (_FACTORIZED, "Origin"),
        "Rest": ("tdfx.layers.frozen", "FrozenFactors"),
    },
    "tdfx.parameters": {"FactorizedParameter": ("tdfx.layers.parameter", "FactorizedParameter")},
    "tdfx.passes.graph_module": {"_Reference": (_GRAPH, "_Reference"), "_restore": (_GRAPH, "_restore")},
    "tdfx.plan": {"Plan": ("tdfx.plans.plan", "Plan"), "Reason": (_PLAN, "Reason"), "SitePlan": (_PLAN, "SitePlan")},
}
"""Former module -> name there -> the module and the name of what it is now."""


def register_former_modules() -> None:
    """Make the former names importable; a former module that no longer exists becomes a module of these names alone.

    What they are now is imported when a pickle asks for it.
    """
    for name, members in FORMER.items():
        # An entry in sys.modules leaves tdfx.plan, the function, as it is: only an import of a file would replace it.
        module = importlib.import_module(name) if name == "tdfx.layers" else ModuleType(name)
        vars(sys.modules.setdefault(name, module))["__getattr__"] = _Lookup(name, members)


class _Lookup:
    """The ``__getattr__`` of a former module."""

    def __init__(self, module: str, members: Mapping[str, tuple[str, str]]) -> None:
        self.module, self.members = module, members

    def __call__(self, name: str) -> Any:
        if name not in self.members:
            raise AttributeError(f"module {self.module!r} has no attribute {name!r}")
        module, now = self.members[name]
        return getattr(importlib.import_module(module), now)
