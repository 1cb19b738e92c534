"""The form of a module, dense here and factorized there, following what is loaded into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tdfx.api import merge, rewrite
from tdfx.errors import CheckpointError, OptimizerError
from tdfx.layers.factorized import Factorized
from tdfx.layers.parameter import FactorizedParameter
from tdfx.plans.plan import Plan, SitePlan
from tdfx.wrappers.in_place import replace_in_place

Names = list[list[list[str | None]]]
"""For each optimizer and each of its groups, the names of what it holds, in order; None for what is not the model's."""


class FollowCheckpoint:
    """A hook of ``load_state_dict`` that gives a module the form of the state that comes, before it is loaded.

    Args:
        plan: Returns how the sites that may be factorized are split; None where nothing is known.
        advice: What to do where factors come and it is not known how they were split.
    """

    def __init__(self, plan: Callable[[], Plan | None], advice: str) -> None:
        self.plan = plan
        self.advice = advice

    def __call__(self, module: nn.Module, state: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        """Look at the keys that come."""
        keys = {key.removeprefix(prefix).replace("_orig_mod.", "") for key in state if key.startswith(prefix)}
        own = {key.replace("_orig_mod.", "") for key in module.state_dict()}
        have = _factorized(module)
        # A state that says nothing of a site leaves it as it is.
        dense = {path for path, name in have.items() if name in keys}
        split = {key.rpartition(".factors.")[0] for key in keys - own if ".factors." in key}
        wanted = (have.keys() - dense) | split
        if wanted != have.keys():
            factorize_like(module, self.plan(), wanted, self.advice)

    def __deepcopy__(self, memo: dict[int, Any]) -> FollowCheckpoint:
        """Return itself: the copy of a model follows as the model does."""
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        """Stay behind where a model is pickled, since what it knows belongs to a trainer."""
        return _leave, ()


def _leave() -> Callable[..., None]:
    return _nothing


def _nothing(*arguments: Any) -> None:
    pass


@torch.no_grad()
def factorize_like(
    module: nn.Module,
    plan: Plan | None,
    wanted: Iterable[str],
    advice: str,
    optimizer: Sequence[Optimizer] = (),
) -> None:
    """Factorize some sites of a module, and no others, in place; what is new among the factors has no values yet.

    Args:
        module: Dense, or with other sites factorized.
        plan: How to split them.
        wanted: The paths of the weights to be factorized: of layers, or of parameters where they are a module's own.
        advice: What to do where the plan does not say.
        optimizer: What trains the module, without state.

    Raises:
        CheckpointError: The plan does not say how one of them is split.
    """
    names = set(wanted)
    known = {} if plan is None else {_path(one): one for one in plan.factorized}
    if unknown := sorted(names - known.keys()):
        raise CheckpointError(
            f"What is loaded into this {type(module).__name__} holds factors of {len(unknown)} sites, {unknown[0]!r} first, "
            f"and it is not known how these were split. {advice}"
        )
    if names == _factorized(module).keys():
        return
    before = dict(module.named_parameters())
    made = merge(module) if _factorized(module) else module
    if names and plan is not None:
        sites = tuple(one for path, one in known.items() if path in names)
        wish = replace(plan, sites=sites, emit="modules")
        made = rewrite(made, wish, init="empty", optimizer=optimizer or None)
    for name, one in made.named_parameters():
        # Not all that was factorized before and still is need be in what is loaded.
        if name in before and before[name] is not one and before[name].shape == one.shape:
            one.copy_(before[name])
    replace_in_place(module, made)


def _path(site: SitePlan) -> str:
    return site.parameter or site.name


def _factorized(module: nn.Module) -> dict[str, str]:
    """Return for each factorized layer of a module the name that its weight has in the dense one."""
    found = {}
    for path, one in module.named_modules():
        if isinstance(one, Factorized):
            own = path if isinstance(one, FactorizedParameter) else f"{path}.{one.kind.weight}".removeprefix(".")
            found[path.replace("_orig_mod.", "")] = own.replace("_orig_mod.", "")
    return found


def names_of(optimizers: Sequence[Optimizer], model: nn.Module) -> Names:
    """Return what each group of each optimizer holds, by name."""
    names = {id(one): name for name, one in model.named_parameters()}
    return [
        [[names.get(id(one)) for one in group["params"]] for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


@torch.no_grad()
def put_in_order(optimizers: Sequence[Optimizer], saved: Names, model: nn.Module) -> None:
    """Give groups the order in which they were saved, after an optimizer has taken states by their places.

    An optimizer that is made over a factorized model may hold its parameters in another order than one that came along
    with a rewrite, and ``Optimizer.load_state_dict`` goes by places alone.

    Raises:
        OptimizerError: They hold other parameters than were saved. Then nothing was changed.
    """
    now = names_of(optimizers, model)
    for own, theirs in zip(_flat(now), _flat(saved), strict=False):
        if sorted(map(str, own)) != sorted(map(str, theirs)):
            odd = sorted(set(map(str, own)) ^ set(map(str, theirs)))
            raise OptimizerError(
                f"A parameter group held {len(theirs)} parameters when it was saved and holds {len(own)} now, and "
                f"{', '.join(odd[:1]) or 'one'} is not in both: states would go to other parameters. Make the optimizer "
                f"with the same groups as in the run that was saved."
            )
    held = dict(model.named_parameters())
    known = {id(one) for one in held.values()}
    for optimizer, groups in zip(optimizers, saved, strict=False):
        states = {}
        for group, names in zip(optimizer.param_groups, groups, strict=True):
            foreign = iter([one for one in group["params"] if id(one) not in known])
            wanted = [next(foreign) if name is None else held[name] for name in names]
            for old, new in zip(group["params"], wanted, strict=True):
                if old in optimizer.state:
                    states[new] = optimizer.state[old]
            group["params"][:] = wanted
        optimizer.state.update(states)


def _flat(names: Names) -> list[list[str | None]]:
    return [group for groups in names for group in groups]
