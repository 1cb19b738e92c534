"""Master weights: copies of a model's parameters in a wider type, which the optimizer trains and the model is given rounded.

The passes run on a copy of the model that holds the masters, so that it is their values that are split and joined. What
comes of it gets the model's own parameters back, and rounded copies of what is new; the masters stay with the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tdfx.errors import OptimizerError
from tdfx.layers.copying import structural_copy
from tdfx.layers.factorized import Factorized, kernel_factor, like_parameter
from tdfx.optim.pairs import Pair, nowhere, unpacked
from tdfx.optim.surgery import Exchange


@dataclass(frozen=True, slots=True)
class Sides:
    """What is exchanged in the optimizers, and what in the model: the same where there are no masters."""

    optimizer: list[Exchange]
    model: list[Exchange]

    @property
    def every(self) -> list[Exchange]:
        """Both, each once."""
        return list({id(one): one for one in [*self.optimizer, *self.model]}.values())


@dataclass(slots=True)
class Masters:
    """The masters that were passed, found to go with the model; without any, nothing here does anything."""

    pairs: list[Pair] = field(default_factory=list)
    write: Callable[[list[Pair]], None] = nowhere
    """Puts other pairs into the container that was passed."""
    _stand_ins: dict[int, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)
    """What a lifted module holds, by identity -> the model's parameter and its master."""
    _new: dict[int, list[Pair]] = field(default_factory=dict)
    """Parameter that leaves the model, by identity -> the pairs that come in its place."""

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def named(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the masters that are not the parameters themselves, by the names of these in the model."""
        names = {id(one): name for name, one in model.named_parameters()}
        return {names[id(parameter)]: master for parameter, master in self.pairs if parameter is not master}

    def renewed(
        self, model: nn.Module, made: nn.Module, loaded: Mapping[str, Tensor], dense_of: Mapping[str, str]
    ) -> None:
        """Put the masters of a model that was loaded into the container.

        Args:
            model: Whose masters these are.
            made: The one that takes its place.
            loaded: The masters of that one by the names of their parameters.
            dense_of: Name of a factor's parameter there -> that of the dense one.
        """
        own = {id(parameter) for parameter, master in self.pairs if parameter is master}
        names = {name for name, one in model.named_parameters() if id(one) in own}
        found = made.named_parameters()
        self.write(
            [(one, loaded.get(name, one)) for name, one in found if name in loaded or dense_of.get(name, name) in names]
        )

    def with_masters(self, module: nn.Module) -> nn.Module:
        """Return a copy of a module with the masters in the place of its parameters; without masters, itself."""
        if not self:
            return module
        stands_for: dict[int, nn.Parameter] = {}
        for parameter, master in self.pairs:
            # Modules take parameters alone, and many loops keep masters as plain tensors.
            own = master if isinstance(master, nn.Parameter) else nn.Parameter(master.detach(), master.requires_grad)
            stands_for[id(parameter)] = own
            self._stand_ins[id(own)] = (parameter, master)
        lifted = structural_copy(module)
        _exchange(lifted, stands_for)
        return lifted

    def detached(self, layer: Factorized) -> Factorized:
        """Return a layer that keeps the masters when those of the model are lowered again."""
        return cast("Factorized", structural_copy(layer)) if self else layer

    def sides(self, exchanges: Sequence[Exchange], optimizers: Sequence[Optimizer]) -> Sides:
        """Tell what is exchanged in the optimizers from what is exchanged in the model.

        Raises:
            OptimizerError: A weight that is to be replaced has no master, and no optimizer trains it without one.
        """
        if not self:
            return Sides(list(exchanges), list(exchanges))
        trained = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
        _check_complete(exchanges, self._stand_ins, trained, bool(optimizers))
        above = [self._of_optimizer(one) for one in exchanges]
        return Sides(above, [self._of_model(one) for one in above])

    def without_masters(self, made: nn.Module, sides: Sides) -> None:
        """Give what came of a lifted module the model's own parameters, and those that are new."""
        if not self:
            return
        held = {key: parameter for key, (parameter, _) in self._stand_ins.items()}
        held |= {
            id(master): parameter
            for above, below in zip(sides.optimizer, sides.model, strict=True)
            for master, parameter in zip(above.new, below.new, strict=True)
        }
        _exchange(made, held)
        for layer in made.modules():
            if isinstance(layer, Factorized):
                _retype(layer)

    def commit(self) -> None:
        """Put the pairs of the model that was returned into the container; nothing here can fail."""
        if not self:
            return
        made: list[Pair] = []
        for parameter, master in self.pairs:
            made += self._new.get(id(parameter), [(parameter, master)])
        self.write(made)

    def _of_optimizer(self, exchange: Exchange) -> Exchange:
        """Return an exchange with the masters themselves for what stands for them in a module."""

        def real(one: nn.Parameter) -> nn.Parameter:
            return cast("nn.Parameter", self._stand_ins.get(id(one), (one, one))[1])

        bias = None if exchange.bias is None else real(exchange.bias)
        return replace(exchange, old=tuple(map(real, exchange.old)), bias=bias)

    def _of_model(self, exchange: Exchange) -> Exchange:
        """Return the exchange of the model's parameters for rounded copies of the new masters."""
        of = {id(master): parameter for parameter, master in self.pairs}
        old = tuple(of.get(id(one), one) for one in exchange.old)
        # A parameter that is its own master stays one, and so does what comes of it.
        own = all(parameter is master for parameter, master in zip(old, exchange.old, strict=True))
        new = exchange.new if own else tuple(_rounded(one, kernel_factor(old)) for one in exchange.new)
        if all(id(one) in of for one in exchange.old):
            self._new |= {id(one): [] for one in old}
            self._new[id(old[0])] = list(zip(new, exchange.new, strict=True))
        return exchange if own else replace(exchange, old=old, new=new)


def as_masters(masters: Any, model: nn.Module, *, shards: bool = False) -> Masters:
    """Return the masters that were passed, each found to go with a parameter of the model.

    Args:
        masters: As for ``tdfx.rewrite``.
        model: The model out of its wrappers.
        shards: True if each process holds a part of every parameter.

    Raises:
        OptimizerError: They are given in another way, or one does not go with its parameter; or the model is sharded.
    """
    if masters is None:
        return Masters()
    if shards:
        raise OptimizerError(
            "masters= does not go with a model that fully_shard was called on: FSDP2 has mixed precision of its own, with "
            "float32 shards as the masters. Shard a float32 model with MixedPrecisionPolicy(param_dtype=torch.bfloat16), "
            "give the optimizer its parameters, and pass no masters."
        )
    return Masters(*unpacked(masters, model))


def _check_complete(
    exchanges: Sequence[Exchange], stand_ins: dict[int, tuple[nn.Parameter, Tensor]], trained: set[int], asked: bool
) -> None:
    """Raise OptimizerError unless every weight that goes has a master, or is trained without one."""
    for one in exchanges:
        have = [id(weight) in stand_ins for weight in one.old]
        if not all(have) and (any(have) or any(id(weight) not in trained for weight in one.old)):
            raise OptimizerError(
                f"masters= has no master of the weight of site {one.site!r}, and no optimizer that was passed trains the "
                f"weight itself. Pass the masters of all the model's weights, or keep the site: "
                f"Policy(exclude=({one.site!r},))."
            )
        lost = [stand_ins[id(weight)][1] for weight in one.old if id(weight) in stand_ins]
        if asked and any(id(master) not in trained for master in lost):
            raise OptimizerError(
                f"The master of the weight of site {one.site!r} is in none of the optimizers given: they train other "
                f"copies, or the model's own parameters. Pass the masters that the optimizer holds."
            )


def _exchange(module: nn.Module, others: dict[int, nn.Parameter]) -> None:
    """Put other parameters in the place of those of a module, by identity."""
    for one in module.modules():
        if isinstance(one, torch.jit.ScriptModule):  # shared between the copies of a model, and never rewritten
            continue
        for name, parameter in one._parameters.items():
            if parameter is not None and id(parameter) in others:
                one._parameters[name] = others[id(parameter)]


def _rounded(master: nn.Parameter, placement: nn.Parameter) -> nn.Parameter:
    """Return a copy of a new master in the type and layout of the weight that it comes from."""
    return nn.Parameter(like_parameter(master, placement), requires_grad=placement.requires_grad)


def _retype(layer: Factorized) -> None:
    """Let the placeholders of an original layer say the dtypes of the model, not those of its masters."""
    shell, kind = layer.origin.layer, layer.kind
    for name, placeholder in shell._parameters.items():
        like = layer.bias if name == kind.bias and layer.bias is not None else layer.weights[0]
        if placeholder is not None and placeholder.dtype != like.dtype:
            shell._parameters[name] = nn.Parameter(placeholder.to(like.dtype), placeholder.requires_grad)
