"""Which parameters enter a convolution or a linear map, seen from below: at torch's dispatcher, without tdfx."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo_inputs import Call, Example
from zoo_run import preserved

_OPERANDS = {
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution"), (0, 1)),
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "matmul", "linear", "deform_conv2d"), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation"), (1, 2)),
}
"""Operation -> which of its tensors are multiplied; a bias is not."""
_FUSED = frozenset({"_transformer_encoder_layer_fwd", "_native_multi_head_attention", "mkldnn_rnn_layer", "_trilinear"})
"""Operations with linear maps inside: every matrix among their operands counts."""


class Listed(Protocol):
    """What is read of a plan's site."""

    @property
    def name(self) -> str:
        """Path of the layer or of the parameter."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A parameter, or what was computed from parameters alone, that data were multiplied by."""

    names: frozenset[str]
    """Every name that the parameter has, or those of all parameters that it was computed from."""
    computed: bool
    """True if it is not a view of one parameter."""


@dataclass(frozen=True, slots=True)
class Account:
    """What one model multiplied its data by, in train and in eval mode."""

    products: tuple[tuple[Operand, ...], ...]
    """For each product that has any, its one or two operands that are parameters."""
    bytes: int
    """Bytes of everything that the forward in train mode computed: at least what a backward needs to keep."""

    @property
    def names(self) -> list[str]:
        """One name of every parameter that data were multiplied by."""
        return sorted({min(one.names) for product in self.products for one in product})

    def missed(self, sites: Iterable[Listed]) -> list[str]:
        """Return the parameters that belong to no site.

        Where both sides of a product are parameters, as a learned query and the weight that it is multiplied by, one of the
        two is data: the product is accounted for if either is.
        """
        known = _known(sites)
        short = {min(one.names) for product in self.products if not _any(product, known) for one in product}
        return sorted(short)


def account(model: nn.Module, example: Example) -> Account:
    """Run the model in both modes and note what it multiplies its data by; the model is left as it was."""
    train, evaluated = (_watch(model, call, mode) for call, mode in ((example.train, True), (example.eval, False)))
    products = dict.fromkeys([*train.products, *evaluated.products])
    return Account(tuple(products), train.bytes)


def _watch(model: nn.Module, call: Call, mode: bool) -> _Watch:
    watch = _Watch(model)
    fresh, _ = call.fresh()
    with preserved(model, mode), _plain_attention(), torch.no_grad(), watch:
        model(*fresh.arguments, **fresh.named)
    return watch


def _known(sites: Iterable[Listed]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the parameters that the sites name, and the paths under which a computed weight's parameters lie."""
    listed = list(sites)
    named = {name for site in listed for name in (f"{site.name}.weight".removeprefix("."), site.name)}
    named |= {path for site in listed if (path := getattr(site, "parameter", None))}
    return frozenset(named), tuple(f"{site.name}." if site.name else "" for site in listed)


def _any(product: tuple[Operand, ...], known: tuple[frozenset[str], tuple[str, ...]]) -> bool:
    named, paths = known
    return any(
        one.names & named or (one.computed and any(name.startswith(paths) for name in one.names)) for one in product
    )


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows parameters through views, copies and computations among themselves, to the products that they enter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[tuple[Operand, ...]] = []
        self.bytes = 0
        self._alive: list[Tensor] = []  # a storage that is freed would be taken for the next one at its address
        self._origins: dict[int, Operand] = {}
        names: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(_storage(parameter), set()).add(name)
        self._origins = {key: Operand(frozenset(found), False) for key, found in names.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what it did."""
        result = func(*args, **(kwargs or {}))
        entered = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        self._note(func.overloadpacket.__name__, entered)
        self._follow(entered, [one for one in tree_leaves(result) if isinstance(one, Tensor)])
        return result

    def _note(self, operation: str, entered: list[Tensor]) -> None:
        if operation in _FUSED:
            for one in entered:
                if one.dim() > 1 and (origin := self._origins.get(_storage(one))):
                    self.products.append((origin,))
            return
        # Operands are counted among the arguments that are tensors: addmm's bias comes before them.
        places = _OPERANDS.get(operation, ())
        origins = [self._origins.get(_storage(entered[place])) for place in places]
        if found := tuple(one for one in origins if one is not None):
            self.products.append(found)

    def _follow(self, entered: list[Tensor], left: list[Tensor]) -> None:
        """Note what was computed from parameters alone, and count the bytes of what is new."""
        before = {_storage(one) for one in entered}
        origins = [self._origins.get(key) for key in before]
        for one in left:
            key = _storage(one)
            if key in before:
                continue
            self.bytes += one.numel() * one.element_size()
            self._origins.pop(key, None)
            if origins and all(origins):
                names = frozenset[str]().union(*(origin.names for origin in origins if origin))
                self._origins[key] = Operand(names, True)
                self._alive.append(one)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep torch off the fused kernels of nn.MultiheadAttention, which hide the products inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
