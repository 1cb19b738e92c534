"""Notices that a training goes on with a model that a switch has replaced."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tdfx.api import is_known_dense
from tdfx.errors import ModelError
from tdfx.passes.transform.merge import is_rewritten
from tdfx.plans.plan import Plan
from tdfx.wrappers.compiled import inner_module
from tdfx.wrappers.in_place import InPlaceModule


class ModelGuard:
    """Says at the next step of a switch if the loop does not train the model that it should train since a switch."""

    def __init__(self) -> None:
        self._replaced: ReplacedModel | None = None
        self._plan: Plan | None = None

    def switched(self, replaced: ReplacedModel, model: nn.Module) -> None:
        """From now on, expect the model that has taken the place of another one."""
        replaced.replaced_by(model)
        self._replaced = replaced

    def loaded(self, plan: Plan | None) -> None:
        """From now on, expect a model in the form of a state that was loaded: rewritten by its plan, if there is one."""
        self._replaced, self._plan = None, plan

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process: a copy elsewhere expects nothing."""
        return {"_replaced": None, "_plan": None}

    def check(self, model: nn.Module) -> None:
        """Raise ModelError if this is not the model that is expected, or if it is not what the loop trains."""
        if self._plan is not None:
            _check_resumed(model, self._plan)
            self._plan = None
        if self._replaced is not None:
            self._replaced.check(model)


class ReplacedModel:
    """The weights that a switch has replaced, as long as somebody holds them. It keeps nothing alive and reads no values.

    Args:
        model: The model that will be replaced, in whatever wrappers.
        step: The step of the switch.
    """

    def __init__(self, model: nn.Module, step: int) -> None:
        self._step = step
        self._old = [_Noted.of(parameter) for parameter in _parameters(model)]
        self._factors: list[_Noted] = []
        self._checked: weakref.ref[nn.Module] | None = None

    def replaced_by(self, model: nn.Module) -> None:
        """Tell the replaced weights from those that are shared, and note the new ones."""
        after = {id(parameter): parameter for parameter in _parameters(model)}
        before = {id(weight.tensor()) for weight in self._old}
        self._old = [weight for weight in self._old if id(weight.tensor()) not in after]
        factors = [factor for key, factor in after.items() if key not in before]
        self._factors = [_Noted.of(factor) for factor in factors if factor.requires_grad]

    def check(self, model: nn.Module) -> None:
        """Raise ModelError if this model holds the weights that were replaced, or if the loop trains these elsewhere."""
        self._old = [weight for weight in self._old if weight.tensor() is not None]
        if not self._old:
            return
        module = _module(model)
        if self._checked is None or self._checked() is not module:
            replaced = {id(weight.tensor()) for weight in self._old}
            if any(id(parameter) in replaced for parameter in _parameters(model)):
                self._refuse(model)
            self._checked = weakref.ref(module)
        if any(factor.was_trained for factor in self._factors):
            self._factors = []
        if self._factors and any(weight.has_new_gradient for weight in self._old):
            raise ModelError(
                f"Since the switch at step {self._step} the model that was replaced has received new gradients, and the "
                f"factors none: the loop trains another reference to it, such as its compiled or "
                f"DistributedDataParallel form, or an attribute that holds it. Pass that form to step(), and train what it "
                f"returns: model = switch.step(model, ...)."
            )

    def _refuse(self, model: nn.Module) -> None:
        advice = "Write model = switch.step(model, ...), and train what it returns."
        if isinstance(model, InPlaceModule):
            advice = "Move what step() returned into the module at once: part.replace_with(rewritten)."
        raise ModelError(
            f"step() got the {type(inner_module(_module(model))).__name__} that the switch replaced at step {self._step}: "
            f"what it returned then was dropped, and nobody trains the rewritten model. {advice}"
        )


@dataclass(frozen=True, slots=True)
class _Noted:
    """A parameter and its gradient, with torch's counts of what was written to them; it keeps neither alive."""

    tensor: weakref.ref[Tensor]
    writes: int
    gradient: weakref.ref[Tensor] | None
    gradient_writes: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Noted:
        gradient = tensor.grad
        noted = (None, 0) if gradient is None else (weakref.ref(gradient), gradient._version)
        return cls(weakref.ref(tensor), tensor._version, *noted)

    @property
    def has_new_gradient(self) -> bool:
        """True if a backward has written to the gradient since."""
        tensor = self.tensor()
        gradient = None if tensor is None else tensor.grad
        if gradient is None:
            return False
        return self.gradient is None or gradient is not self.gradient() or gradient._version != self.gradient_writes

    @property
    def was_trained(self) -> bool:
        """True if it moved by another gradient than the one that it had, or if it is gone."""
        tensor = self.tensor()
        return tensor is None or self.has_new_gradient or (tensor._version != self.writes and tensor.grad is None)


def _check_resumed(model: nn.Module, plan: Plan) -> None:
    """Raise ModelError if a loaded state says that sites were switched, and the model holds no factors."""
    module = _module(model)
    if is_rewritten(module) or is_known_dense(module) or is_known_dense(inner_module(module)):
        return
    sites = [site.name or "the model itself" for site in plan.factorized]
    raise ModelError(
        f"The state that was loaded says that {len(sites)} sites were switched, {sites[0]!r} first, and this "
        f"{type(inner_module(module)).__name__} holds no factors. Give it its form before it trains: tdfx.load(...), or "
        f"model = tdfx.rewrite(model, switch.plan, optimizer=optimizer) and then load_state_dict. If it was merged since, "
        f"leave the Switch out, or begin a new one."
    )


def _module(model: nn.Module) -> nn.Module:
    return model.target if isinstance(model, InPlaceModule) else model


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    parameters: Iterable[nn.Parameter] = _module(model).parameters()
    return list(parameters)
