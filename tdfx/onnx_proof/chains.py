"""What a rewrite has recorded of each factorized site, as metadata that travels with the ONNX file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from onnx import ModelProto
from torch import nn

from tdfx.errors import ExportError
from tdfx.layers.factorized import Factorized, weight_of
from tdfx.layers.parameter import FactorizedParameter

METADATA_KEY = "tdfx.chains"
"""Under which an ONNX file says which of its nodes are chains of factors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """One factorized site: the names of its tensors in the file, and what they stand for."""

    site: str
    """Path of the site in the model."""
    scheme: str
    ranks: tuple[int, ...]
    factors: tuple[str, ...]
    """Names of the factors' weights, in the order of the data."""
    weight: str
    """Name of the dense weight in the original."""
    shape: tuple[int, ...]
    """Shape of the dense weight."""
    factor_bias: str | None
    """Name of the bias in the factorized model; None if the site has none of its own."""
    bias: str | None
    """Name of the bias in the original."""
    pads: bool
    """True if the layer pads by an operation of its own, before its convolution."""
    oriented: bool
    """True if the dense weight is laid out as the factors' weights are."""
    exact: bool
    """True at full rank, where the chain can stand for any weight."""

    def __str__(self) -> str:
        return f"{self.site or 'the model itself'} ({self.scheme} {', '.join(map(str, self.ranks))})"


def chains_of(module: nn.Module) -> tuple[Chain, ...]:
    """Return what ``rewrite`` recorded in a model, in the order of its modules; nothing for other models."""
    found = ((path, one) for path, one in module.named_modules() if isinstance(one, Factorized))
    return tuple(_chain(path, one) for path, one in found)


def _chain(path: str, layer: Factorized) -> Chain:
    head = f"{path}." if path else ""
    last = len(layer.factors) - 1
    whole = isinstance(layer, FactorizedParameter)  # a parameter that a function is given, under its own name
    kind, operation = layer.kind, layer.operation
    has_bias = layer.bias is not None and kind.bias is not None
    return Chain(
        site=path,
        scheme=layer.origin.scheme,
        ranks=layer.origin.ranks,
        factors=tuple(f"{head}factors.{index}.weight" for index in range(last + 1)),
        weight=path if whole else f"{head}{kind.weight}",
        shape=tuple(weight_of(layer.origin.layer).shape),
        factor_bias=f"{head}factors.{last}.bias" if has_bias else None,
        bias=f"{head}{kind.bias}" if has_bias else None,
        pads=operation.padding_mode != "zeros" or isinstance(operation.padding, str),
        oriented=whole or operation.dims > 0 or isinstance(layer.origin.layer, nn.Linear),
        exact=all(
            rank >= full for rank, full in zip(layer.origin.ranks, layer.scheme.full_ranks(operation), strict=True)
        ),
    )


def to_metadata(chains: tuple[Chain, ...]) -> str:
    """Return the text for a file's metadata."""
    return json.dumps([asdict(one) for one in chains])


def chains_in(model: ModelProto) -> tuple[Chain, ...]:
    """Return the chains that a file tells of; none if it says nothing.

    Raises:
        ExportError: if what it says is damaged.

    """
    texts = [one.value for one in model.metadata_props if one.key == METADATA_KEY]
    try:
        return tuple(_parse(one) for text in texts for one in json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(
            f"The ONNX file's metadata {METADATA_KEY!r} is damaged: {type(error).__name__}: {error}. Export the model "
            f"again with tdfx.export, or delete that entry to have the file taken as any other."
        ) from error


_LISTS = {"ranks": int, "factors": str, "shape": int}
_SCALARS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("site", "scheme", "weight"), (str,)),
    **dict.fromkeys(("factor_bias", "bias"), (str, type(None))),
    **dict.fromkeys(("pads", "oriented", "exact"), (bool,)),
}


def _parse(record: Mapping[str, Any]) -> Chain:
    """Check one record as strictly as a file from anywhere must be."""
    if {*record} != {*_LISTS, *_SCALARS}:
        raise ValueError(f"a record has the entries {sorted(record)}, not {sorted({*_LISTS, *_SCALARS})}")
    lists = {name: tuple(record[name]) for name in _LISTS}
    wrong = [name for name, kind in _LISTS.items() if not all(type(one) is kind for one in lists[name])]
    wrong += [name for name, kinds in _SCALARS.items() if not isinstance(record[name], kinds)]
    if wrong or not lists["factors"]:
        raise ValueError(f"{(wrong or ['factors'])[0]} is {record[(wrong or ['factors'])[0]]!r}")
    return Chain(**{**record, **lists})
