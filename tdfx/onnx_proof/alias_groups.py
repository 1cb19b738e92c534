"""The names of tensors that a model holds more than once, as metadata that is stored in its ONNX file.

An exporter takes one of the names, and not always the same one. Names of factors stand in groups of their own, beside those
of the dense tensors.
"""

from __future__ import annotations

import json
from collections import defaultdict

from onnx import ModelProto
from torch import nn

from tdfx.checkpoint.record import dense_names
from tdfx.layers.paths import parameters_by_path

METADATA_KEY = "tdfx.aliases"
"""The metadata entry of an ONNX file that lists the groups."""

Groups = tuple[tuple[str, ...], ...]
"""Names of one tensor each, the first of which is used."""


def aliases_of(module: nn.Module) -> Groups:
    """Return the names of every tensor that a model holds more than once, and those of the dense model's.

    >>> layer = nn.Linear(2, 2)
    >>> aliases_of(nn.ModuleDict({"a": layer, "b": layer}))
    (('a.weight', 'b.weight'), ('a.bias', 'b.bias'))
    """
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in (
        *parameters_by_path(module, remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        names[id(tensor)].append(name)
    tied = [group for group in names.values() if len(group) > 1]
    dense_of = dense_names(module, remove_duplicate=False)
    dense = [dict.fromkeys(dense_of.get(name, name) for name in group) for group in tied]
    return tuple(dict.fromkeys(tuple(group) for group in (*tied, *dense) if len(group) > 1))


def to_metadata(groups: Groups) -> str:
    """Return the text of the metadata entry."""
    return json.dumps(groups)


def aliases_in(model: ModelProto) -> Groups:
    """Return the groups that a file lists; none if it has no such entry, or a damaged one."""
    texts = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    try:
        return tuple(tuple(map(str, group)) for text in texts for group in json.loads(text))
    except (ValueError, TypeError):
        return ()
