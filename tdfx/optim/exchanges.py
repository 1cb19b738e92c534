"""What a rewrite or a merge asks of the optimizers: which parameters leave, which come, and what becomes of their names."""

from __future__ import annotations

from tdfx.layers.factorized import Factorized
from tdfx.layers.parameter import FactorizedParameter
from tdfx.optim.carriers import ToDense, ToFactors, ToFewer
from tdfx.optim.surgery import Exchange
from tdfx.passes.transform.merge import Join
from tdfx.passes.transform.rewrite import Swap


def split_exchange(swap: Swap) -> Exchange:
    """Return the exchange of a weight for its factors, or of factors for smaller ones."""
    if isinstance(swap.layer, Factorized):
        return _lower_exchange(swap, swap.layer)
    new = swap.factorized
    attribute = swap.slot.name if swap.slot is not None else new.kind.weight
    stem = f"{attribute}." if swap.slot is not None else ""
    bias = new.kind.bias or ""
    return Exchange(
        site=swap.site,
        old=swap.old,
        new=new.weights,
        carrier=ToFactors(new),
        rename=lambda name: _factor_names(name.removesuffix(attribute) + stem, len(new.weights)),
        bias=new.bias,
        rename_bias=lambda name: f"{name.removesuffix(bias)}factors.{len(new.weights) - 1}.bias",
    )


def join_exchange(join: Join) -> Exchange:
    """Return the exchange of factors for the weight that they make."""
    kind = join.factorized.kind
    slot = isinstance(join.factorized, FactorizedParameter)
    return Exchange(
        site=join.name,
        old=join.factorized.weights,
        new=(join.weight,),
        carrier=ToDense(join.factorized),
        rename=lambda name: [_dense_name(name, "" if slot else kind.weight)],
        bias=join.factorized.bias,
        rename_bias=lambda name: _dense_name(name, kind.bias or ""),
    )


def _lower_exchange(swap: Swap, old: Factorized) -> Exchange:
    """The bias keeps its name: it stays with the last factor."""
    return Exchange(
        site=swap.site,
        old=swap.old,
        new=swap.factorized.weights,
        carrier=ToFewer(ToDense(old), ToFactors(swap.factorized)),
        rename=lambda name: _factor_names(f"{_dense_name(name, '')}.", len(swap.factorized.weights)),
    )


def _factor_names(stem: str, count: int) -> list[str]:
    """Return the names of the factors of a weight.

    >>> _factor_names("conv.", 2)
    ['conv.factors.0.weight', 'conv.factors.1.weight']
    """
    return [f"{stem}factors.{index}.weight" for index in range(count)]


def _dense_name(name: str, role: str) -> str:
    """Return the name of the weight or bias that a factor's belongs to.

    >>> _dense_name("conv.factors.0.weight", "weight"), _dense_name("net.kernel.factors.0.weight", "")
    ('conv.weight', 'net.kernel')
    """
    return f"{name.rpartition('factors.')[0]}{role}".removesuffix(".")
