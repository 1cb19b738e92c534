"""Read any checkpoint: what tdfx, torch, safetensors, Hugging Face, Lightning or torch's distributed checkpoints wrote.

Files are read without running code in them. A file that cannot be read in that way is read only if the user trusts it.
"""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tdfx.checkpoint.record import Record, check_record
from tdfx.checkpoint.sealed_file import is_sealed, read_sealed
from tdfx.errors import CheckpointError, PlanError, first_line
from tdfx.plans.plan import Plan

CALLBACK_FILE = "tdfx.pt"
"""The file in a checkpoint's folder of Transformers that holds the state of the callback."""
_WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors",
)
"""Files of weights in a folder, the best first; with ``.index.json`` after the name they are cut into several files."""
_NESTED = ("state_dict", "model_state_dict", "model", "module", "net")
"""Keys under which checkpoints store the weights besides other things."""
_DEPTH = 4
"""How deep a record or a plan is looked for in nested mappings."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds."""

    weights: Any
    """The ``state_dict``; what else the file holds, if it has none."""
    plans: tuple[Plan, ...] = ()
    """The plans that lie beside it: each says how the weights of a part of the model were split."""
    record: Record | None = None
    """The record that tdfx made, if it did."""
    whole: Any = None
    """All of the file, for a checkpoint of Lightning."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name of a tensor -> the file that holds it, for a folder of several files."""

    @property
    def is_lightning(self) -> bool:
        """True for a checkpoint of Lightning's Trainer."""
        return isinstance(self.whole, Mapping) and {"state_dict", "pytorch-lightning_version"} <= self.whole.keys()


def read_contents(path: Path, *, trusted: bool = False) -> Contents:
    """Read a checkpoint.

    Args:
        path: A file, or a folder of Hugging Face or of torch.distributed.checkpoint.
        trusted: Whether code in the file may run, where it holds more than tensors and plain types.

    Raises:
        CheckpointError: There is none, it is damaged, or it would run code.
    """
    if path.is_dir():
        return _read_folder(path, trusted)
    if path.name.endswith(".index.json"):
        return _read_folder(path.parent, trusted)
    if path.suffix == ".safetensors":
        return Contents(_read_safetensors(path), _plans_beside(path))
    content = read_sealed(path) if is_sealed(path) else _read_pickle(path, trusted)
    return of_content(content, _plans_beside(path))


def of_content(content: Any, plans: tuple[Plan, ...] = ()) -> Contents:
    """Find record, ``state_dict`` and plans in what a file holds."""
    records = list(_records(content))
    if len(records) > 1:
        raise CheckpointError(
            f"The checkpoint holds {len(records)} models of tdfx.state. Pass one of them to tdfx.merge_checkpoint in place "
            f"of the path."
        )
    if records:
        record = check_record(records[0])
        return Contents(record["tensors"], record=record, whole=content)
    found = dict.fromkeys([*plans, *_plans_in(content)])
    return Contents(_find_state_dict(content), tuple(found), whole=content)


def _read_folder(folder: Path, trusted: bool) -> Contents:
    if (folder / ".metadata").is_file():
        return of_content(_read_distributed(folder, trusted))
    plans = _plans_beside(folder / CALLBACK_FILE)
    for name in _WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = _read_index(index)
            tensors: dict[str, Any] = {}
            for file in dict.fromkeys(files.values()):
                tensors |= _read_weights(folder / file, trusted)
            if missing := sorted(files.keys() - tensors.keys()):
                raise CheckpointError(
                    f"{str(index)!r} lists {len(missing)} tensors that its files lack, {missing[0]!r} first: the folder is "
                    f"incomplete. Copy it again, or take another checkpoint."
                )
            return Contents({key: tensors[key] for key in files}, plans, files=files)
        if (folder / name).is_file():
            return Contents(_read_weights(folder / name, trusted), plans)
    inner = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
    hint = (
        f"It holds {', '.join(inner[-3:])}: name one of them."
        if inner
        else "Name the file, or the folder that holds it."
    )
    raise CheckpointError(f"The folder {str(folder)!r} holds no {' and no '.join(_WEIGHT_FILES[:2])}. {hint}")


def _read_index(index: Path) -> dict[str, str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): Path(str(file)).name for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(index)!r} could not be read: {type(error).__name__}: {error}. It should map each tensor to its file, "
            f"under 'weight_map'. Copy the folder again."
        ) from error


def _read_weights(path: Path, trusted: bool) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return dict(_find_state_dict(_read_pickle(path, trusted)))


def _read_pickle(path: Path, trusted: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many classes for a file that is missing, damaged or not weights
        if not isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"The checkpoint {str(path)!r} could not be read: {type(error).__name__}: {first_line(error)}."
            ) from error
        if not trusted:
            # torch's own text would advise to run the code.
            raise CheckpointError(
                f"The checkpoint {str(path)!r} could not be read: UnpicklingError: it holds more than tensors, "
                f"and code in a file is not run. If you wrote it yourself, say so: tdfx merge --trusted, or trusted=True."
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # the code in the file can raise anything
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be read: {type(error).__name__}: {first_line(error)}."
        ) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be read: the library safetensors is not installed. Install it: "
            f"pip install 'tdfx[safetensors]'"
        ) from error
    try:
        tensors: dict[str, Any] = load_file(path)
    except Exception as error:  # safetensors' own class of errors, and those of files
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be read: {type(error).__name__}: {first_line(error)}."
        ) from error
    return tensors


def _read_distributed(folder: Path, trusted: bool) -> Any:
    if not trusted:
        raise CheckpointError(
            f"{str(folder)!r} is a checkpoint of torch.distributed.checkpoint, whose .metadata is code that runs when it is "
            f"read. If you wrote it yourself, say so: tdfx merge --trusted, or trusted=True."
        )
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = Path(scratch, "whole.pt")
        try:
            dcp_to_torch_save(folder, file)
        except Exception as error:  # torch raises many classes for a folder that is damaged
            why = f"{type(error).__name__}: {first_line(error)}"
            raise CheckpointError(f"The checkpoint {str(folder)!r} could not be read: {why}.") from error
        return _read_pickle(file, trusted)


def _records(content: Any, depth: int = _DEPTH) -> Iterator[Any]:
    if isinstance(content, Mapping) and depth:
        if "rewrites" in content and "format" in content:
            yield content
        else:
            for value in content.values():
                yield from _records(value, depth - 1)


def _plans_in(content: Any, depth: int = _DEPTH) -> Iterator[Plan]:
    """Yield the plans in the states of switches, and in texts under the key ``plan``."""
    if isinstance(content, Mapping) and depth:
        for key, value in content.items():
            if key == "plan" and isinstance(value, str):
                try:
                    yield Plan.from_json(value)
                except PlanError:
                    continue  # something else under this name
            elif key == "plan" and isinstance(value, Plan):
                yield value
            else:
                yield from _plans_in(value, depth - 1)


def _plans_beside(path: Path) -> tuple[Plan, ...]:
    """Return the plans that the callback for Transformers has saved in the same folder."""
    file = path.with_name(CALLBACK_FILE)
    return tuple(_plans_in(read_sealed(file))) if file.is_file() and is_sealed(file) else ()


def _find_state_dict(content: Any) -> Any:
    """Return the innermost mapping under the keys that checkpoints use."""
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return _find_state_dict(content[key])
    return content
