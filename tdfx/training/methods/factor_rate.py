"""``FactorRate``: a higher learning rate for factors, independent of groups and schedulers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from tdfx.checks import is_number
from tdfx.errors import ModelError, OptimizerError, PolicyError
from tdfx.layers.factorized import Factorized

SGD_TIMES = 2.0
"""The factor that ``Switch`` uses for SGD; chosen by ``tools/study_default.py``."""


class FactorRate:
    """Multiplies the learning rate of all factors of a model, by scaling their gradients inside ``optimizer.step()``.

    The step of SGD is proportional to the gradient, so a weight in factors moves with a speed that depends on their scale.
    Twice the rate gained accuracy in every training with SGD that was tried after a split in the metric of the loss. Adam and
    its kin divide the scale out, and gained nothing. Groups, schedulers and gradient clipping are not affected, gradients are
    restored after the step, and weight decay stays as it is.

    Args:
        model: A model that ``tdfx.rewrite`` returned. None for whichever factors the optimizer holds at its next step, as in
            a run that is resumed.
        optimizer: The SGD that trains it.
        times: How many times the rate of the factors is that of their group, positive.

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

    def __init__(self, model: nn.Module | None, optimizer: Optimizer, times: float = SGD_TIMES) -> None:
        if not isinstance(optimizer, SGD):
            raise OptimizerError(
                f"The step of {type(optimizer).__name__} is not proportional to the gradient, so scaling gradients would not "
                f"change the learning rate. Use SGD, or leave FactorRate out: other optimizers gained nothing from it."
            )
        if not (is_number(times) and times > 0):
            raise PolicyError(
                f"times={times!r} is not a positive number: it is how many times the learning rate of the factors is that of "
                f"their group. Pass for example times=2."
            )
        self.times = float(times)
        self._factors: WeakIdKeyDictionary | None = None
        if model is not None:
            self._factors = _factors_of(module for module in model.modules() if isinstance(module, Factorized))
            if not self._factors:
                raise ModelError(
                    f"{type(model).__name__} holds no factorized layer. Pass the model that tdfx.rewrite returned, and make a "
                    f"new FactorRate after each rewrite."
                )
            if not any(parameter in self._factors for parameter in _parameters(optimizer)):
                raise OptimizerError(
                    f"The {type(optimizer).__name__} holds none of the factors of this {type(model).__name__}: it trains "
                    f"another model, or wider copies of the parameters. Pass the optimizer that holds the model's own."
                )
        self._scaled: list[Tensor] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Give the factors the rate of their group again."""
        for handle in self._handles:
            handle.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Scale the gradients now, or once a closure has computed them."""
        if self._factors is None:
            self._factors = _factors_of(each for each in gc.get_objects() if issubclass(type(each), Factorized))
        self._restore()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._scale(optimizer)
            return None
        if "closure" in kwargs:
            return args, {**kwargs, "closure": self._scaling(optimizer, closure)}
        return (args[0], self._scaling(optimizer, closure), *args[2:]), kwargs

    def _scaling(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def scaled() -> Any:
            loss = closure()
            self._scale(optimizer)
            return loss

        return scaled

    @torch.no_grad()
    def _scale(self, optimizer: Optimizer) -> None:
        assert self._factors is not None
        factors = [parameter for parameter in _parameters(optimizer) if parameter in self._factors]
        self._scaled = [factor.grad for factor in factors if factor.grad is not None]
        if self._scaled:
            torch._foreach_mul_(self._scaled, self.times)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        if self._scaled:
            torch._foreach_div_(self._scaled, self.times)
        self._scaled = []


def _factors_of(layers: Iterable[Factorized]) -> WeakIdKeyDictionary:
    """Return the weights of factorized layers; it keeps none of them alive."""
    return WeakIdKeyDictionary({weight: True for layer in layers for weight in layer.weights})


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]
