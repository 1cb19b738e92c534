"""Training some factors at a time, which saves the gradients of the others."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from tdfx.checks import check_whole
from tdfx.errors import OptimizerError, PolicyError, nearest
from tdfx.layers.frozen import FrozenFactors, frozen_factors
from tdfx.training.methods.gradient_wrappers import Processes
from tdfx.training.methods.hooks import leave_from_within
from tdfx.training.methods.turns import Train, turns_of

_LIVE: weakref.WeakKeyDictionary[FrozenFactors, weakref.ref[Freeze]] = weakref.WeakKeyDictionary()
"""Record of a layer's frozen factors -> the schedule that is in force."""


class Freeze:
    """Lets some factors of each factorized layer train at a time, while the others rest, and changes them by turns.

    A resting factor takes no gradient, so the backward pass does not compute it and the optimizer neither moves nor
    decays it; its state waits for its next turn. What remains is the pass forward and the gradients of the inputs: of a
    factor's work, one part in three is saved while it rests. Biases, other layers, and factors that do not train when this
    is made are left alone, and so is a layer of which fewer than two factors train.

    It acts on its own at the end of ``optimizer.step()``, so all gradients that are accumulated for a step are of the same
    factors; one that a factor still has when it goes to rest is dropped. ``merge`` and ``save`` see through it: no weight
    comes out frozen that trains by turns. Under ``torch.compile`` each set of factors that train together is compiled once.
    Make it on the wrapped model, after ``DistributedDataParallel`` or ``fully_shard``, on every process, and anew after
    each rewrite, which ends the former one: take its ``state_dict()`` first, and load it to go on where that one was. A
    rewrite that lowers ranks comes after ``remove()``.

    Source: Hajimolahoseini, Ahmed, Liu, *Training Acceleration of Low-Rank Decomposed Networks using Sequential Freezing
    and Rank Quantization*, arXiv:2309.03824, 2023.

    Args:
        model: A model that ``tdfx.rewrite`` returned.
        optimizer: The optimizer that trains it. Where there are several, make one of these for each.
        every: Optimizer steps until the turn changes, at least 1; the paper takes an epoch, ``len(loader)``.
        train: ``"alternate"`` (sequential freezing): the factor with the kernel, then the others, and again. ``"each"``: one
            factor after the other. ``"kernel"`` or ``"others"`` (regular freezing): those alone, for good; without
            ``every``.
        until: Optimizer steps after which all train, at least 1; None for no end.

    Raises:
        PolicyError: A setting is out of range, or they do not go together.
        ModelError: The model has no two factors to take turns, or is wrapped in what cannot do this, or the processes
            pass different settings.
        OptimizerError: The optimizer does not hold the factors, or is LBFGS; at a step, that it is captured in a CUDA graph,
            where turns could not change.

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
        self._processes = Processes(model)
        held = [one for group in optimizer.param_groups for one in group["params"]]
        self._turns = turns_of(model, train, held)
        self._processes.check_same((every, train, until), "settings")
        self._taken = 0
        records = [frozen_factors(turns.layer) for turns in self._turns]
        for former in [_LIVE[record]() for record in records if record in _LIVE]:
            if former is not None:
                former.remove()
        _LIVE.update({record: weakref.ref(self) for record in records})
        # Where a step is compiled, this is what it must not look into.
        hook = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
        self._handle = optimizer.register_step_post_hook(hook)
        self._done = False
        self._apply()

    @property
    def done(self) -> bool:
        """True once all factors train again for good, or the optimizer holds none of them any more."""
        return self._done

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of the parameters that rest now."""
        return tuple(name for one in self._turns for name in one.resting())

    def remove(self) -> None:
        """Let all factors train from now on. Call it after an optimizer step."""
        self._handle.remove()
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """Return how far it has come, in plain types."""
        return {**self._settings(), "taken": self._taken, "done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, with the factors whose turn it was.

        Raises:
            PolicyError: It is the state of something else, or of other settings. Then nothing was loaded.
            ModelError: The processes pass different states.
        """
        found = dict(state) if isinstance(state, Mapping) else {}
        taken, own = found.get("taken"), self._settings()
        whole = isinstance(taken, int) and not isinstance(taken, bool) and taken >= 0
        if {key: found.get(key) for key in own} != own or not whole or not isinstance(found.get("done"), bool):
            raise PolicyError(
                f"This is not the state of a Freeze with every={self.every}, train={self.train!r} and until={self.until}: "
                f"{found!r}. Make it with the settings that it was saved with."
            )
        if self._done and not found["done"]:
            raise PolicyError(
                "This Freeze has ended, and the state is of one that has not. Make it anew, then load the state."
            )
        self._processes.check_same((taken, found["done"]), "states")
        assert isinstance(taken, int)
        self._taken = taken
        if found["done"]:
            self.remove()
        else:
            self._apply()

    def __str__(self) -> str:
        every = "" if self.every is None else f", every={self.every}"
        until = "" if self.until is None else f", until={self.until}"
        head = f"Freeze(train={self.train!r}{every}{until}): {self._taken} steps"
        if self._done:
            return f"{head}, done"
        return f"{head}, {len(self.frozen)} of {sum(len(one.weights) for one in self._turns)} factors rest"

    def _settings(self) -> dict[str, Any]:
        return {"every": self.every, "train": self.train, "until": self.until}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._done or (self.every is None and self.until is None):
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise OptimizerError(
                "This step is captured in a CUDA graph, which would replay it with the factors of one turn for ever. Call "
                "remove() on this Freeze before the capture, or capture forward and backward alone, anew for each turn."
            )
        self._taken += 1
        over = self.until is not None and self._taken >= self.until
        if not over and self.every is not None and self._taken % self.every == 0:
            held = {id(one) for group in optimizer.param_groups for one in group["params"]}
            # A merge or another rewrite has put other parameters in the place of these.
            self._turns = [one for one in self._turns if all(id(weight) in held for weight in one.scheduled)]
            over = not self._turns
            self._apply()
        if over:
            self._end()
            leave_from_within(self._handle, optimizer)

    def _apply(self) -> None:
        """Let those train whose turn it is."""
        turn = 0 if self.every is None else self._taken // self.every

        def take() -> bool:
            changed = [one.take(turn) for one in self._turns]
            return any(changed)

        self._processes.change(take)

    def _end(self) -> None:
        def end() -> bool:
            changed = [one.end() for one in self._turns]
            return any(changed)

        self._processes.change(end)
        for turns in self._turns:
            _LIVE.pop(frozen_factors(turns.layer), None)
        self._turns = []
        self._done = True


def _check_settings(every: Any, train: Any, until: Any) -> None:
    if train not in get_args(Train):
        raise PolicyError(
            f"train={train!r} is not known: {', '.join(map(repr, get_args(Train)))} say which factors train. Nearest: "
            f"{nearest(str(train), get_args(Train))}."
        )
    by_turns = train in ("alternate", "each")
    if by_turns and every is None:
        raise PolicyError(f"train={train!r} changes by turns, and every= does not say when. Pass every=len(loader).")
    if not by_turns and every is not None:
        raise PolicyError(
            f"every={every!r} says when turns change, and with train={train!r} the same factors train for good. Leave it "
            f"out, or pass train='alternate'."
        )
    if every is not None:
        check_whole("every", every, "the optimizer steps until the turn changes", "every=500")
    if until is not None:
        check_whole("until", until, "the optimizer steps after which all factors train", "until=20_000")


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            f"optimizer={optimizer!r} is a {type(optimizer).__name__}, not a torch.optim.Optimizer, at whose steps turns "
            f"could change. Pass the optimizer that trains the model; for several, make one Freeze each."
        )
    if isinstance(optimizer, LBFGS):
        raise OptimizerError(
            "LBFGS keeps one flat history for all parameters together and moves those too that have no gradient. Use "
            "another optimizer, or leave this out."
        )
