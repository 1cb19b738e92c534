"""Giving optimizers of the dense model what was saved of those of the model in the checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from tdfx.checkpoint.record import Record, dense_names
from tdfx.errors import CheckpointError
from tdfx.optim.masters import Masters


@dataclass(slots=True)
class Refill:
    """Everything that will be changed in the optimizers, worked out before anything is."""

    groups: list[tuple[dict[str, Any], list[Tensor], dict[str, Any]]] = field(default_factory=list)
    """A group, its parameters, its settings."""
    states: list[tuple[Optimizer, dict[Tensor, dict[str, Any]]]] = field(default_factory=list)
    """An optimizer and its state."""

    def commit(self) -> None:
        """Change the optimizers in place; nothing here can fail."""
        for group, parameters, settings in self.groups:
            group["params"][:] = parameters
            group.update(settings)
        for optimizer, states in self.states:
            optimizer.state.clear()
            optimizer.state.update(states)


def filled_masters(
    masters: Masters, record: Record, dense: nn.Module, made: nn.Module, *, wanted: bool
) -> dict[str, nn.Parameter]:
    """Return the masters of the loaded model's parameters by name, with the saved values; those passed stay as they are.

    Args:
        masters: Of the dense model's parameters.
        record: The checkpoint.
        dense: The model that was passed in.
        made: The model that was loaded.
        wanted: Whether anything is to be trained; the model alone can be loaded without masters.

    Raises:
        CheckpointError: Other parameters had masters when it was saved.
    """
    saved: dict[str, Tensor] = record.get("masters", {}) if wanted else {}
    dense_of = dense_names(made)
    now, then = set(masters.by_name(dense)), {dense_of.get(name, name) for name in saved}
    if now != then:
        odd = sorted(now ^ then)
        raise CheckpointError(
            f"The checkpoint holds masters of {len(then)} of the dense model's parameters, and {len(now)} were passed: "
            f"{odd[0]!r} has one {'there' if odd[0] in then else 'here'} alone. Pass masters= for the same parameters as "
            f"to tdfx.save."
        )
    found = dict(made.named_parameters())
    return {
        name: nn.Parameter(torch.empty_like(value, device=found[name].device).copy_(value), found[name].requires_grad)
        for name, value in saved.items()
    }


def refill(
    optimizers: Sequence[Optimizer],
    record: Record,
    dense: Mapping[str, Tensor],
    loaded: Mapping[str, Tensor],
    dense_of: Mapping[str, str],
) -> Refill:
    """Work out what the optimizers will hold, changing nothing.

    Args:
        optimizers: Over what trains the dense model; none leaves the saved ones unread.
        record: The checkpoint.
        dense: What trains the model that was passed in, by name: its parameters, or their masters.
        loaded: The same of the model that was loaded.
        dense_of: Name of a factor's parameter there -> that of the dense one.

    Raises:
        CheckpointError: They are not those that were saved: another number, class, or other groups.
    """
    work = Refill()
    if not optimizers:
        return work
    saved = record["optimizers"]
    if len(saved) != len(optimizers):
        raise CheckpointError(
            f"The checkpoint holds the state of {len(saved)} optimizers, and {len(optimizers)} were passed to be loaded. "
            f"Pass as many as were passed to tdfx.save, in the same order, or none."
        )
    for index, (optimizer, one) in enumerate(zip(optimizers, saved, strict=True)):
        name = type(optimizer).__name__
        if one["class"] != name:
            raise CheckpointError(
                f"The checkpoint holds the state of {one['class']}, and optimizer {index} is {name}: it would misread that. "
                f"Pass an optimizer of the same class, or none to start with fresh state."
            )
        if len(one["groups"]) != len(optimizer.param_groups):
            raise CheckpointError(
                f"The checkpoint's {name} has {len(one['groups'])} parameter groups, and the one passed has "
                f"{len(optimizer.param_groups)}. Make it with the same groups, in the same order."
            )
        states: dict[Tensor, dict[str, Any]] = {}
        for number, (group, then) in enumerate(zip(optimizer.param_groups, one["groups"], strict=True)):
            where = f"Group {number} of {name}"
            parameters = _members(group, then, dense, loaded, dense_of, where)
            settings = tree_map(_copied, then["settings"])
            work.groups.append((group, parameters, settings))
            for parameter, state in zip(parameters, then["state"], strict=True):
                if state:
                    states[parameter] = _placed(state, parameter, then["settings"])
        work.states.append((optimizer, states))
    return work


def _members(
    group: dict[str, Any],
    then: dict[str, Any],
    dense: Mapping[str, Tensor],
    loaded: Mapping[str, Tensor],
    dense_of: Mapping[str, str],
    where: str,
) -> list[Tensor]:
    """Return what trains the loaded model in a group, in the order in which it was saved."""
    names = {id(one): name for name, one in dense.items()}
    present = {names[id(one)] for one in group["params"] if id(one) in names}
    # Parameters of something else, such as a loss, keep their place among one another.
    foreign = [one for one in group["params"] if id(one) not in names]
    wanted = {dense_of.get(name, name) for name in then["names"] if name is not None}
    unknown = [name for name in then["names"] if name is not None and name not in loaded]
    if present != wanted or unknown:
        other = sorted([*(present ^ wanted), *unknown])
        raise CheckpointError(
            f"{where} does not hold the parameters that it held when it was saved: {len(other)} differ, {other[0]!r} first. "
            f"Make the optimizer over the parameters of the dense model that is passed, in the same groups."
        )
    shapes = [shape for name, shape in zip(then["names"], then["shapes"], strict=True) if name is None]
    if Counter(map(tuple, shapes)) != Counter(tuple(one.shape) for one in foreign):
        raise CheckpointError(
            f"{where} held {len(shapes)} parameters that are not the model's when it was saved, and holds {len(foreign)} "
            f"now, or of other shapes. Make the optimizer over the same parameters."
        )
    left = iter(foreign)
    return [next(left) if name is None else loaded[name] for name in then["names"]]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _placed(state: dict[str, Any], parameter: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a parameter's state on the parameter's device; step counts go there only where torch has them so."""
    beside = bool(settings.get("capturable") or settings.get("fused"))

    def place(key: str, value: Any) -> Any:
        device = torch.device("cpu") if key == "step" and not beside else parameter.device

        def move(one: Any) -> Any:
            return torch.empty_like(one, device=device).copy_(one) if isinstance(one, Tensor) else one

        return tree_map(move, value)

    return {key: place(key, value) for key, value in state.items()}
