"""Changing which parameters optimizers hold, all at once and only after everything was worked out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from tdfx.errors import OptimizerError
from tdfx.optim.carriers import Carrier
from tdfx.optim.states import new_states, warn_of_lost_state


@dataclass(frozen=True, slots=True)
class Exchange:
    """Parameters that leave an optimizer together, and those that take their place."""

    site: str
    old: tuple[nn.Parameter, ...]
    new: tuple[nn.Parameter, ...]
    carrier: Carrier
    rename: Callable[[str], list[str]]
    """From the first old parameter's name to the new ones', for optimizers that were made with names."""
    bias: nn.Parameter | None = None
    """The bias that stays, under another name."""
    rename_bias: Callable[[str], str] = str
    """From the bias's old name to its new one."""


@dataclass(slots=True)
class Surgery:
    """Everything that will be changed in the optimizers, worked out before anything is."""

    lists: list[tuple[list[Any], list[Any]]] = field(default_factory=list)
    """A list inside an optimizer, and what it will hold."""
    states: list[tuple[Optimizer, Exchange, list[dict[str, Any]]]] = field(default_factory=list)
    """An optimizer, an exchange in it, and the state of each new parameter; empty for fresh state."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield what was worked out for the new parameters, apart from counts."""
        for _, _, states in self.states:
            for state in states:
                yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())

    def commit(self) -> None:
        """Change the optimizers in place; nothing here can fail."""
        for inside, content in self.lists:
            inside[:] = content
        for optimizer, exchange, states in self.states:
            for parameter in exchange.old:
                optimizer.state.pop(parameter, None)
            for parameter, state in zip(exchange.new, states, strict=False):
                optimizer.state[parameter] = state


_SHELLS = {"AcceleratedOptimizer", "LightningOptimizer"}
"""What Accelerate and Lightning put around an optimizer; it keeps nothing of the parameters' state itself."""


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """Return the optimizers as a tuple, out of what trainers have put around them.

    Raises:
        OptimizerError: Something else was passed.
    """
    given = list(optimizer) if isinstance(optimizer, list | tuple) else [] if optimizer is None else [optimizer]
    found: list[Optimizer] = []
    for one in map(_inner, given):
        if not isinstance(one, Optimizer):
            raise OptimizerError(
                f"optimizer={one!r} is a {type(one).__name__}, not a torch.optim.Optimizer: its parameters and state could "
                f"not be moved. Pass the optimizer that trains the model, or a list of them."
            )
        if isinstance(one, LBFGS):
            raise OptimizerError(
                "LBFGS keeps one flat history for all parameters together, which cannot be carried over. Make a new one "
                "from the returned model's parameters, and pass no optimizer."
            )
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(one).__mro__):
            raise OptimizerError(
                "ZeroRedundancyOptimizer keeps each process's part of the state in an optimizer of its own, and shares the "
                "parameters out once and for all. Use torch.distributed.fsdp.fully_shard, which spreads state too, or "
                "pass no optimizer and make a new one from the returned model's parameters."
            )
        found.append(one)
    return tuple(found)


def _inner(optimizer: Any) -> Any:
    while any(kind.__name__ in _SHELLS for kind in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    return optimizer


def prepare(optimizers: Sequence[Optimizer], exchanges: Iterable[Exchange]) -> Surgery:
    """Work out the new groups and states of the optimizers, changing nothing.

    New parameters stand where the first of the old ones stood, so groups keep their order and their settings.

    Raises:
        OptimizerError: A parameter that is to be replaced is in none of the optimizers, or its parts are spread over
            several groups.
    """
    surgery = Surgery()
    pending = list(exchanges)
    if not optimizers:
        return surgery
    check_homes(optimizers, pending)
    home = _homes(optimizers)
    for optimizer in optimizers:
        mine = [exchange for exchange in pending if home[id(exchange.old[0])][0][0] is optimizer]
        for group in optimizer.param_groups:
            # A bias may lie in another optimizer than its weight, so each group is asked for every exchange's.
            _plan_group(group, pending, surgery)
        surgery.states.extend(
            (optimizer, exchange, new_states(optimizer, exchange.old, exchange.new, exchange.carrier))
            for exchange in mine
        )
        warn_of_lost_state(optimizer, [one.old[0] for one in mine])
    return surgery


def _homes(optimizers: Sequence[Optimizer]) -> dict[int, list[tuple[Optimizer, int]]]:
    """Return for each parameter the optimizers that hold it and the index of its group there."""
    home: dict[int, list[tuple[Optimizer, int]]] = {}
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                home.setdefault(id(parameter), []).append((optimizer, index))
    return home


def check_homes(optimizers: Sequence[Optimizer], exchanges: Sequence[Exchange]) -> None:
    """Raise OptimizerError unless every parameter to be replaced has one place in the optimizers, where there are any."""
    if not optimizers:
        return
    home = _homes(optimizers)
    missing = [one.site for one in exchanges if any(id(parameter) not in home for parameter in one.old)]
    if missing:
        raise OptimizerError(
            f"The weights of {len(missing)} sites are in none of the optimizers given, the first being {missing[0]!r}: the "
            f"optimizer belongs to another model, or trains only a part of this one. Pass the optimizer (or all of them, "
            f"as a list) that holds this model's parameters, or keep those sites: Policy(exclude=({missing[0]!r}, ...)). If "
            f"it holds wider copies of them, such as float32 beside half precision, pass these too: masters=."
        )
    for one in exchanges:
        shared = [parameter for parameter in one.old if len(home[id(parameter)]) > 1]
        if shared:
            raise OptimizerError(
                f"The weight of site {one.site!r} is held by {len(home[id(shared[0])])} of the optimizers given, so its "
                f"state has no one place to go to. Give each parameter to one optimizer."
            )
        places = {(id(optimizer), index) for parameter in one.old for optimizer, index in home[id(parameter)]}
        if len(places) > 1:
            raise OptimizerError(
                f"The factors of site {one.site!r} are in {len(places)} parameter groups, so the merged weight has no one "
                f"place to go to. Put them into one group first."
            )


def _plan_group(group: dict[str, Any], exchanges: Sequence[Exchange], surgery: Surgery) -> None:
    """Note what a group's list of parameters, and of names where it has one, will hold."""
    by_first = {id(one.old[0]): one for one in exchanges}
    leaving = {id(parameter) for one in exchanges for parameter in one.old}
    renamed = {id(one.bias): one.rename_bias for one in exchanges if one.bias is not None}
    names = group.get("param_names")
    parameters: list[nn.Parameter] = []
    new_names: list[str] = []
    for position, parameter in enumerate(group["params"]):
        exchange = by_first.get(id(parameter))
        if exchange is not None:
            parameters.extend(exchange.new)
            new_names.extend(exchange.rename(names[position]) if names else [])
        elif id(parameter) not in leaving:
            parameters.append(parameter)
            new_names.extend([renamed.get(id(parameter), str)(names[position])] if names else [])
    surgery.lists.append((group["params"], parameters))
    if names:
        surgery.lists.append((names, new_names))
