"""The content of a checkpoint: a model and its optimizers as plain types and tensors; saving and reading it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tdfx.checkpoint.plain import as_plain
from tdfx.checkpoint.sealed_file import read_sealed, write_sealed
from tdfx.errors import CheckpointError
from tdfx.layers.factorized import Factorized
from tdfx.layers.frozen import frozen_indices
from tdfx.layers.parameter import FactorizedParameter
from tdfx.layers.paths import parameters_by_path
from tdfx.optim.inner import with_inner
from tdfx.optim.masters import as_masters
from tdfx.optim.surgery import as_optimizers
from tdfx.passes.program import PLAN_ATTRIBUTE
from tdfx.passes.transform.graph_module import FactorizedGraphModule
from tdfx.plans.plan import Plan
from tdfx.wrappers.compiled import inner_module, is_wrapped
from tdfx.wrappers.unwrap import unwrap

FORMAT = 1

Record = dict[str, Any]

_FIELDS = {
    **{"format": int, "tensors": dict, "metadata": dict},
    **dict.fromkeys(("tdfx", "torch", "model"), str),
    **dict.fromkeys(("rewrites", "frozen", "tied", "optimizers"), list),
}


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    masters: Any = None,
    extra: Any = None,
) -> None:
    """Write a model, rewritten or not, to a file from which ``tdfx.load`` restores it.

    The file appears complete or not at all: a process killed at any moment leaves the previous file or the new one. It
    holds no code; ``torch.load(path, weights_only=True)`` can read it too.

    Args:
        model: Any module: dense, factorized or merged, also under ``torch.compile``.
        path: The file, usually named ``run.tdfx``; an existing file is replaced.
        optimizer: The optimizer that trains the model, or a list of them.
        masters: The wider copies of the parameters that the optimizer trains, as for ``rewrite``.
        extra: Whatever else the run needs: the step, ``scheduler.state_dict()``, a GradScaler's, ``torch.get_rng_state()``.
            Numbers, text, tensors, NumPy arrays (which come back as tensors), and lists, tuples, sets and dicts of these.
            ``tdfx.read`` returns it under ``"extra"``.

    Raises:
        CheckpointError: A value is not of a plain type or a tensor, or the file cannot be written.
        OptimizerError: The masters do not match the model.

    Example:
        >>> import pathlib, tempfile, tdfx, torch
        >>> model = tdfx.rewrite(torch.nn.Linear(64, 64), tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
        >>> path = pathlib.Path(tempfile.mkdtemp(), "run.tdfx")
        >>> tdfx.save(model, path, extra={"epoch": 3})
        >>> saved = tdfx.read(path)
        >>> restored = tdfx.load(saved, lambda: torch.nn.Linear(64, 64))
        >>> saved["extra"]["epoch"], torch.equal(restored.weight, model.weight)
        (3, True)
    """
    write_sealed(state(model, optimizer=optimizer, masters=masters, extra=extra), path)


def state(
    model: nn.Module,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    masters: Any = None,
    extra: Any = None,
) -> dict[str, Any]:
    """Return what ``save`` would write, for a checkpoint file of your own; ``tdfx.load`` accepts it in place of a path.

    Its tensors share memory with the model's, as those of ``state_dict()`` do. Arguments and errors are those of ``save``.

    Example:
        >>> import tdfx, torch
        >>> sorted(tdfx.state(torch.nn.Linear(2, 2))["tensors"])
        ['bias', 'weight']
    """
    wrapped = unwrap(_replica(model))
    inner = wrapped.model
    named_masters = as_masters(masters, inner, shards=wrapped.shards).by_name(inner)
    tensors = inner.state_dict()
    return {
        "format": FORMAT,
        "tdfx": _version(),
        "torch": str(torch.__version__),
        "model": type(inner).__name__,
        "rewrites": _rewrites(inner),
        "tensors": {name: as_plain(value, f"the state_dict's {name!r}") for name, value in tensors.items()},
        "metadata": as_plain(dict(getattr(tensors, "_metadata", {})), "the state_dict's metadata"),
        "frozen": _frozen(inner),
        "tied": tied_names(inner),
        "masters": {name: as_plain(master, f"the master of {name!r}") for name, master in named_masters.items()},
        "optimizers": [
            _optimizer_record(each, inner, named_masters, index)
            for index, each in enumerate(with_inner(as_optimizers(optimizer)))
        ],
        "extra": as_plain(extra, "extra"),
    }


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a checkpoint; ``tdfx.load`` accepts it in place of the path, and ``["extra"]`` is yours.

    Args:
        path: As given to ``save``.

    Raises:
        CheckpointError: There is no such file, tdfx did not write it, a newer tdfx did, or it is damaged.

    Example:
        See ``tdfx.save``.
    """
    return check_record(read_sealed(path))


def check_record(record: Any) -> Record:
    """Return a record, or raise CheckpointError if it lacks a field or a newer tdfx made it."""
    version = record.get("format") if isinstance(record, dict) else None
    if type(version) is not int or "rewrites" not in record:
        raise CheckpointError(
            "This is not a checkpoint of tdfx: it has no 'format' and 'rewrites'. Pass a path given to tdfx.save, or what "
            "tdfx.read or tdfx.state returned; load a bare state_dict with model.load_state_dict."
        )
    if version != FORMAT:
        raise CheckpointError(
            f"This checkpoint has format {version}, and this tdfx ({_version()}) reads format {FORMAT}: tdfx "
            f"{record.get('tdfx')} wrote it. Install that version, or a newer one."
        )
    for name, kind in _FIELDS.items():
        if not isinstance(record.get(name), kind):
            raise CheckpointError(
                f"This checkpoint's {name!r} is a {type(record.get(name)).__name__}, not a {kind.__name__}: it was changed "
                f"after tdfx made it. Pass what tdfx.read or tdfx.state returned, unchanged."
            )
    return dict(record)


def tied_names(model: nn.Module) -> list[list[str]]:
    """Return, for each parameter that the model holds under several names, these names."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in parameters_by_path(model, remove_duplicate=False):
        names[id(parameter)].append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)


def dense_names(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, str]:
    """Return name of a factor's parameter -> name of the dense parameter that it stands for.

    A layer that the model holds more than once counts under its first path, or under all with ``remove_duplicate=False``.
    """
    names: dict[str, str] = {}
    for path, layer in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(layer, Factorized):
            prefix = f"{path}." if path else ""
            weight = path if isinstance(layer, FactorizedParameter) else f"{prefix}{layer.kind.weight}"
            for index in range(len(layer.factors)):
                names[f"{prefix}factors.{index}.weight"] = weight
            names[f"{prefix}factors.{len(layer.factors) - 1}.bias"] = f"{prefix}{layer.kind.bias}"
    return names


def _version() -> str:
    try:
        return metadata.version("tdfx")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


def _replica(model: nn.Module) -> nn.Module:
    """Return what DistributedDataParallel wraps: one process may save by itself, and must not wait for the others."""
    inner = inner_module(model) if is_wrapped(model) else model
    return inner.module if isinstance(inner, DistributedDataParallel) else model


def _rewrites(model: nn.Module) -> list[dict[str, Any]]:
    """Return a record of each module that a rewrite returned, innermost first, with its factorized layers.

    The layers are read from the model, because its plan describes only the last rewrite.
    """
    roots = {path: module for path, module in model.named_modules() if PLAN_ATTRIBUTE in module.__dict__}
    sites: dict[str, list[dict[str, Any]]] = {path: [] for path in roots}
    for path, layer in model.named_modules():
        if isinstance(layer, Factorized):
            above = [root for root in roots if not root or path == root or path.startswith(f"{root}.")]
            sites.setdefault(max(above, key=len, default=""), []).append(_site_record(path, layer))
    records = []
    for path in sorted(sites, key=len, reverse=True):
        root = model.get_submodule(path)
        plan: Plan | None = root.__dict__.get(PLAN_ATTRIBUTE)
        emit = "graph" if isinstance(root, FactorizedGraphModule) else "modules"
        text = None if plan is None else plan.to_json(indent=None)
        records.append({"path": path, "emit": emit, "plan": text, "sites": sites[path]})
    return records


def _frozen(model: nn.Module) -> list[str]:
    """Return the parameters that do not train, except factors that a schedule freezes: it saves its own state."""
    layers = [layer for layer in model.modules() if isinstance(layer, Factorized)]
    scheduled = {id(layer.weights[index]) for layer in layers for index in frozen_indices(layer)}
    trains = {
        name: parameter.requires_grad or id(parameter) in scheduled for name, parameter in parameters_by_path(model)
    }
    return [name for name, trains_now in trains.items() if not trains_now]


def _site_record(path: str, layer: Factorized) -> dict[str, Any]:
    operation = layer.operation
    return {
        "path": path,
        "kind": layer.kind.name,
        "shape": list(operation.weight_shape),
        "groups": operation.groups,
        "transposed": operation.transposed,
        "slot": isinstance(layer, FactorizedParameter),
        "scheme": layer.origin.scheme,
        "ranks": list(layer.origin.ranks),
        "recompute": layer.recompute,
    }


def _optimizer_record(
    optimizer: Optimizer, model: nn.Module, masters: Mapping[str, Tensor], index: int
) -> dict[str, Any]:
    """Return groups and state by parameter names; a master has its parameter's name, a foreign parameter has None."""
    names = {id(parameter): name for name, parameter in parameters_by_path(model)}
    names |= {id(master): name for name, master in masters.items()}
    if not any(id(parameter) in names for group in optimizer.param_groups for parameter in group["params"]):
        raise CheckpointError(
            f"{type(optimizer).__name__} (optimizer {index}) holds no parameter of this {type(model).__name__}: it trains "
            f"another model, perhaps the one from before a rewrite. Pass the optimizer of this model, and masters= if it "
            f"trains wider copies of the parameters."
        )
    groups = [
        {
            "settings": {key: value for key, value in group.items() if key != "params"},
            "names": [names.get(id(parameter)) for parameter in group["params"]],
            "shapes": [list(parameter.shape) for parameter in group["params"]],
            "state": [dict(optimizer.state.get(parameter, {})) for parameter in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    name = type(optimizer).__name__
    return {"class": name, "groups": as_plain(groups, f"{name}'s state['groups']")}
