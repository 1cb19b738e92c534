"""The factorized sites of a model, as metadata that is stored in its ONNX file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from onnx import ModelProto
from torch import nn

from tdfx.checks import read_record
from tdfx.errors import ExportError
from tdfx.factors.operation import Operation
from tdfx.kinds.layouts import Layout
from tdfx.layers.factorized import Factorized, weight_of
from tdfx.layers.parameter import FactorizedParameter

METADATA_KEY = "tdfx.chains"
"""The metadata entry of an ONNX file that lists its chains of factors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """One factorized site: the names of its tensors in the file, and of the dense tensors that they replace."""

    site: str
    """Path of the site in the model."""
    scheme: str
    ranks: tuple[int, ...]
    factors: tuple[str, ...]
    """Names of the factors' weights, from the first that the data meets to the last."""
    weight: str
    """Name of the dense weight in the original model."""
    shape: tuple[int, ...]
    """Shape of the dense weight."""
    factor_bias: str | None
    """Name of the bias in the factorized model; None if the site has no bias of its own."""
    bias: str | None
    """Name of the bias in the original model."""
    pads: bool
    """True if the layer pads by a separate operation before its convolution."""
    oriented: bool
    """True if the dense weight is laid out as the factors' weights are."""
    exact: bool
    """True at full rank, where the chain can represent any weight."""
    first_pads: bool | None = None
    """True if the first factor pads by a separate operation; None, from earlier versions, if ``pads`` says so."""
    roles: str | None = None
    """The roles of the axes of a parameter that is multiplied, as in ``tdfx.kinds.layouts``; None for other sites."""

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError(f"the chain {self} has no factors")

    def __str__(self) -> str:
        return f"{self.site or 'the model itself'} ({self.scheme} {', '.join(map(str, self.ranks))})"


def chains_of(module: nn.Module) -> tuple[Chain, ...]:
    """Return the chains of a model's factorized sites, in the order of its modules; none for other models."""
    return tuple(_chain(path, layer) for path, layer in module.named_modules() if isinstance(layer, Factorized))


def _chain(path: str, layer: Factorized) -> Chain:
    prefix = f"{path}." if path else ""
    last = len(layer.factors) - 1
    is_parameter = isinstance(layer, FactorizedParameter)  # it stands under the parameter's own name
    kind, operation = layer.kind, layer.operation
    has_bias = layer.bias is not None and kind.bias is not None
    full_ranks = layer.scheme.full_ranks(operation)
    return Chain(
        site=path,
        scheme=layer.origin.scheme,
        ranks=layer.origin.ranks,
        factors=tuple(f"{prefix}factors.{index}.weight" for index in range(last + 1)),
        weight=path if is_parameter else f"{prefix}{kind.weight}",
        shape=tuple(weight_of(layer.origin.layer).shape),
        factor_bias=f"{prefix}factors.{last}.bias" if has_bias else None,
        bias=f"{prefix}{kind.bias}" if has_bias else None,
        pads=_pads_separately(operation),
        first_pads=_pads_separately(layer.scheme.chain(operation, layer.origin.ranks)[0]),
        oriented=is_parameter or operation.dims > 0 or isinstance(layer.origin.layer, nn.Linear),
        roles=kind.roles if isinstance(kind, Layout) else None,
        exact=all(rank >= full for rank, full in zip(layer.origin.ranks, full_ranks, strict=True)),
    )


def _pads_separately(operation: Operation) -> bool:
    """Return True if torch pads the input by an operation of its own: other values than zeros, or unequal sides."""
    if operation.padding_mode != "zeros":
        return True
    reaches = (dilation * (taps - 1) for dilation, taps in zip(operation.dilation, operation.kernel, strict=True))
    return operation.padding == "same" and any(reach % 2 for reach in reaches)


def to_metadata(chains: tuple[Chain, ...]) -> str:
    """Return the text of the metadata entry."""
    return json.dumps([asdict(chain) for chain in chains])


def chains_in(model: ModelProto) -> tuple[Chain, ...]:
    """Return the chains that a file lists; none if it has no such entry.

    Raises:
        ExportError: The entry is damaged.
    """
    texts = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    try:
        return tuple(read_record(Chain, record) for text in texts for record in json.loads(text))
    except (ValueError, TypeError) as error:
        raise ExportError(
            f"The ONNX file's metadata {METADATA_KEY!r} is damaged: {type(error).__name__}: {error}. Export the model "
            f"again with tdfx.export, or delete that entry to have the file treated like any other."
        ) from error
