"""What the entries of an optimizer's state mean, and how they are carried when parameters are exchanged.

``_FORMATS`` is the table of torch's own optimizers: one row for each class, one role for each entry. The foreach, fused and
capturable variants of an optimizer keep the same entries.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from tdfx.errors import OptimizerError, TdfxWarning, nearest
from tdfx.layers.placement import full_precise, is_sharded, shard_like
from tdfx.optim.carriers import Carrier, ToFactors, carry

Role = Literal["first", "second", "largest", "average", "iterate", "count"]
"""The meaning of an entry of an optimizer's state, which decides how it is carried.

``first``: a sum or mean of gradients. Carried to factors by the chain rule, exactly for the moment of the switch, and back
by the projection on the tangent space.
``second``: a sum or mean of squared gradients, or a quantity that is divided by one. Carried by a positive estimate.
``largest``: the largest absolute gradient. Carried as the root of the estimate for its square.
``average``: a positive quantity that does not scale with the gradient, such as a step size. Carried as a weighted mean.
``iterate``: an average of the parameter itself. Carried to factors by fitting one of them to it.
``count``: a value that is the same for all entries of a parameter, such as a step count. Kept.
"""

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StateFormat:
    """The state that optimizers of one class keep of a parameter."""

    roles: Mapping[str, Role]
    """Name of an entry -> its role."""
    unfold: Callable[[State], State] = dict
    """Turns a stored state, in the working dtype, into one that has the entries of ``roles``."""
    fold: Callable[[State], State] = dict
    """The inverse of ``unfold``."""
    folded: frozenset[str] = frozenset()
    """Names of stored entries that ``unfold`` turns into others."""
    begins: Mapping[str, float] | None = None
    """The counts of a parameter that has taken no step, where the optimizer corrects its moments by them, so that factors
    may begin with moments of zero. Measured with AdamW, that is better than moments that are carried: a second moment lasts
    for a thousand steps, and the one that is carried is off by the correlations of the gradient (a factor of 0.2 to 5), and
    high, as gradients are at the start of a training."""


def register_optimizer(optimizer: type[Optimizer], **roles: Role) -> None:
    """Declare the state of an optimizer class of your own, so that ``rewrite`` and ``merge`` can carry it over.

    The declaration holds for subclasses too, unless they have one of their own. With an optimizer that is not declared, the
    factors start with fresh state, and a warning says so.

    Args:
        optimizer: A subclass of torch.optim.Optimizer.
        roles: For each entry that the optimizer keeps of a parameter, its meaning: ``"first"`` for a sum or mean of
            gradients, ``"second"`` for a sum or mean of squared gradients, ``"largest"`` for the largest absolute gradient,
            ``"average"`` for positive values that do not scale with the gradient, ``"iterate"`` for an average of the
            parameter, ``"count"`` for a value that is the same for all entries of the parameter.

    A step of the optimizer is tried, if its other settings have defaults, and a warning names the entries that ``roles``
    leaves out.

    Raises:
        OptimizerError: ``optimizer`` is not a class of optimizers, or a role is not known.

    Example:
        >>> import tdfx, torch
        >>> class Lion(torch.optim.Optimizer):
        ...     "Keeps one moment, ``exp_avg``."
        >>> tdfx.register_optimizer(Lion, exp_avg="first")
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise OptimizerError(f"{optimizer!r} is not a subclass of torch.optim.Optimizer. Pass the optimizer's class.")
    for name, role in roles.items():
        if role not in get_args(Role):
            raise OptimizerError(
                f"{name}={role!r} is not known: an entry of the state is one of {', '.join(map(repr, get_args(Role)))}. "
                f"Nearest: {nearest(str(role), get_args(Role))}."
            )
    _FORMATS[optimizer] = StateFormat(roles)
    _warn_of_other_entries(optimizer, roles, _entries_of(optimizer))


def _entries_of(optimizer: type[Optimizer]) -> Sequence[str]:
    """Return the entries that an optimizer keeps after a step with its default settings; none if it cannot be tried."""
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for settings in ({}, {"lr": 1e-3}):
            try:
                tried = optimizer([parameter], **settings)  # type: ignore[arg-type]
                tried.step()
                return list(tried.state.get(parameter, ()))
            except Exception:  # a user's class may need other arguments, or a closure
                continue
    return ()


def _warn_of_other_entries(optimizer: type[Optimizer], roles: Mapping[str, Role], entries: Sequence[str]) -> None:
    """Warn if an optimizer keeps entries that a declaration does not name: its state cannot be carried then."""
    undeclared = [name for name in entries if name not in roles]
    if not undeclared:
        return
    unknown = [f"{name!r} (nearest: {nearest(name, undeclared, 1)})" for name in roles if name not in entries]
    other = f", and does not keep {', '.join(unknown)}" if unknown else ""
    warnings.warn(
        f"{optimizer.__name__} keeps {', '.join(map(repr, undeclared))}, which its tdfx.register_optimizer does not "
        f"name{other}. Rewritten weights start with fresh state until every entry has a role.",
        TdfxWarning,
        stacklevel=3,
    )


def new_states(
    optimizer: Optimizer,
    old: Sequence[nn.Parameter],
    new: Sequence[nn.Parameter],
    carriers: Sequence[Carrier],
    *,
    carry_state: bool | None = None,
) -> list[State]:
    """Return the state of each new parameter; ``carry_state`` is that of ``rewrite``, and holds for factors alone.

    Where the old parameters have no state yet, or one that cannot be carried, it is what a new optimizer would have: for
    most classes there is none before the first step, and the list is empty.
    """
    old_states = [optimizer.state.get(parameter, {}) for parameter in old]
    state_format = _format_of(optimizer, old_states[0])
    if state_format is None or any(state.keys() != old_states[0].keys() for state in old_states):
        return _fresh_states(optimizer, new)
    if _is_new(carriers, carry_state):
        if state_format.begins is not None:
            return [_begin(old_states[0], parameter, state_format.begins) for parameter in new]
        if carry_state is False:
            return _fresh_states(optimizer, new)
    unfolded = [state_format.unfold(tree_map(_in_working_dtype, state)) for state in old_states]
    carried = {
        key: _carry(role, [state[key] for state in unfolded], len(new), carriers)
        for key, role in state_format.roles.items()
        if key in unfolded[0]
    }
    states: list[State] = [dict(zip(carried, values, strict=True)) for values in zip(*carried.values(), strict=True)]
    for state in states:
        _raise_to_first_moment(state, state_format.roles)
    # As the optimizer stores it: in the old state's order and dtypes, with the parameter's layout.
    return [
        {key: _stored_entry(state[key], value, parameter) for key, value in old_states[0].items()}
        for state, parameter in zip(map(state_format.fold, states), new, strict=True)
    ]


def _in_working_dtype(value: Any) -> Any:
    """Return a whole tensor for a shard, in the working dtype if it has dimensions; other entries as they are."""
    if not isinstance(value, Tensor):
        return value
    return full_precise(value) if value.dim() and value.is_floating_point() else value.detach()


def _carry(role: Role, values: list[Any], count: int, carriers: Sequence[Carrier]) -> Sequence[Any]:
    """Return an entry of the state for each of ``count`` new parameters, given its values for the old ones."""
    if role == "count" or values[0] is None:
        return [copy.deepcopy(values[0]) for _ in range(count)]
    if role == "largest":
        return [squared.sqrt() for squared in carry(carriers, "second", tuple(map(torch.square, values)))]
    return carry(carriers, role, tuple(values))


def _raise_to_first_moment(state: State, roles: Mapping[str, Role]) -> None:
    """Raise second moments to at least the square of the first, since E[g**2] >= E[g]**2, and the largest gradient alike.

    Where the gradient's entries are correlated, the estimate is too small, and Adam's first steps would be too long.
    """
    if "exp_avg" not in state:
        return
    least = state["exp_avg"].abs()
    for key in state:
        if roles[key] == "second":
            state[key] = torch.maximum(state[key], least.square())
        elif roles[key] == "largest":
            state[key] = torch.maximum(state[key], least)


def _stored_entry(value: Any, old: Any, parameter: nn.Parameter) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or not isinstance(old, Tensor):
        return value
    if value.shape != parameter.shape:
        return value.to(old.device, old.dtype)
    placed = shard_like(value.to(old.dtype), parameter)
    return torch.empty_like(parameter, dtype=old.dtype, requires_grad=False).copy_(placed)


def _is_new(carriers: Sequence[Carrier], carry_state: bool | None) -> bool:
    """Return True for factors that take over no state if the optimizer allows it: by default those of a dense weight.

    Factors whose ranks are lowered take theirs over by default: it is of factors already.
    """
    return isinstance(carriers[0 if carry_state is None else -1], ToFactors) and not carry_state


def _begin(old: State, parameter: nn.Parameter, counts: Mapping[str, float]) -> State:
    """Return the state of a parameter that has taken no step, with the entries of another's state."""
    return {
        # A count may be a tensor, on any device, or a number.
        key: value * 0 + counts[key]
        if key in counts
        else torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
        for key, value in old.items()
    }


def _fresh_states(optimizer: Optimizer, new: Sequence[nn.Parameter]) -> list[State]:
    """Return the states that the optimizer's constructor makes; most classes make none before the first step."""
    try:
        fresh = type(optimizer)(list(new), **optimizer.defaults)
    except Exception:  # a user's class may need other arguments; then the new parameters start with no state
        return []
    return [dict(fresh.state[parameter]) for parameter in new if parameter in fresh.state]


def _format_of(optimizer: Optimizer, state: State) -> StateFormat | None:
    """Return the format of a state; None if there is no state, or it has an entry that is not known."""
    state_format = next((_FORMATS[base] for base in type(optimizer).__mro__ if base in _FORMATS), None)
    if state_format is None or not state or not state.keys() <= state_format.roles.keys() | state_format.folded:
        return None
    # torch does not say how it shards the means over rows and columns.
    return None if state_format.folded and any(map(is_sharded, state.values())) else state_format


def is_known(optimizer: Optimizer, state: State) -> bool:
    """Return True if the meaning of a state that an optimizer keeps is known."""
    return _format_of(optimizer, state) is not None


def warn_of_lost_state(optimizer: Optimizer, leaving: Sequence[nn.Parameter]) -> None:
    """Warn if parameters that leave have state that is not known, so that those that replace them start afresh."""
    states = [optimizer.state.get(parameter) for parameter in leaving]
    lost = [state for state in states if state and _format_of(optimizer, state) is None]
    if lost:
        unknown = ", ".join(_unknown(optimizer, lost[0]))
        warnings.warn(
            f"tdfx does not know what the state of {type(optimizer).__name__} means ({unknown}), "
            f"so the {len(lost)} rewritten weights start with fresh state; all others keep theirs. The optimizers of "
            f"torch.optim are carried over; declare the state of yours with tdfx.register_optimizer.",
            TdfxWarning,
            stacklevel=5,
        )


def _unknown(optimizer: Optimizer, state: State) -> list[str]:
    """Return the entries of a state that are not declared; all of them where none is."""
    declared = next((_FORMATS[base].roles for base in type(optimizer).__mro__ if base in _FORMATS), {})
    return [str(name) for name in state if name not in declared] or list(map(str, state))


def _unfold_rmsprop(state: State) -> State:
    """Turn normalized momentum into a sum of gradients, and the second moment of a centered RMSprop into a variance."""
    unfolded = dict(state)
    if "grad_avg" in state:  # the variance is what RMSprop divides by
        unfolded["square_avg"] = (state["square_avg"] - state["grad_avg"].square()).clamp_min(0)
    if "momentum_buffer" in state:
        unfolded["momentum_buffer"] = state["momentum_buffer"] * unfolded["square_avg"].sqrt()
    return unfolded


def _fold_rmsprop(state: State) -> State:
    folded = dict(state)
    if "momentum_buffer" in state:
        deviation = state["square_avg"].sqrt()
        normalized = state["momentum_buffer"] / deviation
        folded["momentum_buffer"] = normalized.where(deviation > 0, deviation.new_zeros(()))
    if "grad_avg" in state:
        folded["square_avg"] = state["square_avg"] + state["grad_avg"].square()
    return folded


_FACTORED = frozenset({"row_var", "col_var"})


def _unfold_factored(state: State) -> State:
    """Compute the second moments of Adafactor from their means over rows and columns (Shazeer and Stern 2018)."""
    if not state.keys() >= _FACTORED:
        return state
    row, col = state["row_var"], state["col_var"]
    mean = row.mean(-2, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
    return {**state, "variance": row @ col / mean}


def _fold_factored(state: State) -> State:
    variance = state.get("variance")
    if variance is None or variance.dim() < 2:
        return state
    return {**state, "row_var": variance.mean(-1, keepdim=True), "col_var": variance.mean(-2, keepdim=True)}


_MOMENTS: dict[str, Role] = {"step": "count", "exp_avg": "first", "exp_avg_sq": "second", "max_exp_avg_sq": "second"}

_FORMATS: dict[type[Optimizer], StateFormat] = {
    torch.optim.SGD: StateFormat({"momentum_buffer": "first"}),
    torch.optim.Adam: StateFormat(_MOMENTS, begins={"step": 0}),
    torch.optim.AdamW: StateFormat(_MOMENTS, begins={"step": 0}),
    torch.optim.NAdam: StateFormat({**_MOMENTS, "mu_product": "count"}, begins={"step": 0, "mu_product": 1}),
    torch.optim.RAdam: StateFormat(_MOMENTS, begins={"step": 0}),
    torch.optim.Adamax: StateFormat({"step": "count", "exp_avg": "first", "exp_inf": "largest"}),
    torch.optim.Adagrad: StateFormat({"step": "count", "sum": "second"}),
    # A step is the gradient times the root of acc_delta / square_avg. Carried by one rule, both keep their ratio.
    torch.optim.Adadelta: StateFormat({"step": "count", "square_avg": "second", "acc_delta": "second"}),
    torch.optim.RMSprop: StateFormat(
        {"step": "count", "square_avg": "second", "grad_avg": "first", "momentum_buffer": "first"},
        _unfold_rmsprop,
        _fold_rmsprop,
    ),
    torch.optim.Rprop: StateFormat({"step": "count", "prev": "first", "step_size": "average"}),
    torch.optim.ASGD: StateFormat({"step": "count", "eta": "count", "mu": "count", "ax": "iterate"}),
    torch.optim.Adafactor: StateFormat(
        {"step": "count", "variance": "second"}, _unfold_factored, _fold_factored, _FACTORED
    ),
}
if hasattr(torch.optim, "Muon"):
    _FORMATS[torch.optim.Muon] = StateFormat({"momentum_buffer": "first"})
