"""Warns of an optimizer that was left behind: it goes on with weights that a rewrite or a merge has replaced.

``rewrite`` without ``optimizer=`` is right where a new optimizer follows, and where none is used. Only the steps of an
optimizer show that it was forgotten, so those are watched until the new parameters move or are gone.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from tdfx.errors import TdfxWarning

_LOOKS = 100
"""Steps of an optimizer with replaced weights after which new ones without gradients are taken for a copy, not trained."""


class LeftBehind:
    """The weights that were replaced and those that took their place; it keeps none of them alive and reads no values."""

    def __init__(self, old: Iterable[Tensor], new: Iterable[Tensor], verb: str) -> None:
        self._old = _by_id(old)
        # torch counts the writes to each tensor.
        self._new = {key: (ref, tensor._version) for key, ref in _by_id(new).items() if (tensor := ref()) is not None}
        self._verb = verb
        self._counts: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        """Optimizers that hold none of these weights -> how many parameters they held then."""
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Optimizers that hold replaced weights and have taken a step."""
        self._warned = False
        self._looks = 0

    @property
    def is_over(self) -> bool:
        """True once there is nothing more to find out."""
        living = (
            any(ref() is not None for ref in self._old.values()),
            any(ref() is not None for ref, _ in self._new.values()),
        )
        return self._warned or not all(living)

    def after_step(self, optimizer: Optimizer) -> bool:
        """Look at an optimizer after its step; return True once there is nothing more to find out."""
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if self._counts.get(optimizer) == count:
            return False
        if self.is_over:
            return True
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        living = {key: (tensor, writes) for key, (ref, writes) in self._new.items() if (tensor := ref()) is not None}
        if held & living.keys() or any(tensor._version != writes for tensor, writes in living.values()):
            return True  # they are trained
        replaced = {key for key, ref in self._old.items() if ref() is not None} & held
        if not replaced:
            self._counts[optimizer] = count
            return False
        self._looks += 1
        unmoved = sum(tensor.grad is not None for tensor, _ in living.values())
        if not unmoved:
            return self._looks >= _LOOKS
        if optimizer not in self._seen:
            self._seen.add(optimizer)  # another optimizer may have its turn before this one's next step
            return False
        self._warned = True  # a warning may be raised as an error
        warnings.warn(
            f"{type(optimizer).__name__} has taken two steps, and {unmoved} parameters with gradients did not move: it "
            f"still holds {len(replaced)} weights that tdfx.{self._verb} has replaced, and the new ones are in no "
            f"optimizer. Pass optimizer= to tdfx.{self._verb} (or to Switch.step), or make a new optimizer from the "
            f"returned model's parameters.",
            TdfxWarning,
            stacklevel=4,
        )
        return True


_watched: list[LeftBehind] = []
_handle: RemovableHandle | None = None


def watch_steps(left: LeftBehind) -> None:
    """Look at the steps of all optimizers until it is known whether one was left behind."""
    global _handle  # one hook for all, since torch's is global too
    _watched[:] = [each for each in _watched if not each.is_over]
    _watched.append(left)
    if _handle is None:
        _handle = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, arguments: Any, named: Any) -> None:
    global _handle
    if torch.compiler.is_compiling():  # of a step that is compiled, nothing can be seen
        return
    try:
        for left in list(_watched):
            if left.after_step(optimizer):
                _watched.remove(left)
    finally:
        if not _watched and _handle is not None:
            _handle.remove()
            _handle = None


def _by_id(tensors: Iterable[Tensor]) -> dict[int, weakref.ref[Tensor]]:
    return {id(tensor): weakref.ref(tensor) for tensor in tensors if tensor.requires_grad}
