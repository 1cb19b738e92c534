"""Recognize a policy by the text that this version or an earlier one printed, as saved states hold it."""

from __future__ import annotations

import re

from tdfx.policies.policy import PUBLIC, Policy
from tdfx.ranks.budget import Budget
from tdfx.text import without_addresses

_REPLACED = (
    (re.compile(r"\bTarget\((?=parameters=|flops=)"), "Budget("),
    (re.compile(r", error='(outputs|curvature)'"), ""),
    (re.compile(r", metric='auto'"), ""),
    (re.compile(r", recompute=False"), ""),
)
"""What earlier versions printed -> what this version prints for the same settings."""


def is_text_of(text: str, policy: Policy) -> bool:
    """Return True if a text was printed for a policy that decides as this one does.

    Earlier versions printed every setting in force for an override, but not a rank that it left out. An override without a
    cost of its own, whose sites are part of a budget, had the default cost in Python and the policy's cost in files.

    >>> is_text_of(repr(Policy(scheme="svd")), Policy(scheme="svd"))
    True
    """
    texts = (repr(policy), _former_text(policy, from_file=False), _former_text(policy, from_file=True))
    return _normalize(text) in map(_normalize, texts)


def _normalize(text: str) -> str:
    text = without_addresses(text)
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return text


def _former_text(policy: Policy, override: Policy | None = None, *, from_file: bool) -> str:
    """Return the former text of a policy with all settings in force; ``override`` is what it was given as, if it is one."""
    settings = {name: repr(getattr(policy, name)) for name in PUBLIC}
    pairs = zip(policy._resolved.items(), policy.overrides.values(), strict=True)
    inner = (f"{name!r}: {now and _former_text(now, given, from_file=from_file)}" for (name, now), given in pairs)
    settings["overrides"] = f"{{{', '.join(inner)}}}"
    if override is not None and "rank" in override._left_out:
        del settings["rank"]
        if "cost" not in override._left_out or (isinstance(policy.rank, Budget) and not from_file):
            settings["cost"] = repr(override.cost)
    return f"Policy({', '.join(f'{name}={text}' for name, text in settings.items())})"
