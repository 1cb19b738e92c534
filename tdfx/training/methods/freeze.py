"""``Freeze``: train some factors at a time, which saves the gradients of the others."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from tdfx.checks import check_whole
from tdfx.errors import OptimizerError, PolicyError, nearest
from tdfx.layers.frozen import FrozenFactors, frozen_factors
from tdfx.training.methods.factor_groups import FactorGroups, Train, find_factor_groups
from tdfx.training.methods.gradient_wrappers import GradientWrappers
from tdfx.training.methods.step_hooks import groups_by_parameter, read_state, remove_within_step

_ACTIVE: weakref.WeakKeyDictionary[FrozenFactors, weakref.ref[Freeze]] = weakref.WeakKeyDictionary()
"""Record of a layer's frozen factors -> the schedule that sets it."""


class Freeze:
    """Trains some factors of each factorized layer at a time, keeps the others frozen, and changes them by turns.

    The backward pass computes no gradient of a frozen factor, which saves a third of its work, and the optimizer neither
    moves nor decays it; its state waits for the next turn. Biases, other layers, factors that do not train when the schedule
    is made, and layers with fewer than two factors that train are left alone.

    Turns change at the end of ``optimizer.step()``; a gradient that a factor still has when it is frozen is dropped.
    ``merge`` and ``save`` do not take a frozen factor for one that the user froze. ``torch.compile`` compiles once for each
    set of factors that train together. Make the schedule on the wrapped model, after ``DistributedDataParallel`` or
    ``fully_shard``, on every process. Make a new one after each rewrite, which ends the former one; load the former one's
    ``state_dict()`` to go on where it was. Call ``remove()`` before a rewrite that lowers ranks.

    Source: Hajimolahoseini, Ahmed, Liu, *Training Acceleration of Low-Rank Decomposed Networks using Sequential Freezing
    and Rank Quantization*, arXiv:2309.03824, 2023.

    Args:
        model: A model that ``tdfx.rewrite`` returned.
        optimizer: The optimizer that trains it. If there are several, make a schedule for each.
        every: Optimizer steps until the turn changes, at least 1; the paper takes an epoch, ``len(loader)``.
        train: ``"alternate"`` (sequential freezing): the factor with the kernel, then the others, and again. ``"each"``: one
            factor after the other. ``"kernel"`` or ``"others"`` (regular freezing): always the same; without ``every``.
        until: Optimizer steps after which all factors train, at least 1; None for no end.

    Raises:
        PolicyError: A setting is out of range, or the settings contradict each other.
        ModelError: No layer has two factors that train, a wrapper cannot change what trains, or the processes pass different
            settings.
        OptimizerError: It does not hold the factors, or is LBFGS; at a step, that it is captured in a CUDA graph.

    Example:
        >>> import tdfx, torch
        >>> policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)
        >>> model = tdfx.rewrite(torch.nn.Sequential(torch.nn.Linear(64, 64)), policy)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> freeze = tdfx.Freeze(model, optimizer, every=500)
        >>> freeze.frozen
        ('0.factors.1.weight',)
        >>> freeze.remove()
        >>> freeze.frozen, freeze.done
        ((), True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int | None = None,
        train: Train = "alternate",
        until: int | None = None,
    ) -> None:
        _check_settings(every, train, until)
        _check_optimizer(optimizer)
        self.every = every
        self.train = train
        self.until = until
        self._wrappers = GradientWrappers(model)
        self._layers = find_factor_groups(model, train, groups_by_parameter(optimizer))
        self._wrappers.check_same((every, train, until), "settings")
        self._taken = 0
        records = [frozen_factors(entry.layer) for entry in self._layers]
        for record in records:
            if record in _ACTIVE and (former := _ACTIVE[record]()) is not None:
                former.remove()
        _ACTIVE.update({record: weakref.ref(self) for record in records})
        # A compiled step must not trace into the hook.
        hook = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
        self._handle = optimizer.register_step_post_hook(hook)
        self._done = False
        self._apply()

    @property
    def done(self) -> bool:
        """True once all factors train for good, or the optimizer holds none of them any more."""
        return self._done

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of the parameters that are frozen now."""
        return tuple(name for entry in self._layers for name in entry.frozen_names())

    def remove(self) -> None:
        """Let all factors train from now on. Call it after an optimizer step."""
        self._handle.remove()
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """Return the settings and the steps taken, in plain types."""
        return {**self._settings(), "taken": self._taken, "done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned, with the factors whose turn it was.

        Raises:
            PolicyError: It is no state of a Freeze, or one with other settings. Then nothing was loaded.
            ModelError: The processes pass different states.
        """
        taken, done = read_state("Freeze", state, self._settings())
        if self._done and not done:
            raise PolicyError(
                "This Freeze has ended, and the state is of one that has not. Make a new Freeze, then load the state."
            )
        self._wrappers.check_same((taken, done), "states")
        self._taken = taken
        if done:
            self.remove()
        else:
            self._apply()

    def __str__(self) -> str:
        settings = {"train": self.train} | self._settings()
        shown = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value is not None)
        head = f"Freeze({shown}): {self._taken} steps"
        if self._done:
            return f"{head}, done"
        return f"{head}, {len(self.frozen)} of {sum(len(entry.weights) for entry in self._layers)} factors frozen"

    def _settings(self) -> dict[str, Any]:
        return {"every": self.every, "train": self.train, "until": self.until}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._done or (self.every is None and self.until is None):
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise OptimizerError(
                "This step is captured in a CUDA graph, which would replay it with the factors of one turn for ever. Call "
                "remove() on this Freeze before the capture, or capture only forward and backward, once for each turn."
            )
        self._taken += 1
        over = self.until is not None and self._taken >= self.until
        if not over and self.every is not None and self._taken % self.every == 0:
            held = groups_by_parameter(optimizer)
            # A merge or another rewrite may have put other parameters in the place of some.
            self._layers = [entry for entry in self._layers if all(id(weight) in held for weight in entry.scheduled)]
            over = not self._layers
            self._apply()
        if over:
            self._end()
            remove_within_step(self._handle, optimizer)

    def _apply(self) -> None:
        """Let the factors train whose turn it is."""
        turn = 0 if self.every is None else self._taken // self.every
        self._change(lambda entry: entry.train_group(turn))

    def _end(self) -> None:
        self._change(FactorGroups.train_all)
        for entry in self._layers:
            _ACTIVE.pop(frozen_factors(entry.layer), None)
        self._layers = []
        self._done = True

    def _change(self, set_requires_grad: Callable[[FactorGroups], bool]) -> None:
        """Set ``requires_grad`` in all layers, and set up again the wrappers that depend on it."""
        # Unlike any, sum sets all of them.
        self._wrappers.change(lambda: sum(map(set_requires_grad, self._layers)) > 0)


def _check_settings(every: Any, train: Any, until: Any) -> None:
    if train not in get_args(Train):
        raise PolicyError(
            f"train={train!r} is not known. Which factors train is one of {', '.join(map(repr, get_args(Train)))}. Nearest: "
            f"{nearest(str(train), get_args(Train))}."
        )
    by_turns = train in ("alternate", "each")
    if by_turns and every is None:
        raise PolicyError(
            f"train={train!r} changes by turns, and every= is missing, which says when. Pass every=len(loader)."
        )
    if not by_turns and every is not None:
        raise PolicyError(
            f"every={every!r} says when turns change, and with train={train!r} the same factors train for good. Leave "
            f"every= out, or pass train='alternate'."
        )
    if every is not None:
        check_whole("every", every, "the optimizer steps until the turn changes", "every=500")
    if until is not None:
        check_whole("until", until, "the optimizer steps after which all factors train", "until=20_000")


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            f"optimizer={optimizer!r} is a {type(optimizer).__name__}, not a torch.optim.Optimizer, and turns change at "
            f"optimizer steps. Pass the optimizer that trains the model; if there are several, make one Freeze for each."
        )
    if isinstance(optimizer, LBFGS):
        raise OptimizerError(
            "LBFGS keeps one flat history for all parameters and also moves parameters that have no gradient. Use another "
            "optimizer, or leave Freeze out."
        )
