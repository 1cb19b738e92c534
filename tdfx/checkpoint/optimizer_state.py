"""Load the saved state of optimizers into optimizers that were made for the dense model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from tdfx.checkpoint.record import Record, dense_names
from tdfx.errors import CheckpointError
from tdfx.layers.paths import parameters_by_path
from tdfx.optim.inner import with_inner
from tdfx.optim.masters import Masters


def load_masters(
    masters: Masters, record: Record, dense: nn.Module, loaded: nn.Module, *, needed: bool
) -> dict[str, nn.Parameter]:
    """Return name of a parameter of the loaded model -> its master with the saved values; ``masters`` are left as they are.

    Where they are not ``needed``, since only the model is loaded, saved masters are ignored.

    Raises:
        CheckpointError: Other parameters had masters when the checkpoint was saved.
    """
    saved: dict[str, Tensor] = record.get("masters", {}) if needed else {}
    dense_of = dense_names(loaded)
    passed_names = set(masters.by_name(dense))
    saved_names = {dense_of.get(name, name) for name in saved}
    if passed_names != saved_names:
        name = min(passed_names ^ saved_names)
        where = "in the checkpoint" if name in saved_names else "among those passed"
        raise CheckpointError(
            f"The checkpoint holds masters of {len(saved_names)} of the dense model's parameters, and {len(passed_names)} "
            f"were passed: {name!r} has a master only {where}. Pass masters= for the same parameters as to tdfx.save."
        )
    parameters = dict(parameters_by_path(loaded))

    def master(value: Tensor, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(value, device=parameter.device).copy_(value), parameter.requires_grad)

    return {name: master(value, parameters[name]) for name, value in saved.items()}


def prepare_optimizers(
    passed: Sequence[Optimizer],
    record: Record,
    dense: Mapping[str, Tensor],
    loaded: Mapping[str, Tensor],
    dense_of: Mapping[str, str],
) -> Callable[[], None]:
    """Work out what the optimizers will hold, and return what changes them; if there are none, ignore the saved ones.

    The optimizers inside those that were passed go along. Earlier versions did not save them: from such a file they get the
    loaded parameters, with fresh state.

    ``dense`` and ``loaded`` have, by name, what the optimizers train of both models: parameters, or their masters.
    ``dense_of`` has the name of the dense parameter for each parameter of a factor.

    Raises:
        CheckpointError: The optimizers differ from the saved ones in number, class or groups.
    """
    count = len(record["optimizers"])
    every = with_inner(passed)
    optimizers = passed if count == len(passed) else every
    if passed and count != len(optimizers):
        inside = f", with {len(every) - len(passed)} more inside" if len(every) > len(passed) else ""
        raise CheckpointError(
            f"The checkpoint holds the state of {count} optimizers, and {len(passed)} were passed{inside}. "
            f"Pass as many as were passed to tdfx.save, in the same order, or none."
        )
    groups: list[tuple[dict[str, Any], list[Tensor], dict[str, Any]]] = []
    optimizer_states: list[tuple[Optimizer, dict[Tensor, dict[str, Any]]]] = []
    for index, (optimizer, saved) in enumerate(zip(optimizers, record["optimizers"], strict=False)):
        name = type(optimizer).__name__
        if saved["class"] != name:
            raise CheckpointError(
                f"The checkpoint holds the state of {saved['class']}, and optimizer {index} is {name}, which would misread "
                f"it. Pass an optimizer of the saved class, or none to start with fresh state."
            )
        if len(saved["groups"]) != len(optimizer.param_groups):
            raise CheckpointError(
                f"The checkpoint's {name} has {len(saved['groups'])} parameter groups, and the one passed has "
                f"{len(optimizer.param_groups)}. Make it with the same groups, in the same order."
            )
        states: dict[Tensor, dict[str, Any]] = {}
        for number, (group, saved_group) in enumerate(zip(optimizer.param_groups, saved["groups"], strict=True)):
            parameters = _match_group(group, saved_group, dense, loaded, dense_of, f"Group {number} of {name}")
            groups.append((group, parameters, tree_map_only(Tensor, Tensor.clone, saved_group["settings"])))
            for parameter, state in zip(parameters, saved_group["state"], strict=True):
                if state:
                    states[parameter] = _state_like(state, parameter, saved_group["settings"])
        optimizer_states.append((optimizer, states))
    restored = {id(group) for group, _, _ in groups}
    states_of = {id(optimizer.state) for optimizer in optimizers}
    for optimizer in (each for each in every if each not in optimizers):
        for group in optimizer.param_groups:
            if id(group) not in restored:  # an optimizer may share the groups of the one inside it
                groups.append((group, _loaded_for(group["params"], dense, loaded, dense_of), {}))
        if id(optimizer.state) not in states_of:
            optimizer_states.append((optimizer, {}))

    def commit() -> None:  # nothing here can fail
        for group, parameters, settings in groups:
            group["params"][:] = parameters
            group.update(settings)
        for optimizer, states in optimizer_states:
            optimizer.state.clear()
            optimizer.state.update(states)

    return commit


def _loaded_for(
    parameters: Sequence[Tensor], dense: Mapping[str, Tensor], loaded: Mapping[str, Tensor], dense_of: Mapping[str, str]
) -> list[Tensor]:
    """Return the loaded parameters that stand for dense ones, and those of something else as they are."""
    names = {id(tensor): name for name, tensor in dense.items()}
    by_dense: defaultdict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in loaded.items():
        by_dense[dense_of.get(name, name)].append(tensor)
    return [
        tensor
        for parameter in parameters
        for tensor in (by_dense[names[id(parameter)]] if id(parameter) in names else [parameter])
    ]


def _match_group(
    group: dict[str, Any],
    saved_group: dict[str, Any],
    dense: Mapping[str, Tensor],
    loaded: Mapping[str, Tensor],
    dense_of: Mapping[str, str],
    where: str,
) -> list[Tensor]:
    """Return the parameters that replace those of a group, in the order in which they were saved."""
    dense_by_id = {id(tensor): name for name, tensor in dense.items()}
    present = {dense_by_id[id(parameter)] for parameter in group["params"] if id(parameter) in dense_by_id}
    # Parameters of something else, such as a loss, have no name and keep their order among themselves.
    foreign = [parameter for parameter in group["params"] if id(parameter) not in dense_by_id]
    saved_names = [name for name in saved_group["names"] if name is not None]
    expected = {dense_of.get(name, name) for name in saved_names}
    unknown = [name for name in saved_names if name not in loaded]
    if present != expected or unknown:
        different = sorted([*(present ^ expected), *unknown])
        raise CheckpointError(
            f"{where} does not hold the parameters that it held when it was saved: {len(different)} differ, "
            f"{different[0]!r} first. Make the optimizer over the parameters of the dense model that is passed, in the "
            f"same groups."
        )
    saved_shapes = zip(saved_group["names"], saved_group["shapes"], strict=True)
    foreign_shapes = [tuple(shape) for name, shape in saved_shapes if name is None]
    if Counter(foreign_shapes) != Counter(tuple(parameter.shape) for parameter in foreign):
        raise CheckpointError(
            f"{where} held {len(foreign_shapes)} parameters that are not the model's when it was saved, and now holds "
            f"{len(foreign)}, or they have other shapes. Make the optimizer over the same parameters."
        )
    remaining = iter(foreign)
    return [next(remaining) if name is None else loaded[name] for name in saved_group["names"]]


def _state_like(state: dict[str, Any], parameter: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a parameter's state on its device; a step count stays on the CPU where torch keeps it there."""
    step_on_device = settings.get("capturable") or settings.get("fused")

    def move(key: str, value: Any) -> Any:
        device = torch.device("cpu") if key == "step" and not step_on_device else parameter.device
        return tree_map_only(Tensor, lambda leaf: torch.empty_like(leaf, device=device).copy_(leaf), value)

    return {key: move(key, value) for key, value in state.items()}
