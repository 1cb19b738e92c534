"""Write a dense ``state_dict``: for torch, as safetensors, for Lightning, or as a folder for ``from_pretrained``."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdfx.checkpoint.atomic import atomic_writer
from tdfx.checkpoint.contents import CALLBACK_FILE, Contents
from tdfx.errors import CheckpointError

_TORCH = (".pt", ".pth", ".bin")
_OF_RUN = {"optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json", "training_args.bin", CALLBACK_FILE}
"""Files in a checkpoint's folder that belong to the run, and not to the model."""
_LIGHTNING_RUN = ("optimizer_states", "lr_schedulers", "callbacks", "loops", "MixedPrecision", "precision_plugin")
"""What a checkpoint of Lightning holds for a resume: it belongs to the factors, and not to the dense weights."""
_INDEX = "model.safetensors.index.json"


def check_target(target: Path, source: Path | None) -> None:
    """Raise CheckpointError, before any work is done, unless a result can be written there."""
    if source is not None and target.exists() and source.exists() and target.samefile(source):
        raise CheckpointError(f"{str(target)!r} is the checkpoint itself, which is kept. Name another file.")
    if target.suffix in {*_TORCH, ".safetensors", ".ckpt"}:
        if target.is_dir() or not target.parent.is_dir():
            raise CheckpointError(f"Cannot write {str(target)!r}. Name a file in a folder that exists.")
    elif target.suffix and not target.is_dir():
        raise CheckpointError(
            f"{str(target)!r} has none of the endings .safetensors, {', '.join(_TORCH)} and .ckpt, so how to write it "
            f"is not known. Name a file with one of them, or a folder."
        )
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{str(target)!r} exists already and is not an empty folder. Name a new folder.")


def write_dense(state: Mapping[str, Any], target: Path, contents: Contents, source: Path | None) -> None:
    """Write a ``state_dict`` in the form that the name of the target asks for; each file appears complete or not at all.

    Raises:
        CheckpointError: The checkpoint is not of the kind that has this form, or the disk refuses.
    """
    try:
        if target.suffix == ".safetensors":
            _write_safetensors(state, target)
        elif target.suffix in _TORCH:
            _write_torch(dict(state), target)
        elif target.suffix == ".ckpt":
            _write_lightning(state, target, contents)
        else:
            _write_folder(state, target, contents, source)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{str(target)!r} could not be written: {error}. Name a file in a folder that exists, with room on its disk."
        ) from error


def _write_torch(content: Any, target: Path) -> None:
    with atomic_writer(target) as file:
        torch.save(content, file)


def _write_safetensors(state: Mapping[str, Any], target: Path) -> None:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise CheckpointError(
            f"{str(target)!r} is written by the library safetensors, which is not installed. Install it: "
            f"pip install 'tdfx[safetensors]' - or name a .pt file."
        ) from error
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"safetensors holds only tensors, and {others[0]!r} is a {type(state[others[0]]).__name__}. Name a .pt file."
        )
    seen: set[int] = set()
    tensors = {}
    for name, value in state.items():
        tensor = value.detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, and loading with strict=True needs every name.
        tensors[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    with atomic_writer(target) as file:
        file.write(save(tensors, metadata={"format": "pt"}))


def _write_lightning(state: Mapping[str, Any], target: Path, contents: Contents) -> None:
    if not contents.is_lightning:
        raise CheckpointError(
            f"{str(target)!r} would be a checkpoint of Lightning, and what was read is none. Name a .pt or "
            f".safetensors file."
        )
    kept = {key: value for key, value in contents.whole.items() if key not in _LIGHTNING_RUN}
    _write_torch({**kept, "state_dict": dict(state)}, target)


def _write_folder(state: Mapping[str, Any], target: Path, contents: Contents, source: Path | None) -> None:
    if source is None or not (source / "config.json").is_file():
        raise CheckpointError(
            f"{str(target)!r} would be a folder for from_pretrained, and what was read is no folder with a config.json. "
            f"Name a .safetensors or .pt file."
        )
    target.mkdir(parents=True, exist_ok=True)
    weights = {*contents.files.values(), "model.safetensors", "pytorch_model.bin"}
    for file in source.iterdir():
        of_run = file.name in _OF_RUN or file.name.startswith("rng_state") or file.name.endswith(".index.json")
        if file.is_file() and not of_run and file.name not in weights:
            shutil.copyfile(file, target / file.name)
    if not contents.files:
        _write_safetensors(state, target / "model.safetensors")
        return
    # A dense tensor goes where its first factor was.
    shards: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in state.items():
        shards[str(Path(_file_of(name, contents.files)).with_suffix(".safetensors"))][name] = value
    for shard, tensors in shards.items():
        _write_safetensors(tensors, target / shard)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: shard for shard, tensors in shards.items() for name in tensors},
    }
    with atomic_writer(target / _INDEX) as index_file:
        index_file.write(json.dumps(index, indent=2).encode())


def _file_of(name: str, files: Mapping[str, str]) -> str:
    """Return the file that holds a tensor, or the first factor of the layer, or of the parameter, that it belongs to."""
    owner = name.rpartition(".")[0]
    names = (name, f"{owner}.factors.0.weight", f"{name}.factors.0.weight", "factors.0.weight")
    return next((files[each] for each in names if each in files), next(iter(files.values())))
