"""Giving optimizers of the dense model what was saved of those of the model in the checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from tdfx.checkpoint.record import Record, dense_names
from tdfx.errors import CheckpointError


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


def refill(optimizers: Sequence[Optimizer], record: Record, dense: nn.Module, made: nn.Module) -> Refill:
    """Work out what the optimizers will hold, changing nothing.

    Args:
        optimizers: Over the parameters of the dense model; none leaves the saved ones unread.
        record: The checkpoint.
        dense: The model that was passed in.
        made: The model that was loaded.

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
            parameters = _members(group, then, dense, made, f"Group {number} of {name}")
            settings = tree_map(_copied, then["settings"])
            work.groups.append((group, parameters, settings))
            for parameter, state in zip(parameters, then["state"], strict=True):
                if state:
                    states[parameter] = _placed(state, parameter, then["settings"])
        work.states.append((optimizer, states))
    return work


def _members(
    group: dict[str, Any], then: dict[str, Any], dense: nn.Module, made: nn.Module, where: str
) -> list[Tensor]:
    """Return the loaded model's parameters for a group, in the order in which they were saved."""
    names = {id(one): name for name, one in dense.named_parameters()}
    loaded, dense_of = dict(made.named_parameters()), dense_names(made)
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
