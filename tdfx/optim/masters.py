"""Master weights: copies of a model's parameters in a wider dtype, which the optimizer trains and the model gets rounded.

The masters are decomposed and joined, not their rounded values. So the passes run on a copy of the model that holds the
masters (``with_masters``), and the result gets the model's own parameters back, with rounded copies of the new masters
(``remove_masters``). The masters stay with the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tdfx.errors import OptimizerError
from tdfx.layers.copying import structural_copy
from tdfx.layers.factorized import Factorized, kernel_factor, new_parameter
from tdfx.layers.paths import parameters_by_path
from tdfx.optim.pairs import Pair, WritePairs, read_pairs
from tdfx.optim.surgery import Exchange


@dataclass(frozen=True, slots=True)
class Sides:
    """The exchanges of masters in the optimizers, and of their parameters in the model; the same without masters."""

    optimizer: list[Exchange]
    model: list[Exchange]


@dataclass(slots=True)
class Masters:
    """The masters of a model, checked to belong to it. Without masters, every method leaves everything as it is."""

    pairs: list[Pair] = field(default_factory=list)
    """Each parameter of the model with its master."""
    write: WritePairs = lambda pairs: None
    """Writes other pairs into the container that was passed."""
    _stand_ins: dict[int, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)
    """Parameter of a module that ``with_masters`` returned, by id -> the model's parameter and its master."""
    _new_pairs: dict[int, list[Pair]] = field(default_factory=dict)
    """Parameter that leaves the model, by id -> the pairs that replace its pair."""

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def by_name(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the masters by the names of their parameters, apart from parameters that are their own masters."""
        names = {id(parameter): name for name, parameter in parameters_by_path(model)}
        return {names[id(parameter)]: master for parameter, master in self.pairs if parameter is not master}

    def write_loaded(
        self, model: nn.Module, loaded_model: nn.Module, loaded: Mapping[str, Tensor], dense_of: Mapping[str, str]
    ) -> None:
        """Write the masters of a model that was loaded, in the place of a dense one, into the container.

        Args:
            model: The dense model that these masters belong to.
            loaded_model: The model that was loaded.
            loaded: Name of a parameter of the loaded model -> its master.
            dense_of: Name of a factor's parameter in the loaded model -> the name of the dense parameter.
        """
        own_masters = {id(parameter) for parameter, master in self.pairs if parameter is master}
        names = {name for name, parameter in parameters_by_path(model) if id(parameter) in own_masters}
        pairs = [
            (parameter, loaded.get(name, parameter))
            for name, parameter in parameters_by_path(loaded_model)
            if name in loaded or dense_of.get(name, name) in names
        ]
        self.write(pairs)

    def with_masters(self, module: nn.Module) -> nn.Module:
        """Return a structural copy of a module that holds the masters in the place of its parameters."""
        if not self:
            return module
        replacements: dict[int, nn.Parameter] = {}
        for parameter, master in self.pairs:
            # A module accepts only parameters, and many training loops keep masters as plain tensors.
            if not isinstance(stand_in := master, nn.Parameter):
                stand_in = nn.Parameter(master.detach(), master.requires_grad)
            replacements[id(parameter)] = stand_in
            self._stand_ins[id(stand_in)] = (parameter, master)
        copy = structural_copy(module)
        _replace_parameters(copy, replacements)
        return copy

    def keep_masters(self, layer: Factorized) -> Factorized:
        """Return a copy of a layer that still holds the masters after ``remove_masters`` has changed the layer itself."""
        return cast("Factorized", structural_copy(layer)) if self else layer

    def both_sides(self, exchanges: Sequence[Exchange], optimizers: Sequence[Optimizer]) -> Sides:
        """Return the exchanges in the optimizers and those in the model, given those in the copy that holds masters.

        Raises:
            OptimizerError: A weight that is replaced has no master, and no optimizer trains it without one.
        """
        if not self:
            return Sides(list(exchanges), list(exchanges))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._check_complete(exchanges, {id(parameter) for group in groups for parameter in group["params"]})
        optimizer_side = [self._optimizer_exchange(exchange) for exchange in exchanges]
        return Sides(optimizer_side, [self._model_exchange(exchange) for exchange in optimizer_side])

    def _check_complete(self, exchanges: Sequence[Exchange], trained: set[int]) -> None:
        """Raise OptimizerError unless every weight that is replaced has a trained master, or is trained without one."""
        for exchange in exchanges:
            weights = {*map(id, exchange.old)}
            masters = {id(self._stand_ins[weight][1]) for weight in weights & self._stand_ins.keys()}
            if not weights <= self._stand_ins.keys() and (masters or not weights <= trained):
                raise OptimizerError(
                    f"masters= has no master of the weight of site {exchange.site!r}, and no optimizer that was passed "
                    f"trains the weight itself. Pass the masters of all the model's weights, or keep the site: "
                    f"Policy(exclude=({exchange.site!r},))."
                )
            if trained and not masters <= trained:
                raise OptimizerError(
                    f"The master of the weight of site {exchange.site!r} is in none of the optimizers given: they "
                    f"train other copies, or the model's own parameters. Pass the masters that the optimizer holds."
                )

    def remove_masters(self, rewritten: nn.Module, sides: Sides) -> None:
        """Replace the masters in a rewritten module, in place, by the model's own parameters and the new rounded ones."""
        if not self:
            return
        parameters = {key: parameter for key, (parameter, _) in self._stand_ins.items()}
        parameters |= {
            id(master): parameter
            for in_optimizer, in_model in zip(sides.optimizer, sides.model, strict=True)
            for master, parameter in zip(in_optimizer.new, in_model.new, strict=True)
        }
        _replace_parameters(rewritten, parameters)
        for layer in rewritten.modules():
            if isinstance(layer, Factorized):
                _match_dtypes(layer)

    def commit(self) -> None:
        """Write the pairs of the returned model into the container; nothing here can fail."""
        if not self:
            return
        self.write([new for pair in self.pairs for new in self._new_pairs.get(id(pair[0]), [pair])])

    def _optimizer_exchange(self, exchange: Exchange) -> Exchange:
        """Return an exchange with the masters that the optimizer holds in the place of their stand-ins."""

        def master_of(parameter: nn.Parameter) -> nn.Parameter:
            return cast("nn.Parameter", self._stand_ins.get(id(parameter), (parameter, parameter))[1])

        bias = None if exchange.bias is None else master_of(exchange.bias)
        return replace(exchange, old=tuple(map(master_of, exchange.old)), bias=bias)

    def _model_exchange(self, exchange: Exchange) -> Exchange:
        """From the exchange of masters, return that of their rounded parameters, and record the new pairs."""
        parameter_of = {id(master): parameter for parameter, master in self.pairs}
        old = tuple(parameter_of.get(id(master), master) for master in exchange.old)
        # Where a parameter is its own master, the new parameters are their own masters too.
        own_masters = all(parameter is master for parameter, master in zip(old, exchange.old, strict=True))
        template = kernel_factor(old)
        new = exchange.new if own_masters else tuple(new_parameter(master, template) for master in exchange.new)
        if all(id(master) in parameter_of for master in exchange.old):
            self._new_pairs |= {id(parameter): [] for parameter in old}
            self._new_pairs[id(old[0])] = list(zip(new, exchange.new, strict=True))
        return exchange if own_masters else replace(exchange, old=old, new=new)


def as_masters(masters: Any, model: nn.Module, *, shards: bool = False) -> Masters:
    """Return the argument ``masters``, checked to belong to the model without its wrappers, which may be sharded.

    Raises:
        OptimizerError: It is not a container that ``tdfx.rewrite`` accepts, a master does not go with its parameter, or the
            model is sharded.
    """
    if masters is None:
        return Masters()
    if shards:
        raise OptimizerError(
            "masters= does not go with a model that fully_shard was called on: FSDP2 has mixed precision of its own, with "
            "float32 shards as the masters. Shard a float32 model with MixedPrecisionPolicy(param_dtype=torch.bfloat16), "
            "give the optimizer its parameters, and pass no masters."
        )
    return Masters(*read_pairs(masters, model))


def _replace_parameters(model: nn.Module, replacements: Mapping[int, nn.Parameter]) -> None:
    """Replace parameters of a model in place; ``replacements`` are by the id of the old one."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # shared between the copies of a model, and never rewritten
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in replacements:
                module._parameters[name] = replacements[id(parameter)]


def _match_dtypes(layer: Factorized) -> None:
    """Give the placeholders of an original layer the dtypes of the model, which may differ from those of its masters."""
    shell, kind = layer.origin.layer, layer.kind
    for name, placeholder in shell._parameters.items():
        like = layer.bias if name == kind.bias and layer.bias is not None else layer.weights[0]
        if placeholder is not None and placeholder.dtype != like.dtype:
            shell._parameters[name] = nn.Parameter(placeholder.to(like.dtype), placeholder.requires_grad)
