"""The second moments that a switch collects in the training steps before it decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from tdfx.distributed.processes import Processes
from tdfx.passes.analysis.moments import Moments
from tdfx.policies.policy import Policy
from tdfx.wrappers.in_place import InPlaceModule

COLLECTED_STEPS = 8
"""Steps at which moments are collected before a decision."""
_LARGEST_BATCHES = 2**26
"""Bytes of batches, from which batch norms' statistics are estimated, up to which they are part of a saved state."""


class Collection:
    """The moments of the model in training, from some step on, and the state of a former run to go on from."""

    def __init__(self, steps: int) -> None:
        self._steps = max(steps, 1)
        self._model: nn.Module | None = None
        self._moments: Moments | None = None
        self._saved: Mapping[str, Any] | None = None
        self._waiting: RemovableHandle | None = None
        self._trained: set[int] = set()

    @property
    def is_attached(self) -> bool:
        """True while the hooks are on a model."""
        return self._model is not None

    def attach(self, model: nn.Module) -> None:
        """Collect from the next step on, or go on doing so; a model that takes the place of another one goes on for it."""
        if isinstance(model, InPlaceModule):
            model = model.called
        if self._model is not model:
            saved = self.state_dict()
            self.remove()
            self._start(model, saved)

    def detach(self) -> Moments | None:
        """Take all hooks off the model, and return what was collected; None where no step was seen.

        ``attach`` goes on from there.
        """
        self._model = None
        self._stop_waiting()
        if self._moments is None:
            return None
        self._moments.remove()
        return self._moments if self._moments.units else None

    def remove(self) -> None:
        """Take all hooks off the model, and forget what was collected."""
        if self._moments is not None:
            self._moments.remove()
        self._stop_waiting()
        self._model = self._moments = self._saved = None

    def average(self, processes: Processes) -> None:
        """Average what was collected so far over the processes, which must call this together."""
        if self._moments is not None:
            self._moments.average(processes)

    def state_dict(self) -> Mapping[str, Any] | None:
        """Return what was collected so far, in plain types and tensors; None if nothing is being collected."""
        if self._moments is None:
            return self._saved
        batches = self._moments.batches
        leaves = tree_leaves(batches)
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
        if size > _LARGEST_BATCHES or not all(isinstance(leaf, Tensor | int | float | str | None) for leaf in leaves):
            batches = []
        # A clone has a storage of its own; a view, such as a slice of the data set, would save all of it.
        return {**self._moments.state_dict(), "batches": tree_map_only(Tensor, Tensor.clone, batches)}

    def load_state_dict(self, state: Mapping[str, Any] | None, optimizers: Sequence[Optimizer]) -> None:
        """Go on from a state, with the next module that is called and has the weights that were seen.

        Its parameters must be those of the optimizers, if some are given: it is not the only model in many a process.
        """
        self.remove()
        if state is not None:
            groups = (group for optimizer in optimizers for group in optimizer.param_groups)
            self._trained = {id(parameter) for group in groups for parameter in group["params"]}
            self._saved = state
            self._waiting = register_module_forward_pre_hook(self._join)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.remove()
        self._waiting = None

    def _join(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Begin to collect in a call of the model: the first one after a state was loaded, before ``attach`` can see it."""
        saved = self._saved
        if saved is None or not module.training:
            return
        if self._trained and not any(id(parameter) in self._trained for parameter in module.parameters()):
            return
        moments = Moments(module)
        if moments.knows(saved["sites"]):
            moments.remove()
            self.remove()
            self._start(module, saved).join(module, arguments)
        else:
            moments.remove()

    def _start(self, model: nn.Module, saved: Mapping[str, Any] | None) -> Moments:
        moments = Moments(model, steps=self._steps)
        if saved is not None:
            moments.load_state_dict(saved)
        self._model, self._moments = model, moments
        return moments


def wants_moments(policy: Policy) -> bool:
    """Return True if a policy, or any override of it, measures errors by moments where there are some."""
    others = (override for override in policy.overrides.values() if override is not None)
    return policy.metric != "weights" or any(map(wants_moments, others))
