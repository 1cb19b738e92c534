"""The attributes in which every module keeps its own state, and those that a class declares as slots."""

from __future__ import annotations

import types
from collections.abc import Iterator

from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""The attributes in which a module keeps the hooks of its calls."""

STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""The attributes in which a module keeps the hooks of saving and loading."""

MODULE_STATE = frozenset(nn.Module().__dict__)
"""The attributes in which every module keeps its own state: parameters, buffers, children, hooks, mode."""

COMPILED = "_compiled_call_impl"
"""The attribute that ``module.compile()`` sets: code that works for the module it was called on, and for no copy."""


def slots_of(kind: type) -> Iterator[tuple[str, types.MemberDescriptorType]]:
    """Yield the ``__slots__`` of a class, by name."""
    for base in kind.__mro__:
        if "__slots__" in vars(base):
            for name, value in vars(base).items():
                if isinstance(value, types.MemberDescriptorType):
                    yield name, value
