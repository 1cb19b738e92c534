"""Give a module the form of a checkpoint before it is loaded: some sites factorized, the others dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tdfx.api import merge, rewrite
from tdfx.errors import CheckpointError, OptimizerError
from tdfx.kinds.registry import find_kind
from tdfx.layers.factorized import Factorized
from tdfx.layers.parameter import FactorizedParameter
from tdfx.plans.plan import Plan
from tdfx.wrappers.in_place import InPlaceModule, is_sharded

Names = list[list[list[str | None]]]
"""The names of the parameters in each group of each optimizer, in order; None for one that is not the model's."""


@dataclass(eq=False)
class FollowCheckpoint:
    """A hook before ``load_state_dict`` that gives a module the form of the state that will be loaded."""

    plan: Callable[[], Plan | None]
    """Returns the plan by which sites may be factorized; None if there is none."""
    advice: str
    """What the user can do if the state holds factors and it is not known how they were split."""
    locate: Callable[[nn.Module], nn.Module] = lambda module: module
    """Returns the part of the hooked module, or of a copy of it, that may be factorized."""
    key: str = ""
    """Whose hook it is, among several of one module."""

    def __call__(self, module: nn.Module, state: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        """Read from the keys of the state which sites it holds as factors, and factorize those."""
        target, whole = self.locate(module), module
        path = next(name for name, part in module.named_modules() if part is target)
        prefix = (prefix + f"{path}." * bool(path)).replace("_orig_mod.", "")
        state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
        module = target
        keys = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
        present = {key.replace("_orig_mod.", "") for key in module.state_dict()}
        factorized = _factorized(module)
        # A site that the state does not hold stays as it is.
        dense = {path for path, name in factorized.items() if name in keys}
        split = {key.rpartition(".factors.")[0] for key in keys - present if ".factors." in key}
        wanted = (factorized.keys() - dense) | split
        if wanted != factorized.keys():
            part = InPlaceModule(whole, path) if is_sharded(whole) else InPlaceModule(target)
            factorize_like(part, self.plan(), wanted, self.advice)

    def __deepcopy__(self, memo: dict[int, Any]) -> FollowCheckpoint:
        """Return itself: the copy of a model follows the same plan."""
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        """Pickle as a hook that does nothing, since the plan belongs to a trainer."""
        return _make_empty_hook, ()


def _make_empty_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*arguments: Any) -> None:
    pass


@torch.no_grad()
def factorize_like(
    part: InPlaceModule, plan: Plan | None, wanted: Iterable[str], advice: str, optimizer: Sequence[Optimizer] = ()
) -> None:
    """Factorize exactly the given sites of a module, in place; new factors have no values yet.

    Args:
        part: Refers to the module, which is dense or has other sites factorized.
        plan: How to split the sites.
        wanted: The paths of layers, or of parameters that functions use.
        advice: What the user can do if the plan does not hold one of the sites.
        optimizer: The optimizers that train the module, without state.
    """
    paths = set(wanted)
    decisions = {} if plan is None else {site.parameter or site.name: site for site in plan.factorized}
    if unknown := sorted(paths - decisions.keys()):
        raise CheckpointError(
            f"What is loaded into this {type(part.target).__name__} holds factors of {len(unknown)} sites, {unknown[0]!r} "
            f"first, and it is not known how these were split. {advice}"
        )
    if paths == _factorized(part.target).keys():
        return
    part.reshard()
    before = dict(part.target.named_parameters())
    changed = _merged(part, optimizer) if _factorized(part.target) else part.target
    if paths and plan is not None:
        sites = tuple(site for path, site in decisions.items() if path in paths)
        like = replace(plan, sites=sites, emit="modules")
        with _trainable(changed, paths) as frozen:
            changed = rewrite(
                part if changed is part.target else changed, like, init="empty", optimizer=optimizer or None
            )
        for path in frozen:
            for weight in cast("Factorized", changed.get_submodule(path)).weights:
                weight.requires_grad_(False)
    for name, parameter in changed.named_parameters():
        # Factors that were there before may be missing in what is loaded.
        if name in before and before[name] is not parameter and before[name].shape == parameter.shape:
            parameter.copy_(before[name])
    if changed is not part.target:
        part.replace_with(changed)


def sites_of(plan: Plan) -> list[str]:
    """Return the paths of the layers and the parameters that a plan factorizes."""
    return [site.parameter or site.name for site in plan.factorized]


def _merged(part: InPlaceModule, optimizer: Sequence[Optimizer]) -> nn.Module:
    """Return the merged module; where it is sharded, it takes the place of the factorized one at once.

    A module without its shards' hooks could not be rewritten again.
    """
    merged = merge(part, optimizer=optimizer or None)
    if not part.is_sharded:
        return merged
    part.replace_with(merged)
    return part.target


@contextmanager
def _trainable(module: nn.Module, paths: Iterable[str]) -> Iterator[list[str]]:
    """Let the weights of sites require gradients, and yield the sites whose weights are frozen.

    A layer may have been frozen again since it was factorized, and a frozen one would not be factorized.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    weights = {path: parameters.get(path, parameters.get(_weight_path(module, path))) for path in paths}
    frozen = {path: weight for path, weight in weights.items() if weight is not None and not weight.requires_grad}
    try:
        for weight in frozen.values():
            weight.requires_grad_()
        yield list(frozen)
    finally:
        for weight in frozen.values():
            weight.requires_grad_(False)


def _weight_path(module: nn.Module, path: str) -> str:
    """Return the path of the weight of a layer; "" if there is no such layer."""
    layer = dict(module.named_modules()).get(path)
    kind = None if layer is None else find_kind(layer)
    return "" if kind is None else f"{path}.{kind.weight}".removeprefix(".")


def _factorized(module: nn.Module) -> dict[str, str]:
    """Return the paths of the factorized layers of a module, each with the name of its weight in the dense module."""
    names = {}
    for path, layer in module.named_modules():
        if isinstance(layer, Factorized):
            is_parameter = isinstance(layer, FactorizedParameter)
            name = path if is_parameter else f"{path}.{layer.kind.weight}".removeprefix(".")
            names[path.replace("_orig_mod.", "")] = name.replace("_orig_mod.", "")
    return names


def names_of(optimizers: Sequence[Optimizer], model: nn.Module) -> Names:
    """Return the names of the parameters in each group of each optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


@torch.no_grad()
def restore_order(optimizers: Sequence[Optimizer], saved: Names, model: nn.Module, *, states: bool = True) -> None:
    """Put the parameters of groups in the order in which they were saved, and the states that were loaded by position.

    A new optimizer of a factorized model may hold its parameters in another order than one that went through a rewrite.
    With ``states=False`` each parameter keeps its state, which was loaded by name.
    """
    now = names_of(optimizers, model)
    for names, saved_names in zip(chain(*now), chain(*saved), strict=False):
        if Counter(names) != Counter(saved_names):
            odd = sorted(set(map(str, names)) ^ set(map(str, saved_names)))
            raise OptimizerError(
                f"A parameter group held {len(saved_names)} parameters when it was saved and holds {len(names)} now, and "
                f"{', '.join(odd[:1]) or 'one'} is not in both: states would go to other parameters. Make the optimizer "
                f"with the same groups as in the run that was saved."
            )
    parameters = dict(model.named_parameters())
    in_model = {id(parameter) for parameter in parameters.values()}
    for optimizer, groups in zip(optimizers, saved, strict=False):
        moved: dict[Tensor, Any] = {}
        for group, saved_names in zip(optimizer.param_groups, groups, strict=True):
            foreign = iter([parameter for parameter in group["params"] if id(parameter) not in in_model])
            ordered = [next(foreign) if name is None else parameters[name] for name in saved_names]
            pairs = zip(group["params"], ordered, strict=True)
            moved |= {parameter: optimizer.state[loaded] for loaded, parameter in pairs if loaded in optimizer.state}
            group["params"][:] = ordered
        if states:
            optimizer.state.update(moved)
