"""Changes which parameters optimizers hold: first all changes are worked out, then all are made at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from tdfx.errors import OptimizerError
from tdfx.optim.carriers import Carrier
from tdfx.optim.inner import families
from tdfx.optim.states import is_known, new_states, warn_of_lost_state
from tdfx.wrappers.unwrap import is_instance_by_name


@dataclass(frozen=True, slots=True)
class Exchange:
    """The parameters of one site that are replaced together, and the parameters that replace them."""

    site: str
    old: tuple[nn.Parameter, ...]
    new: tuple[nn.Parameter, ...]
    carriers: tuple[Carrier, ...]
    """Carry optimizer state and gradients from the old to the new ones, in turn."""
    rename: Callable[[str], list[str]]
    """Maps the name of the first old parameter to those of the new ones, for optimizers that were given names."""
    bias: nn.Parameter | None = None
    """The bias of the site: it stays in the optimizer, under another name."""
    rename_bias: Callable[[str], str] = str
    """Maps the old name of the bias to the new one."""


@dataclass(slots=True)
class Surgery:
    """All changes to optimizers for a rewrite or merge, worked out before the first is made."""

    lists: list[tuple[list[Any], list[Any]]] = field(default_factory=list)
    """A list inside an optimizer, of parameters or of their names, and its new content."""
    states: list[tuple[Optimizer, Exchange, list[dict[str, Any]]]] = field(default_factory=list)
    """An optimizer, an exchange in it, and the state of each new parameter; no states if they start afresh."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield the state tensors of the new parameters, apart from scalars such as step counts."""
        for _, _, states in self.states:
            for state in states:
                yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())

    def commit(self) -> None:
        """Change the optimizers in place; nothing here can fail."""
        for old, new in self.lists:
            old[:] = new
        for optimizer, exchange, states in self.states:
            for parameter in exchange.old:
                optimizer.state.pop(parameter, None)
            for parameter, state in zip(exchange.new, states, strict=False):
                optimizer.state[parameter] = state


_WRAPPERS = ("AcceleratedOptimizer", "LightningOptimizer")
"""The classes that Accelerate and Lightning put around an optimizer; they keep no state of parameters themselves."""


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """Return the argument ``optimizer`` as a tuple of optimizers, without the wrappers of trainers.

    Raises:
        OptimizerError: It is not an optimizer, or one whose state cannot be carried over.
    """
    if isinstance(optimizer, list | tuple):
        return tuple(map(_as_optimizer, optimizer))
    return () if optimizer is None else (_as_optimizer(optimizer),)


def _as_optimizer(optimizer: Any) -> Optimizer:
    while is_instance_by_name(optimizer, *_WRAPPERS):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            f"optimizer={optimizer!r} is a {type(optimizer).__name__}, not a torch.optim.Optimizer: its parameters and "
            f"state could not be moved. Pass the optimizer that trains the model, or a list of them."
        )
    if not hasattr(optimizer, "state"):
        raise OptimizerError(
            f"{type(optimizer).__name__} has no attribute 'state', in which torch.optim.Optimizer keeps what belongs to "
            f"parameters. Call super().__init__(params, defaults) in it, or set self.state = inner.state where it "
            f"wraps another."
        )
    if isinstance(optimizer, LBFGS):
        raise OptimizerError(
            "LBFGS keeps one flat history for all parameters together, which cannot be carried over. Make a new one "
            "from the returned model's parameters, and pass no optimizer."
        )
    if is_instance_by_name(optimizer, "ZeroRedundancyOptimizer"):
        raise OptimizerError(
            "ZeroRedundancyOptimizer keeps each process's part of the state in an optimizer of its own, and assigns the "
            "parameters to processes once and for all. Use torch.distributed.fsdp.fully_shard, which shards the state too, "
            "or pass no optimizer and make a new one from the returned model's parameters."
        )
    return optimizer


def prepare_surgery(
    optimizers: Sequence[Optimizer], exchanges: Sequence[Exchange], *, carry_state: bool | None = None
) -> Surgery:
    """Work out the new groups and states of optimizers that passed ``check_groups``, changing nothing.

    The new parameters of an exchange stand where its first old parameter stood, so groups keep their order and settings.
    """
    surgery = Surgery()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # Every exchange, because a bias may be in another optimizer than its weight.
            _exchange_in_group(group, exchanges, surgery)
    for optimizer in _of_different_states(optimizers):
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        held = [exchange for exchange in exchanges if id(exchange.old[0]) in parameters]
        for exchange in held:
            states = new_states(optimizer, exchange.old, exchange.new, exchange.carriers, carry_state=carry_state)
            surgery.states.append((optimizer, exchange, states))
        warn_of_lost_state(optimizer, [exchange.old[0] for exchange in held])
    return surgery


def check_groups(optimizers: Sequence[Optimizer], exchanges: Sequence[Exchange]) -> None:
    """Raise OptimizerError unless each exchange's old parameters are in one group of one optimizer, if there is any."""
    if not optimizers:
        return
    places = defaultdict(set)  # parameter by id -> the families, optimizers and groups that hold it, by their positions
    for family, members in enumerate(families(optimizers)):
        for member, optimizer in enumerate(members):
            for position, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    places[id(parameter)].add((family, member, position))
    missing = [exchange.site for exchange in exchanges if not {*map(id, exchange.old)} <= places.keys()]
    if missing:
        raise OptimizerError(
            f"The weights of {len(missing)} sites are in none of the optimizers given, the first being {missing[0]!r}: the "
            f"optimizer belongs to another model, or trains only a part of this one. Pass the optimizer (or all of them, "
            f"as a list) that holds this model's parameters, or keep those sites: Policy(exclude=({missing[0]!r}, ...)). If "
            f"it holds wider copies of them, such as float32 beside half precision, pass these too: masters=."
        )
    for exchange in exchanges:
        groups = {place for parameter in exchange.old for place in places[id(parameter)]}
        holders = len({family for family, _, _ in groups})
        if holders > 1:
            raise OptimizerError(
                f"The weight of site {exchange.site!r} is held by {holders} of the optimizers given, so its state could not "
                f"be moved to one of them. Give each parameter to one optimizer."
            )
        most_groups = max(Counter(place[:2] for place in groups).values())
        if most_groups > 1:
            raise OptimizerError(
                f"The factors of site {exchange.site!r} are in {most_groups} parameter groups, so it is not known to "
                f"which of them the merged weight belongs. Put them into one group first."
            )


def check_states(optimizers: Sequence[Optimizer], exchanges: Sequence[Exchange]) -> None:
    """Raise OptimizerError if an optimizer around others keeps state of the weights that leave, and it is not declared.

    Factors without that state are not enough then: such an optimizer may have made it in its constructor.
    """
    for outer, *inner in families(optimizers):
        readers = [optimizer for optimizer in inner if optimizer.state is outer.state]
        for exchange in exchanges if inner else ():
            state = outer.state.get(exchange.old[0])
            if state and not any(is_known(optimizer, state) for optimizer in (outer, *readers)):
                entries, name = ", ".join(map(str, state)), type(outer).__name__
                declared = ", ".join(f"{entry}='iterate'" for entry in state)
                raise OptimizerError(
                    f"{name} is an optimizer around {', '.join(type(each).__name__ for each in inner)}, and keeps state of "
                    f"the weight of site {exchange.site!r} of its own ({entries}), whose meaning is not known. Declare it: "
                    f"tdfx.register_optimizer({name}, {declared}) for copies or averages of the parameter, and other roles "
                    f"as its documentation says."
                )


def _of_different_states(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Return one optimizer for each state: of those that share one, the last, which is the innermost."""
    return list({id(optimizer.state): optimizer for optimizer in optimizers}.values())


def _exchange_in_group(group: dict[str, Any], exchanges: Sequence[Exchange], surgery: Surgery) -> None:
    """Add the new parameters of a group, and their names if it has names, to the changes."""
    by_first = {id(exchange.old[0]): exchange for exchange in exchanges}
    leaving = {id(parameter) for exchange in exchanges for parameter in exchange.old}
    renamed = {id(exchange.bias): exchange.rename_bias for exchange in exchanges if exchange.bias is not None}
    names = group.get("param_names")
    named: list[tuple[nn.Parameter, str]] = []
    for parameter, name in zip(group["params"], names or repeat(""), strict=False):
        if exchange := by_first.get(id(parameter)):
            named += zip(exchange.new, exchange.rename(name), strict=True)
        elif id(parameter) not in leaving:
            named.append((parameter, renamed.get(id(parameter), str)(name)))
    surgery.lists.append((group["params"], [parameter for parameter, _ in named]))
    if names:
        surgery.lists.append((names, [name for _, name in named]))
