"""Turns the swaps of a rewrite and the joins of a merge into exchanges of parameters, with the names of both."""

from __future__ import annotations

from tdfx.layers.factorized import Factorized
from tdfx.layers.parameter import FactorizedParameter
from tdfx.optim.carriers import ToDense, ToFactors
from tdfx.optim.surgery import Exchange
from tdfx.passes.transform.merge import Join
from tdfx.passes.transform.rewrite import Swap


def split_exchange(swap: Swap) -> Exchange:
    """Return the exchange of a weight for its factors, or of factors for factors of lower ranks."""
    layer = swap.factorized
    count = len(layer.weights)
    if isinstance(swap.layer, Factorized):  # the bias stays with the last factor, under its name
        return Exchange(
            site=swap.site,
            old=swap.old,
            new=layer.weights,
            carriers=(ToDense(swap.layer), ToFactors(layer)),
            rename=lambda name: _factor_names(f"{_dense_name(name, '')}.", count),
        )
    attribute = swap.slot.name if swap.slot is not None else layer.kind.weight
    stem = f"{attribute}." if swap.slot is not None else ""
    bias = layer.kind.bias or ""
    return Exchange(
        site=swap.site,
        old=swap.old,
        new=layer.weights,
        carriers=(ToFactors(layer),),
        rename=lambda name: _factor_names(name.removesuffix(attribute) + stem, count),
        bias=layer.bias,
        rename_bias=lambda name: f"{name.removesuffix(bias)}factors.{count - 1}.bias",
    )


def join_exchange(join: Join) -> Exchange:
    """Return the exchange of factors for the joined weight."""
    kind = join.factorized.kind
    weight = "" if isinstance(join.factorized, FactorizedParameter) else kind.weight
    return Exchange(
        site=join.name,
        old=join.factorized.weights,
        new=(join.weight,),
        carriers=(ToDense(join.factorized),),
        rename=lambda name: [_dense_name(name, weight)],
        bias=join.factorized.bias,
        rename_bias=lambda name: _dense_name(name, kind.bias or ""),
    )


def _factor_names(stem: str, count: int) -> list[str]:
    return [f"{stem}factors.{index}.weight" for index in range(count)]


def _dense_name(name: str, attribute: str) -> str:
    """Return the dense model's name for a factor's weight or bias; ``attribute`` is "" for a factorized parameter.

    >>> _dense_name("conv.factors.0.weight", "weight"), _dense_name("net.kernel.factors.0.weight", "")
    ('conv.weight', 'net.kernel')
    """
    return f"{name.rpartition('factors.')[0]}{attribute}".removesuffix(".")
