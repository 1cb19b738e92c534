"""Making a model again from a checkpoint: the dense one is built, rewritten without values, and filled."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from tdfx.checkpoint.groups import Refill, filled_masters, refill
from tdfx.checkpoint.record import Record, checked, dense_names, read, tied
from tdfx.errors import CheckpointError, TdfxError, nearest
from tdfx.layers.copying import rebind, structural_copy
from tdfx.optim.masters import as_masters
from tdfx.optim.surgery import as_optimizers
from tdfx.passes.pipeline import find_sites, rewrite_by, use_plan
from tdfx.passes.program import PLAN_ATTRIBUTE
from tdfx.passes.transform.graph_module import FactorizedGraphModule
from tdfx.plans.plan import Plan, SitePlan
from tdfx.wrappers.compiled import Compiled
from tdfx.wrappers.unwrap import unwrap


def load(
    path: str | os.PathLike[str] | dict[str, Any],
    build_model: nn.Module | Callable[[], nn.Module],
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    masters: Any = None,
    map_location: str | torch.device | None = None,
) -> nn.Module:
    """Make a model again as it was when it was saved: factorized or not, with its values, and with its optimizer's state.

    The dense model is rewritten without looking at its values, so nothing is decomposed and it may lie on the meta device.
    What is passed in is left as it was, also by a failure; only the optimizer, when all has gone well, is changed.

    Args:
        path: A file that ``save`` wrote, or what ``read`` or ``state`` gave.
        build_model: The dense model, as it was before any rewrite, or a function that returns it.
        optimizer: An optimizer of the class that was saved, over the parameters of the dense model, in the same groups; or
            a list of as many as were saved. Afterwards it holds those of the returned model, with the saved state and
            settings. ``build_model`` must then be the model itself. Make schedulers before, and load their state after.
        masters: Where the optimizer trains wider copies of the dense model's parameters: those, as for ``rewrite``. It then
            holds the returned model's, with the saved values.
        map_location: The device for all tensors. If left out, each goes to where the dense model has it, or to the CPU
            where that is the meta device. Dtypes and memory formats are those that were saved.

    Returns:
        A new model of fresh tensors, in the mode of the dense one.

    Raises:
        CheckpointError: The file is damaged, was not made by tdfx or by a newer one, or is of another model or optimizer, or
            of other masters.
        OptimizerError: The masters do not go with the dense model.

    Example:
        See ``tdfx.save``.
    """
    record = checked(path) if isinstance(path, dict) else read(path)
    optimizers = as_optimizers(optimizer)
    if optimizers and not isinstance(build_model, nn.Module):
        raise CheckpointError(
            "With optimizer=, build_model must be the dense model whose parameters it holds, and it is a function "
            "that builds another one. Build the model first: model = build(), then the optimizer over model.parameters()."
        )
    wrapped = unwrap(build_model if isinstance(build_model, nn.Module) else build_model())
    above = as_masters(masters, wrapped.model, shards=wrapped.shards)
    body = _own_parameters(wrapped.model)
    made = _rewritten(body, record)
    _check_keys(made, record)
    target = None if map_location is None else torch.device(map_location)
    with torch.no_grad():
        _fill(made, record, target)
    loaded = filled_masters(above, record, wrapped.model, made, wanted=bool(above or optimizers))
    before = {**dict(wrapped.model.named_parameters()), **above.named(wrapped.model)}
    after = {**dict(made.named_parameters()), **loaded}
    dense_of = dense_names(made)
    work: Refill = refill(optimizers, record, before, after, dense_of)
    result = wrapped.wrap(made)
    work.commit()
    above.renewed(wrapped.model, made, loaded, dense_of)
    return result


def _own_parameters(model: nn.Module) -> nn.Module:
    """Return a copy with parameters of its own over the same memory, all of which a rewrite may replace."""
    body = structural_copy(model)
    Compiled.of(model).mark(body)

    def own(one: Tensor) -> Tensor:
        if type(one) is not nn.Parameter:
            return copy.deepcopy(one)
        learns = one.is_floating_point() or one.is_complex()
        return _like_parameter(one, one.detach(), learns)

    _replace(body, lambda name, one: own(one) if isinstance(one, nn.Parameter) else one)
    return body


def _like_parameter(old: Tensor, values: Tensor, learns: bool) -> nn.Parameter:
    made = nn.Parameter(values, requires_grad=learns)
    made.__dict__.update(old.__dict__)
    return made


def _replace(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Replace every parameter and buffer, each once however often it is held."""
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for path, owner in list(model.named_modules(remove_duplicate=True)):
        for name, one in [*owner._parameters.items(), *owner._buffers.items()]:
            if one is None:
                continue
            if id(one) not in done:
                done[id(one)] = (one, make(f"{path}.{name}" if path else name, one))
            if done[id(one)][1] is not one:
                # As an assignment, because recurrent layers keep a list of their own.
                setattr(owner, name, done[id(one)][1])


def _rewritten(body: nn.Module, record: Record) -> nn.Module:
    try:
        for rewrite in record["rewrites"]:
            part = _rewrite_part(body.get_submodule(rewrite["path"]), rewrite)
            if not rewrite["path"]:
                body = part
                continue
            owner, _, name = rewrite["path"].rpartition(".")
            body.get_submodule(owner)._modules[name] = part
    except (TdfxError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint is of a {record['model']} whose rewrite does not go with this {type(body).__name__}: {error} "
            f"Pass a build_model that returns the dense model as it was before the rewrite."
        ) from error
    return body


def _rewrite_part(part: nn.Module, rewrite: dict[str, Any]) -> nn.Module:
    found = find_sites(part, rewrite["emit"])
    names = {one.slot.path: one.name for one in found.sites if one.slot is not None}
    stem = f"{rewrite['path']}." if rewrite["path"] else ""
    sites = []
    for one in rewrite["sites"]:
        path = "" if one["path"] == rewrite["path"] else one["path"].removeprefix(stem)
        sites.append(
            SitePlan(
                name=names.get(path, path) if one["slot"] else path,
                kind=one["kind"],
                shape=tuple(one["shape"]),
                calls=1,
                groups=one["groups"],
                transposed=one["transposed"],
                parameter=path if one["slot"] else None,
                scheme=one["scheme"],
                ranks=tuple(one["ranks"]),
                parameters_before=0,
                parameters_after=0,
            )
        )
    wish = Plan(sites=tuple(sites), emit=rewrite["emit"])
    made = rewrite_by(use_plan(found, wish), init="empty").program.module
    rebind(made, part)
    if (rewrite["emit"] == "graph") != isinstance(made, FactorizedGraphModule):
        raise CheckpointError(f"It was given back as {rewrite['emit']!r} then, and cannot be now.")
    if rewrite["plan"] is None:
        made.__dict__.pop(PLAN_ATTRIBUTE, None)
    else:
        made.__dict__[PLAN_ATTRIBUTE] = Plan.from_json(rewrite["plan"])
    return made


def _check_keys(model: nn.Module, record: Record) -> None:
    """Raise CheckpointError unless the model has the tensors of the checkpoint, of the same shapes."""
    saved = record["tensors"]
    own = model.state_dict()
    advice = "Pass a build_model that returns the dense model of the run that was saved."
    if missing := [name for name in own if name not in saved]:
        raise CheckpointError(
            f"The checkpoint is of another model ({record['model']}): it lacks {len(missing)} tensors of this "
            f"{type(model).__name__}, {missing[0]!r} first. Nearest: {nearest(missing[0], saved)}. {advice}"
        )
    if extra := [name for name in saved if name not in own]:
        raise CheckpointError(
            f"The checkpoint is of another model ({record['model']}): it has {len(extra)} tensors that this "
            f"{type(model).__name__} lacks, {extra[0]!r} first. Nearest: {nearest(extra[0], own)}. {advice}"
        )
    for name, one in own.items():
        there = saved[name]
        if not isinstance(one, Tensor) or isinstance(one, UninitializedParameter | UninitializedBuffer):
            continue
        if not isinstance(there, Tensor) or there.shape != one.shape:
            shape = tuple(there.shape) if isinstance(there, Tensor) else type(there).__name__
            raise CheckpointError(
                f"The checkpoint's {name!r} has shape {shape}, and the model's has {tuple(one.shape)}: it is of another "
                f"model. {advice}"
            )
    if tied(model) != record["tied"]:
        raise CheckpointError(
            f"The checkpoint is of a model that shares the parameters {record['tied']}, and this one shares {tied(model)}. "
            f"Share them in build_model as they were shared in the run."
        )


def _fill(model: nn.Module, record: Record, target: torch.device | None) -> None:
    """Give the model tensors of its own, like those that were saved, and load them as torch does."""
    saved, frozen = record["tensors"], set(record["frozen"])

    def fresh(name: str, one: Tensor) -> Tensor:
        if isinstance(one, UninitializedParameter | UninitializedBuffer):
            return copy.deepcopy(one)
        values = saved.get(name)
        if not isinstance(values, Tensor) and one.is_meta:
            raise CheckpointError(
                f"{name!r} is not in the state_dict, so the checkpoint has no values for it, and build_model gave it on the "
                f"meta device. Build the model on a real device."
            )
        device = target or (one.device if not one.is_meta or not isinstance(values, Tensor) else values.device)
        made = (
            torch.empty_like(values, device=device) if isinstance(values, Tensor) else one.detach().clone().to(device)
        )
        if not isinstance(one, nn.Parameter):
            return made
        return _like_parameter(one, made, name not in frozen and (made.is_floating_point() or made.is_complex()))

    _replace(model, fresh)
    content = OrderedDict(saved)
    content._metadata = record["metadata"]  # type: ignore[attr-defined]
    try:
        model.load_state_dict(cast("Any", content), strict=True)
    except Exception as error:  # a model's own hooks may raise anything
        raise CheckpointError(
            f"This {type(model).__name__} does not take the checkpoint's tensors: {error}. Pass a build_model that returns "
            f"the dense model of the run that was saved."
        ) from error
