"""What the entries of an optimizer's state mean, and what becomes of them when parameters change.

What torch's own optimizers keep is a table, ``_TABLE``: one row for each class, one role for each entry. The same row serves
the foreach, fused and capturable ways of computing, which keep the same entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from tdfx.errors import OptimizerError, TdfxWarning, nearest
from tdfx.layers.placement import full, is_sharded, shard_like
from tdfx.optim.carriers import Carrier
from tdfx.ranks.spectrum import working_dtype

Role = Literal["first", "second", "largest", "average", "iterate", "count"]
"""What an entry of an optimizer's state is, so that it can be carried.

``first``: a sum or mean of gradients. It goes to factors by the chain rule, exactly for the instant of the switch, and back
by the projection on the tangent space.
``second``: a sum or mean of squared gradients, or what is divided by one. A positive estimate.
``largest``: the largest absolute gradient. The root of the estimate for its square.
``average``: something positive without the gradient's scale, such as a step length. A weighted mean.
``iterate``: an average of the parameter itself, given to the factors as the nearest move from where they are.
``count``: the same for every entry of a parameter, such as a step count. Kept.
"""

State = dict[str, Any]


def _same(state: State) -> State:
    return state


@dataclass(frozen=True, slots=True)
class Meaning:
    """What the state of one class of optimizers means."""

    roles: Mapping[str, Role]
    """Name of an entry -> what it is."""
    unfold: Callable[[State], State] = _same
    """From the state of one parameter, in the working dtype, to one with the roles' entries and no others."""
    fold: Callable[[State], State] = _same
    """The way back."""


def register_optimizer(optimizer: type[Optimizer], **roles: Role) -> None:
    """Say what the state of an optimizer of your own means, so that it is carried over a rewrite and a merge.

    It holds for subclasses too, unless they have an entry of their own. An optimizer that nobody spoke of starts afresh for
    the rewritten weights, with a warning.

    Args:
        optimizer: A subclass of torch.optim.Optimizer.
        roles: For each entry that the optimizer keeps of a parameter, what it is: ``"first"`` for a sum or mean of
            gradients, ``"second"`` for one of squared gradients, ``"largest"`` for the largest absolute gradient,
            ``"average"`` for positive values without the gradient's scale, ``"iterate"`` for an average of the parameter,
            ``"count"`` for what is the same for all its entries.

    Raises:
        OptimizerError: It is no class of optimizers, or a role is not known.

    Example:
        >>> import tdfx, torch
        >>> class Lion(torch.optim.Optimizer):
        ...     "Keeps one moment, ``exp_avg``."
        >>> tdfx.register_optimizer(Lion, exp_avg="first")
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise OptimizerError(
            f"{optimizer!r} is not a subclass of torch.optim.Optimizer. Pass the class of the optimizer."
        )
    for name, role in roles.items():
        if role not in get_args(Role):
            raise OptimizerError(
                f"{name}={role!r} is not known: an entry of the state is one of {', '.join(map(repr, get_args(Role)))}. "
                f"Nearest: {nearest(str(role), get_args(Role))}."
            )
    _TABLE[optimizer] = Meaning(roles)


def new_states(
    optimizer: Optimizer, old_ones: Sequence[nn.Parameter], new: Sequence[nn.Parameter], carrier: Carrier
) -> list[State]:
    """Return the state of each new parameter; nothing where there is none yet, or none that can be carried."""
    old = [optimizer.state.get(parameter, {}) for parameter in old_ones]
    meaning = _meaning(optimizer, old[0])
    if meaning is None or any(one.keys() != old[0].keys() for one in old):
        return _fresh_states(optimizer, new)
    unfolded = [meaning.unfold(_working(one)) for one in old]
    states: list[State] = [{} for _ in new]
    for key, role in meaning.roles.items():
        if key in unfolded[0]:
            values = [one[key] for one in unfolded]
            for state, value in zip(states, _carry(role, values, len(new), carrier), strict=True):
                state[key] = value
    for state in states:
        _keep_above(state, meaning.roles)
    made = [meaning.fold(state) for state in states]
    return [_stored(state, old[0], parameter) for state, parameter in zip(made, new, strict=True)]


def _working(state: State) -> State:
    """Return a state with all its values, its tensors of several dimensions in the dtype in which they are carried."""
    return {key: _wide(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def _wide(value: Tensor) -> Tensor:
    return full(value).to(working_dtype(value)) if value.dim() and value.is_floating_point() else value.detach()


def _carry(role: Role, values: list[Any], count: int, carrier: Carrier) -> list[Any]:
    """Return what an entry becomes for each of the new parameters."""
    value = values[0]
    if role == "count" or value is None:
        return [value.clone() if isinstance(value, Tensor) else value for _ in range(count)]
    match role:
        case "first":
            return list(carrier.first(tuple(values)))
        case "second":
            return list(carrier.second(tuple(values)))
        case "largest":
            return [one.sqrt() for one in carrier.second(tuple(value.square() for value in values))]
        case "average":
            return list(carrier.average(tuple(values)))
        case "iterate":
            return list(carrier.iterate(tuple(values)))


def _keep_above(state: State, roles: Mapping[str, Role]) -> None:
    """Hold second moments at or above the square of the first, as E[g**2] >= E[g]**2 demands, and the largest likewise.

    The estimate takes the gradient's entries as uncorrelated. Where they agree, it is too small, and Adam's first steps
    after the switch would be several times too long.
    """
    if "exp_avg" not in state:
        return
    least = state["exp_avg"].abs()
    for key in state:
        if roles[key] == "second":
            state[key] = torch.maximum(state[key], least.square())
        elif roles[key] == "largest":
            state[key] = torch.maximum(state[key], least)


def _stored(state: State, old: State, parameter: nn.Parameter) -> State:
    """Return a state as the optimizer keeps it: in the old one's order and dtypes, laid out as the parameter is."""
    return {key: _stored_entry(state[key], value, parameter) for key, value in old.items()}


def _stored_entry(value: Any, old: Any, parameter: nn.Parameter) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or not isinstance(old, Tensor):
        return value
    if value.shape != parameter.shape:
        return value.to(old.dtype)
    placed = shard_like(value.to(old.dtype), parameter)
    return torch.empty_like(parameter, dtype=old.dtype, requires_grad=False).copy_(placed)


def _fresh_states(optimizer: Optimizer, new: Sequence[nn.Parameter]) -> list[State]:
    """Return the state that the optimizer's constructor makes, for those that do not wait for the first step."""
    try:
        twin = type(optimizer)(list(new), **optimizer.defaults)
    except Exception:  # a class of somebody else's may want other arguments; then it starts with no state
        return []
    return [dict(twin.state[parameter]) for parameter in new if parameter in twin.state]


def _meaning(optimizer: Optimizer, state: State) -> Meaning | None:
    """Return what a state means; None where there is none, or where an entry is not known."""
    known = next((_TABLE[kind] for kind in type(optimizer).__mro__ if kind in _TABLE), None)
    if known is None or not state or not set(state) <= set(known.roles) | _folded(known):
        return None
    if _folded(known) and any(is_sharded(value) for value in state.values()):
        return None  # the means over rows and columns are placed as torch pleases
    return known


def _folded(meaning: Meaning) -> frozenset[str]:
    """Return the names under which an optimizer stores what is unfolded before it is carried."""
    return _FACTORED if meaning.unfold is _unfold_factored else frozenset()


def warn_of_lost_state(optimizer: Optimizer, leaving: Sequence[nn.Parameter]) -> None:
    """Say it where the state of weights that leave is not understood, so that what comes for them starts afresh."""
    states = [optimizer.state[one] for one in leaving if one in optimizer.state]
    lost = [state for state in states if state and _meaning(optimizer, state) is None]
    if lost:
        warnings.warn(
            f"tdfx does not know what the state of {type(optimizer).__name__} means ({', '.join(map(str, lost[0]))}), so "
            f"the {len(lost)} rewritten weights start with fresh state; all others keep theirs. The optimizers of "
            f"torch.optim are carried over; say what yours keeps with tdfx.register_optimizer.",
            TdfxWarning,
            stacklevel=5,
        )


def _unfold_rmsprop(state: State) -> State:
    """Make the variance of a centered one, and sums of gradients of what are sums of normalised ones."""
    made = dict(state)
    if "grad_avg" in made:
        made["square_avg"] = (made["square_avg"] - made["grad_avg"].square()).clamp_min(0)
    if "momentum_buffer" in made:
        made["momentum_buffer"] = made["momentum_buffer"] * made["square_avg"].sqrt()
    return made


def _fold_rmsprop(state: State) -> State:
    made = dict(state)
    if "momentum_buffer" in made:
        deviation = made["square_avg"].sqrt()
        normalised = made["momentum_buffer"] / deviation
        made["momentum_buffer"] = normalised.where(deviation > 0, deviation.new_zeros(()))
    if "grad_avg" in made:
        made["square_avg"] = made["square_avg"] + made["grad_avg"].square()
    return made


_FACTORED = frozenset({"row_var", "col_var"})


def _unfold_factored(state: State) -> State:
    """Make the second moments of which Adafactor keeps the means over rows and columns (Shazeer and Stern 2018)."""
    if not state.keys() >= _FACTORED:
        return state
    row, col = state["row_var"], state["col_var"]
    mean = row.mean(-2, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
    rest = {key: value for key, value in state.items() if key not in _FACTORED}
    return {**rest, "variance": row @ col / mean}


def _fold_factored(state: State) -> State:
    variance = state.get("variance")
    if variance is None or variance.dim() < 2:
        return state
    rest = {key: value for key, value in state.items() if key != "variance"}
    return {**rest, "row_var": variance.mean(-1, keepdim=True), "col_var": variance.mean(-2, keepdim=True)}


_MOMENTS: dict[str, Role] = {"step": "count", "exp_avg": "first", "exp_avg_sq": "second", "max_exp_avg_sq": "second"}

_TABLE: dict[type[Optimizer], Meaning] = {
    SGD: Meaning({"momentum_buffer": "first"}),
    Adam: Meaning(_MOMENTS),
    torch.optim.AdamW: Meaning(_MOMENTS),
    NAdam: Meaning({**_MOMENTS, "mu_product": "count"}),
    RAdam: Meaning(_MOMENTS),
    Adamax: Meaning({"step": "count", "exp_avg": "first", "exp_inf": "largest"}),
    Adagrad: Meaning({"step": "count", "sum": "second"}),
    # A step is the gradient times the root of acc_delta / square_avg: carried alike, the two keep the ratio.
    Adadelta: Meaning({"step": "count", "square_avg": "second", "acc_delta": "second"}),
    RMSprop: Meaning(
        {"step": "count", "square_avg": "second", "grad_avg": "first", "momentum_buffer": "first"},
        _unfold_rmsprop,
        _fold_rmsprop,
    ),
    Rprop: Meaning({"step": "count", "prev": "first", "step_size": "average"}),
    ASGD: Meaning({"step": "count", "eta": "count", "mu": "count", "ax": "iterate"}),
    Adafactor: Meaning({"step": "count", "variance": "second"}, _unfold_factored, _fold_factored),
}
if hasattr(torch.optim, "Muon"):
    _TABLE[torch.optim.Muon] = Meaning({"momentum_buffer": "first"})
