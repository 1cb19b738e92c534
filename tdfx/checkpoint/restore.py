"""Restore a model from a checkpoint: build the dense model, rewrite it without values, and load the saved values."""

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

from tdfx.checkpoint.optimizer_state import load_masters, prepare_optimizers
from tdfx.checkpoint.record import Record, check_record, dense_names, read, tied_names
from tdfx.errors import CheckpointError, TdfxError, nearest
from tdfx.layers.copying import rebind, structural_copy
from tdfx.layers.paths import parameters_by_path
from tdfx.optim.inner import check_holders, with_inner
from tdfx.optim.masters import as_masters
from tdfx.optim.surgery import as_optimizers
from tdfx.passes.pipeline import find_sites, rewrite_by, use_plan
from tdfx.passes.program import PLAN_ATTRIBUTE
from tdfx.passes.transform.graph_module import FactorizedGraphModule
from tdfx.plans.plan import Plan, SitePlan
from tdfx.wrappers.compiled import CompiledParts
from tdfx.wrappers.unwrap import unwrap


def load(
    path: str | os.PathLike[str] | dict[str, Any],
    build_model: nn.Module | Callable[[], nn.Module],
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    masters: Any = None,
    map_location: str | torch.device | None = None,
) -> nn.Module:
    """Restore a model as it was when it was saved, factorized or not, with its values and its optimizer's state.

    The dense model is rewritten without looking at its values, so nothing is decomposed, and it may be on the meta device.
    What is passed in stays unchanged, also after a failure; only the optimizer is changed, once everything has succeeded.

    Args:
        path: A file that ``save`` wrote, or what ``read`` or ``state`` returned.
        build_model: The dense model, as it was before any rewrite, or a function that returns it.
        optimizer: An optimizer of the saved class, over the parameters of the dense model, in the same groups; or a list of
            as many as were saved. Afterwards it holds the parameters of the returned model, with the saved state and
            settings. ``build_model`` must then be the model itself. Make schedulers before, and load their state after.
        masters: If the optimizer trains wider copies of the dense model's parameters: those copies, as for ``rewrite``.
            Afterwards it holds the returned model's masters, with the saved values.
        map_location: The device for all tensors. If left out, each tensor goes to the device it has in the dense model, or
            to the CPU if that is the meta device. Dtypes and memory formats are the saved ones.

    Returns:
        A new model with new tensors, in the train or eval mode of the dense model.

    Raises:
        CheckpointError: The file is damaged, was not made by tdfx or by a newer version, or belongs to another model or
            optimizer, or to other masters.
        OptimizerError: The masters do not match the dense model.

    Example:
        See ``tdfx.save``.
    """
    record = check_record(path) if isinstance(path, dict) else read(path)
    passed = as_optimizers(optimizer)
    optimizers = with_inner(passed)
    if optimizers and not isinstance(build_model, nn.Module):
        raise CheckpointError(
            "With optimizer=, build_model must be the dense model whose parameters it holds, not a function that builds "
            "another one. Build the model first: model = build(), then the optimizer over model.parameters()."
        )
    wrapped = unwrap(build_model if isinstance(build_model, nn.Module) else build_model())
    dense = wrapped.model
    dense_masters = as_masters(masters, dense, shards=wrapped.shards)
    model = _rewrite_as_saved(_with_new_parameters(dense), record)
    _check_tensors(model, record)
    with torch.no_grad():
        _load_tensors(model, record, None if map_location is None else torch.device(map_location))
    loaded_masters = load_masters(dense_masters, record, dense, model, needed=bool(dense_masters or optimizers))
    trained_before = {**dict(parameters_by_path(dense)), **dense_masters.by_name(dense)}
    trained_after = {**dict(parameters_by_path(model)), **loaded_masters}
    dense_of = dense_names(model)
    check_holders(optimizers, {f"the parameter {name!r}": (tensor,) for name, tensor in trained_before.items()})
    commit = prepare_optimizers(passed, record, trained_before, trained_after, dense_of)
    result = wrapped.wrap(model)
    commit()
    dense_masters.write_loaded(dense, model, loaded_masters, dense_of)
    return result


def _with_new_parameters(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters are new objects on the same memory, so that a rewrite may replace any of them."""
    copied = structural_copy(model)
    CompiledParts.of(model).compile_in_place(copied)

    def new_parameter(name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            return tensor
        if type(tensor) is not nn.Parameter:
            return copy.deepcopy(tensor)
        return _like_parameter(tensor, tensor.detach(), tensor.is_floating_point() or tensor.is_complex())

    _replace_tensors(copied, new_parameter)
    return copied


def _like_parameter(old: Tensor, values: Tensor, requires_grad: bool) -> nn.Parameter:
    """Return a parameter with other values and the attributes that were set on the old one."""
    parameter = nn.Parameter(values, requires_grad=requires_grad)
    parameter.__dict__.update(old.__dict__)
    return parameter


def _replace_tensors(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Replace every parameter and buffer by ``make(name, tensor)``, called once for a tensor that is held several times."""
    replaced: dict[int, tuple[Tensor, Tensor]] = {}
    for path, owner in list(model.named_modules()):
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is None:
                continue
            if id(tensor) not in replaced:
                replaced[id(tensor)] = (tensor, make(f"{path}.{name}" if path else name, tensor))
            new = replaced[id(tensor)][1]
            if new is not tensor:
                setattr(owner, name, new)  # by assignment, because recurrent layers keep a list of their own


def _rewrite_as_saved(model: nn.Module, record: Record) -> nn.Module:
    """Rewrite the dense model as the saved model was rewritten, with empty factors."""
    try:
        for rewrite in record["rewrites"]:
            owner, _, name = rewrite["path"].rpartition(".")
            rewritten = _rewrite_module(model.get_submodule(rewrite["path"]), rewrite)
            if name:
                model.get_submodule(owner)._modules[name] = rewritten
            else:
                model = rewritten
    except (TdfxError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint is of a {record['model']} whose rewrite does not fit this {type(model).__name__}: {error} "
            f"Pass a build_model that returns the dense model as it was before the rewrite."
        ) from error
    return model


def _rewrite_module(module: nn.Module, rewrite: dict[str, Any]) -> nn.Module:
    program = find_sites(module, rewrite["emit"])
    names = {site.slot.path: site.name for site in program.sites if site.slot is not None}
    prefix = f"{rewrite['path']}." if rewrite["path"] else ""
    sites = []
    for saved in rewrite["sites"]:
        path = "" if saved["path"] == rewrite["path"] else saved["path"].removeprefix(prefix)
        settings = {name: saved[name] for name in ("kind", "groups", "transposed", "scheme")}
        settings |= {"shape": tuple(saved["shape"]), "ranks": tuple(saved["ranks"]), "calls": 1}
        settings |= {"recompute": saved.get("recompute", False)}  # files of earlier versions have none
        name, parameter = (names.get(path, path), path) if saved["slot"] else (path, None)
        sites.append(SitePlan(name=name, parameter=parameter, parameters_before=0, parameters_after=0, **settings))
    plan = Plan(sites=tuple(sites), emit=rewrite["emit"])
    rewritten = rewrite_by(use_plan(program, plan), init="empty").program.module
    rebind(rewritten, module)
    if (rewrite["emit"] == "graph") != isinstance(rewritten, FactorizedGraphModule):
        raise CheckpointError(f"It was saved with emit={rewrite['emit']!r}, which is not possible for this model.")
    if rewrite["plan"] is None:
        rewritten.__dict__.pop(PLAN_ATTRIBUTE, None)
    else:
        rewritten.__dict__[PLAN_ATTRIBUTE] = Plan.from_json(rewrite["plan"])
    return rewritten


def _check_tensors(model: nn.Module, record: Record) -> None:
    saved, tensors = record["tensors"], model.state_dict()
    advice = "Pass a build_model that returns the dense model of the run that was saved."
    sides = (
        (tensors, saved, "lacks {} tensors of this {}"),
        (saved, tensors, "has {} tensors that this {} lacks"),
    )
    for names, others, text in sides:
        if different := [name for name in names if name not in others]:
            raise CheckpointError(
                f"The checkpoint is of another model ({record['model']}): it "
                f"{text.format(len(different), type(model).__name__)}, {different[0]!r} first. "
                f"Nearest: {nearest(different[0], others)}. {advice}"
            )
    for name, tensor in tensors.items():
        value = saved[name]
        if not isinstance(tensor, Tensor) or isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            continue
        if not isinstance(value, Tensor) or value.shape != tensor.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(
                f"The checkpoint's {name!r} has shape {shape}, and the model's has {tuple(tensor.shape)}: it is of another "
                f"model. {advice}"
            )
    if tied_names(model) != record["tied"]:
        raise CheckpointError(
            f"The checkpoint is of a model that shares the parameters {record['tied']}, and this one shares "
            f"{tied_names(model)}. Share them in build_model as they were shared in the run."
        )


def _state_dict_keys(model: nn.Module) -> dict[int, str]:
    """Return the key of each tensor in the state_dict, by identity: a hook may have changed it from the tensor's path."""
    try:
        tensors = model.state_dict(keep_vars=True)
    except TypeError:  # a user's own state_dict, which does not take the argument
        return {}
    return {id(tensor): key for key, tensor in tensors.items() if isinstance(tensor, Tensor)}


def _load_tensors(model: nn.Module, record: Record, device: torch.device | None) -> None:
    """Give the model new tensors with the saved dtypes and memory formats, and load the saved values as torch does."""
    saved, frozen = record["tensors"], set(record["frozen"])
    keys = _state_dict_keys(model)

    def new_tensor(name: str, tensor: Tensor) -> Tensor:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            return copy.deepcopy(tensor)
        values = saved.get(keys.get(id(tensor), name))
        if isinstance(values, Tensor):
            new = torch.empty_like(values, device=device or (values.device if tensor.is_meta else tensor.device))
        elif tensor.is_meta:
            raise CheckpointError(
                f"{name!r} is not in the state_dict, so the checkpoint has no values for it, and build_model returned it on "
                f"the meta device. Build the model on a real device."
            )
        else:
            new = tensor.detach().clone().to(device or tensor.device)
        if not isinstance(tensor, nn.Parameter):
            return new
        return _like_parameter(tensor, new, name not in frozen and (new.is_floating_point() or new.is_complex()))

    _replace_tensors(model, new_tensor)
    state_dict = OrderedDict(saved)
    state_dict._metadata = record["metadata"]  # type: ignore[attr-defined]
    try:
        model.load_state_dict(cast("Any", state_dict), strict=True)
    except Exception as error:  # a model's own hooks may raise anything
        raise CheckpointError(
            f"This {type(model).__name__} does not accept the checkpoint's tensors: {error}. Pass a build_model that "
            f"returns the dense model of the run that was saved."
        ) from error
