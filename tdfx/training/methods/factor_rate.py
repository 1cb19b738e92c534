"""``FactorRate``: a higher learning rate for factors, independent of groups and schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from tdfx.checks import is_number
from tdfx.devices import precise
from tdfx.errors import ModelError, OptimizerError, PolicyError
from tdfx.layers.factorized import Factorized
from tdfx.layers.placement import full

_TIMES = 2.0
"""How many times the rate is by itself, where that is safe; a power of two, so that gradients are restored exactly."""
_LARGEST_SPEED = 10.0
"""The speed of a layer's product up to which the rate is raised by itself; see ``product_speed``."""


class FactorRate:
    """Multiplies the learning rate of a model's factors, by scaling their gradients inside ``optimizer.step()``.

    The step of SGD is proportional to the gradient, so a weight in factors moves with a speed that depends on their scale.
    After a split in the metric of the loss twice the rate gained accuracy with SGD on a small VGG. Adam divides the scale
    out, and gained nothing. Groups, schedulers, weight decay and gradient clipping are not affected, and
    gradients are restored after the step.

    Args:
        model: A model that ``tdfx.rewrite`` returned.
        optimizer: The SGD that trains it.
        times: How many times the rate of the factors is that of their group, positive. None for twice the rate in every
            layer whose product is slow enough to stay stable, and the same rate in the others.

    Raises:
        ModelError: The model holds no factorized layer.
        OptimizerError: The optimizer is not SGD, or holds none of the factors.
        PolicyError: ``times`` is out of range.

    Example:
        >>> import tdfx, torch
        >>> policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)
        >>> model = tdfx.rewrite(torch.nn.Sequential(torch.nn.Linear(64, 64)), policy)
        >>> rate = tdfx.FactorRate(model, torch.optim.SGD(model.parameters(), lr=0.1), times=2.0)
        >>> rate.remove()
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, times: float | None = None) -> None:
        if not isinstance(optimizer, SGD):
            raise OptimizerError(
                f"The step of {type(optimizer).__name__} is not proportional to the gradient, so scaling gradients would "
                f"not change the learning rate. Use SGD, or leave FactorRate out: other optimizers gained nothing from it."
            )
        if times is not None and not (is_number(times) and times > 0):
            raise PolicyError(
                f"times={times!r} is not a positive number: it is how many times the learning rate of the factors is that "
                f"of their group. Pass for example times=2."
            )
        layers = [module for module in model.modules() if isinstance(module, Factorized)]
        if not layers:
            raise ModelError(
                f"{type(model).__name__} holds no factorized layer. Pass the model that tdfx.rewrite returned, and make a "
                f"new FactorRate after each rewrite."
            )
        chosen = {weight: times or _times_of(layer) for layer in layers for weight in layer.weights}
        if not any(parameter in chosen for parameter in _parameters(optimizer)):
            raise OptimizerError(
                f"The {type(optimizer).__name__} holds none of the factors of this {type(model).__name__}: it trains "
                f"another model, or wider copies of the parameters. Pass the optimizer that holds the model's own."
            )
        self._times: WeakIdKeyDictionary | None = WeakIdKeyDictionary(chosen)
        self._saved: Sequence[float] = ()
        self._attach(optimizer)

    @classmethod
    def resumed(cls, optimizer: Optimizer, state: Mapping[str, Any]) -> FactorRate:
        """Go on from a state; its factors are those that the optimizer holds at its next step, in the same order."""
        rate = cls.__new__(cls)
        rate._times, rate._saved = None, tuple(map(float, state["times"]))
        rate._attach(optimizer)
        return rate

    def state_dict(self) -> dict[str, Any]:
        """Return how many times the rate is for each parameter of the optimizer, in its order."""
        times = (
            self._saved
            if self._times is None
            else [self._times.get(each, 1.0) for each in _parameters(self._optimizer)]  # type: ignore[no-untyped-call]
        )
        return {"times": list(times)}

    def remove(self) -> None:
        """Give the factors the rate of their group again."""
        for handle in self._handles:
            handle.remove()

    def _attach(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._scaled: list[Tensor] = []
        self._by: list[float] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Scale the gradients now, or once a closure has computed them."""
        self._restore()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._scale()
            return None
        if "closure" in kwargs:
            return args, {**kwargs, "closure": self._scaling(closure)}
        return (args[0], self._scaling(closure), *args[2:]), kwargs

    def _scaling(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def scaled() -> Any:
            loss = closure()
            self._scale()
            return loss

        return scaled

    @torch.no_grad()
    def _scale(self) -> None:
        if self._times is None:
            self._times = WeakIdKeyDictionary(zip(_parameters(self._optimizer), self._saved, strict=False))
        for parameter in _parameters(self._optimizer):
            times = self._times.get(parameter, 1.0)  # type: ignore[no-untyped-call]
            if parameter.grad is not None and times != 1:
                self._scaled.append(parameter.grad)
                self._by.append(times)
        if self._scaled:
            torch._foreach_mul_(self._scaled, self._by)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        if self._scaled:
            torch._foreach_div_(self._scaled, self._by)
        self._scaled, self._by = [], []


def _times_of(layer: Factorized) -> float:
    return _TIMES if product_speed([full(weight) for weight in layer.weights]) <= _LARGEST_SPEED else 1.0


def product_speed(factors: Sequence[Tensor]) -> float:
    """Return how fast the product of factors moves at most when they follow its gradient, relative to a dense weight.

    By the chain rule each factor moves the product by at most the squared spectral norms of the others, multiplied.

    >>> product_speed([torch.eye(3), 2 * torch.eye(3)])
    5.0
    """
    squares = [float(torch.linalg.matrix_norm(precise(factor.detach()).flatten(1), 2)) ** 2 for factor in factors]
    return math.fsum(math.prod(squares[:index] + squares[index + 1 :]) for index in range(len(squares)))


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]
