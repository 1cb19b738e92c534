"""What a checkpoint holds of a model and its optimizers, as plain types and tensors."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tdfx.checkpoint.files import read_sealed, write
from tdfx.errors import CheckpointError
from tdfx.layers.factorized import Factorized
from tdfx.layers.frozen import frozen_indices
from tdfx.layers.parameter import FactorizedParameter
from tdfx.optim.masters import Masters, as_masters
from tdfx.optim.surgery import as_optimizers
from tdfx.passes.program import PLAN_ATTRIBUTE
from tdfx.passes.transform.graph_module import FactorizedGraphModule
from tdfx.plans.plan import Plan
from tdfx.wrappers.unwrap import unwrap

FORMAT = 1

Record = dict[str, Any]

_FIELDS = {
    "format": int,
    "tdfx": str,
    "torch": str,
    "model": str,
    "rewrites": list,
    "tensors": dict,
    "metadata": dict,
    "frozen": list,
    "tied": list,
    "optimizers": list,
}


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    masters: Any = None,
    extra: Any = None,
) -> None:
    """Write a model, before, at or after a rewrite or a merge, to a file from which ``tdfx.load`` makes it again.

    The file takes its place at once when all of it is on the disk: a process killed at any moment leaves the former one
    or the new one. It holds no code; ``torch.load(path, weights_only=True)`` can read it too.

    Args:
        model: Any module, rewritten or not, also one under ``torch.compile``.
        path: The file, by custom ``run.tdfx``; what is there is replaced.
        optimizer: The optimizer that trains the model, or a list of them.
        masters: The wider copies of the parameters that the optimizer trains, as for ``rewrite``.
        extra: What else the run needs: the step, ``scheduler.state_dict()``, a GradScaler's, ``torch.get_rng_state()``.
            Numbers, text, tensors, and lists, tuples, sets and dicts of these. ``tdfx.read`` gives it back.

    Raises:
        CheckpointError: Something in it is no plain type or tensor, or the file cannot be written.
        OptimizerError: The masters do not go with the model.

    Example:
        >>> import pathlib, tempfile, tdfx, torch
        >>> model = tdfx.rewrite(torch.nn.Linear(64, 64), tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
        >>> path = pathlib.Path(tempfile.mkdtemp(), "run.tdfx")
        >>> tdfx.save(model, path, extra={"epoch": 3})
        >>> saved = tdfx.read(path)
        >>> again = tdfx.load(saved, lambda: torch.nn.Linear(64, 64))
        >>> saved["extra"]["epoch"], torch.equal(again.weight, model.weight)
        (3, True)
    """
    write(state(model, optimizer=optimizer, masters=masters, extra=extra), path)


def state(
    model: nn.Module,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    masters: Any = None,
    extra: Any = None,
) -> dict[str, Any]:
    """Return what ``save`` would write, to put into a checkpoint of your own; ``tdfx.load`` takes it in place of a path.

    Its tensors are the model's own memory, as those of ``state_dict()`` are.

    Args:
        model: As for ``save``.
        optimizer: As for ``save``.
        masters: As for ``save``.
        extra: As for ``save``.

    Raises:
        CheckpointError: Something in it is no plain type or tensor.
        OptimizerError: The masters do not go with the model.

    Example:
        >>> import tdfx, torch
        >>> sorted(tdfx.state(torch.nn.Linear(2, 2))["tensors"])
        ['bias', 'weight']
    """
    wrapped = unwrap(model)
    inside = wrapped.model
    optimizers = as_optimizers(optimizer)
    above = as_masters(masters, inside, shards=wrapped.shards)
    held = inside.state_dict()
    return {
        "format": FORMAT,
        "tdfx": _version(),
        "torch": str(torch.__version__),
        "model": type(inside).__name__,
        "rewrites": _rewrites(inside),
        "tensors": {name: _plain(value, f"the state_dict's {name!r}") for name, value in held.items()},
        "metadata": _plain(dict(getattr(held, "_metadata", {})), "the state_dict's metadata"),
        "frozen": _frozen(inside),
        "tied": tied(inside),
        "masters": {name: _plain(master, f"the master of {name!r}") for name, master in above.named(inside).items()},
        "optimizers": [_of_optimizer(one, inside, above, index) for index, one in enumerate(optimizers)],
        "extra": _plain(extra, "extra"),
    }


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint holds; ``tdfx.load`` takes it in place of the path, and ``["extra"]`` is yours.

    Args:
        path: As given to ``save``.

    Raises:
        CheckpointError: There is no such file, tdfx did not write it, a newer tdfx did, or it is damaged.

    Example:
        See ``tdfx.save``.
    """
    return checked(read_sealed(path))


def checked(record: Any) -> Record:
    """Return a record that has all its fields.

    Raises:
        CheckpointError: It is no record, or a newer tdfx made it.
    """
    found = record.get("format") if isinstance(record, dict) else None
    if type(found) is not int or "rewrites" not in record:
        raise CheckpointError(
            "This is no checkpoint of tdfx: it has no 'format' and 'rewrites'. Pass a path given to tdfx.save, or what "
            "tdfx.read or tdfx.state gave; a bare state_dict goes to model.load_state_dict."
        )
    if found != FORMAT:
        raise CheckpointError(
            f"This checkpoint has format {found}, and this tdfx ({_version()}) reads format {FORMAT}: tdfx "
            f"{record.get('tdfx')} wrote it. Install that version, or a newer one."
        )
    for name, kind in _FIELDS.items():
        if not isinstance(record.get(name), kind):
            raise CheckpointError(
                f"This checkpoint's {name!r} is a {type(record.get(name)).__name__}, not a {kind.__name__}: it was changed "
                f"after tdfx made it. Pass what tdfx.read or tdfx.state gave, as it is."
            )
    return dict(record)


def tied(model: nn.Module) -> list[list[str]]:
    """Return the names under which each parameter that has several is held."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, one in model.named_parameters(remove_duplicate=False):
        names[id(one)].append(name)
    return sorted(sorted(one) for one in names.values() if len(one) > 1)


def dense_names(model: nn.Module) -> dict[str, str]:
    """Return for each factor's parameter the name of the dense one that it belongs to."""
    found: dict[str, str] = {}
    for path, one in model.named_modules():
        if isinstance(one, Factorized):
            slot = isinstance(one, FactorizedParameter)
            stem = f"{path}." if path else ""
            last = len(one.factors) - 1
            for index in range(len(one.factors)):
                found[f"{stem}factors.{index}.weight"] = path if slot else f"{stem}{one.kind.weight}"
            found[f"{stem}factors.{last}.bias"] = f"{stem}{one.kind.bias}"
    return found


def _version() -> str:
    try:
        return metadata.version("tdfx")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


def _rewrites(model: nn.Module) -> list[dict[str, Any]]:
    """Return what was rewritten, innermost first: each module that a rewrite gave back, and the layers that are its own.

    They are read from the layers as they are, since a plan says only what the last rewrite was to do.
    """
    roots = {path: one for path, one in model.named_modules() if PLAN_ATTRIBUTE in one.__dict__}
    sites: dict[str, list[dict[str, Any]]] = {path: [] for path in roots}
    for path, one in model.named_modules():
        if isinstance(one, Factorized):
            above = [root for root in roots if not root or path == root or path.startswith(f"{root}.")]
            sites.setdefault(max(above, key=len, default=""), []).append(_site(path, one))
    found = []
    for path in sorted(sites, key=len, reverse=True):
        root = model.get_submodule(path)
        plan: Plan | None = root.__dict__.get(PLAN_ATTRIBUTE)
        found.append(
            {
                "path": path,
                "emit": "graph" if isinstance(root, FactorizedGraphModule) else "modules",
                "plan": None if plan is None else plan.to_json(indent=None),
                "sites": sites[path],
            }
        )
    return found


def _frozen(model: nn.Module) -> list[str]:
    """Return the parameters that do not train, apart from factors that rest for now: a schedule has its own state."""
    layers = [one for one in model.modules() if isinstance(one, Factorized)]
    resting = {id(layer.weights[index]) for layer in layers for index in frozen_indices(layer)}
    return [name for name, one in model.named_parameters() if not one.requires_grad and id(one) not in resting]


def _site(path: str, layer: Factorized) -> dict[str, Any]:
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
    }


def _of_optimizer(optimizer: Optimizer, model: nn.Module, above: Masters, index: int) -> dict[str, Any]:
    """Return groups and state by the names of parameters, of which a master has its own's; one of another model has none."""
    names = {id(one): name for name, one in model.named_parameters()}
    names |= {id(master): name for name, master in above.named(model).items()}
    if not any(id(one) in names for group in optimizer.param_groups for one in group["params"]):
        raise CheckpointError(
            f"{type(optimizer).__name__} (optimizer {index}) holds no parameter of this {type(model).__name__}: it trains "
            f"another model, perhaps the one from before a rewrite. Pass the optimizer of this one, and masters= where it "
            f"trains wider copies of the parameters."
        )
    groups = [
        {
            "settings": {key: value for key, value in group.items() if key != "params"},
            "names": [names.get(id(one)) for one in group["params"]],
            "shapes": [list(one.shape) for one in group["params"]],
            "state": [dict(optimizer.state.get(one, {})) for one in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    made = {"class": type(optimizer).__name__, "groups": groups}
    plain: dict[str, Any] = _plain(made, f"{type(optimizer).__name__}'s state")
    return plain


def _plain(value: Any, where: str) -> Any:
    """Return a copy of nested containers; tensors are detached and shared.

    Raises:
        CheckpointError: There is something in them that only code could bring back.
    """
    if value is None or isinstance(value, bool | bytes | bytearray | torch.dtype | torch.device | torch.Size):
        return value
    if isinstance(value, Tensor):
        detached = value.detach()
        # A view of something larger would take all of that along.
        whole = detached.untyped_storage().nbytes() if type(detached) is Tensor and not detached.is_sparse else 0
        return detached.clone() if whole > detached.numel() * detached.element_size() else detached
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, complex):
        return complex(value)
    if isinstance(value, Counter | OrderedDict) and type(value) in {Counter, OrderedDict}:
        return type(value)({_plain(key, where): _plain(one, f"{where}[{key!r}]") for key, one in value.items()})
    if isinstance(value, dict):
        return {_plain(key, where): _plain(one, f"{where}[{key!r}]") for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one, f"{where}[{index}]") for index, one in enumerate(value)]
    if isinstance(value, tuple):
        return tuple(_plain(one, f"{where}[{index}]") for index, one in enumerate(value))
    if isinstance(value, set | frozenset):
        return {_plain(one, where) for one in value}
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which no checkpoint can hold without code: only "
        f"numbers, text, bytes, tensors, and lists, tuples, sets and dicts of them. Turn it into these, as .state_dict() "
        f"and .tolist() do."
    )
