"""``merge_checkpoint``: turn any checkpoint of a factorized model into a dense ``state_dict``; no model is built."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tdfx.checkpoint.contents import Contents, of_content, read_contents
from tdfx.checkpoint.dense_files import check_target, write_dense
from tdfx.checkpoint.factor_names import Split, join_factors, place_splits, tied_splits
from tdfx.errors import CheckpointError, TdfxWarning
from tdfx.plans.plan import Plan

_ADVICE = (
    "Pass the plan by which the model was rewritten, as Plan.to_json wrote it: tdfx merge --plan plan.json, or plan=. "
    "Switch.plan and the callback's switch.plan have it."
)


@dataclass(frozen=True, slots=True)
class Dense:
    """The dense ``state_dict`` of a checkpoint."""

    tensors: dict[str, Any]
    """Name -> tensor, in the order of the checkpoint."""
    joined: tuple[str, ...]
    """The paths of the layers whose factors were joined."""
    contents: Contents
    """What was read."""


def merge_checkpoint(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    output: str | os.PathLike[str] | None = None,
    *,
    plan: Plan | None = None,
    trusted: bool = False,
) -> dict[str, Any]:
    """Return the dense ``state_dict`` of any checkpoint of a factorized model, and write it to a file if one is named.

    Reads files of ``tdfx.save``; a ``state_dict`` in a file of ``torch.save``, alone or beside other things, or in a
    ``.safetensors`` file; folders of Hugging Face, cut into several files or not; checkpoints of Lightning; and of
    ``torch.distributed.checkpoint``. How the weights were split is read from what lies beside them: the record of
    ``tdfx.save``, the state of a callback or of a ``Switch``, a plan's JSON under the key ``"plan"``; or from ``plan``. A
    dense checkpoint comes back as it is.

    Args:
        checkpoint: The file or the folder; or what ``torch.load``, ``tdfx.read`` or ``tdfx.state`` returned.
        output: A ``.safetensors`` or ``.pt`` file for the ``state_dict``; a ``.ckpt`` file, where Lightning wrote the
            checkpoint, for ``load_from_checkpoint``; or a new folder, where Hugging Face did, for ``from_pretrained``.
        plan: The plan by which the model, or the part of it that was rewritten, was rewritten.
        trusted: Whether code in the file may run: pickled objects, and the ``.metadata`` of a distributed checkpoint.

    Raises:
        CheckpointError: The checkpoint cannot be read, or nothing says how its weights were split, or the output cannot be
            written. Then nothing was written.

    Example:
        >>> import pathlib, tempfile, tdfx, torch
        >>> model = tdfx.rewrite(torch.nn.Linear(64, 64), tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
        >>> path = pathlib.Path(tempfile.mkdtemp(), "run.tdfx")
        >>> tdfx.save(model, path)
        >>> dense = tdfx.merge_checkpoint(path)
        >>> torch.nn.Linear(64, 64).load_state_dict(dense)
        <All keys matched successfully>
    """
    given = checkpoint if isinstance(checkpoint, Mapping) else Path(checkpoint)
    source = given if isinstance(given, Path) else None
    target = None if output is None else Path(output)
    if target is not None:
        check_target(target, source)
    dense = read_dense(given, plan=plan, trusted=trusted)
    contents = dense.contents
    if not dense.joined and plan is None and contents.record is None and not contents.plans:
        warnings.warn(
            "The checkpoint holds no factors and no plan, so it comes back as it is. If it should hold factors, see whether "
            "the model that was saved is the one that tdfx.rewrite or Switch.step returned.",
            TdfxWarning,
            stacklevel=2,
        )
    if target is not None:
        write_dense(dense.tensors, target, contents, source)
    return dense.tensors


def read_dense(checkpoint: Path | Mapping[str, Any], *, plan: Plan | None = None, trusted: bool = False) -> Dense:
    """Read a checkpoint and join its factors; arguments and errors are those of ``merge_checkpoint``."""
    if plan is not None and not isinstance(plan, Plan):
        raise CheckpointError(f"plan={plan!r} is a {type(plan).__name__}, not a plan. Pass tdfx.Plan.from_json(text).")
    contents = read_contents(checkpoint, trusted=trusted) if isinstance(checkpoint, Path) else of_content(checkpoint)
    state = contents.weights
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) for key in state):
        raise CheckpointError(
            f"The checkpoint holds a {type(state).__name__}, not a mapping from names to tensors. Pass one that holds a "
            f"state_dict, as torch.save(model.state_dict(), path) writes it."
        )
    record = contents.record
    if record is None and not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"The checkpoint holds no tensor under the names {', '.join(map(repr, list(state)[:3]))}: it is no state_dict, "
            f"and none lies under its usual keys. Pass the state_dict itself to tdfx.merge_checkpoint."
        )
    if record is not None:
        splits = {site["path"]: Split.of_record(site) for rewrite in record["rewrites"] for site in rewrite["sites"]}
        splits |= tied_splits(state, splits)
    else:
        plans = (plan, *contents.plans) if plan is not None else contents.plans
        splits = place_splits(state, plans, advice=_ADVICE)
    dense = join_factors(state, splits, None if record is None else record.get("masters"))
    return Dense(dense, tuple(splits), contents)
