"""Find the parameters that enter a convolution or a linear map, at torch's dispatcher, independently of tdfx."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo_inputs import ModelCall, ModelExample
from zoo_run import preserved

_OPERANDS = {
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution"), (0, 1)),
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "matmul", "linear", "deform_conv2d"), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation"), (1, 2)),
}
"""Operation -> indices of the tensors that it multiplies; a bias is not multiplied."""
_FUSED = frozenset({"_transformer_encoder_layer_fwd", "_native_multi_head_attention", "mkldnn_rnn_layer", "_trilinear"})
"""Operations with linear maps inside: every matrix among their operands counts."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A parameter, or a tensor computed from parameters alone, that data are multiplied by."""

    names: frozenset[str]
    """Every name of the parameter, or of all parameters that it was computed from."""
    computed: bool
    """True if it is not a view of one parameter."""


@dataclass(frozen=True, slots=True)
class Account:
    """The parameters that one model multiplies its data by, in train and in eval mode."""

    products: tuple[tuple[Operand, ...], ...]
    """For each product with parameters, its one or two operands that are parameters."""
    bytes: int
    """Bytes of all tensors that the forward in train mode computed: at least what a backward needs to keep."""

    @property
    def names(self) -> list[str]:
        """One name of every parameter that data are multiplied by."""
        return sorted({min(operand.names) for product in self.products for operand in product})

    def missed(self, sites: Iterable[Any]) -> list[str]:
        """Return the parameters that belong to no site of a plan.

        If both operands of a product are parameters, such as a learned query and the weight that it is multiplied by, then
        one of them is data: the product is accounted for if either belongs to a site.
        """
        listed = list(sites)
        names = {name for site in listed for name in (f"{site.name}.weight".removeprefix("."), site.name)}
        names |= {path for site in listed if (path := getattr(site, "parameter", None))}
        # The parameters of a computed weight lie below the path of its site.
        prefixes = tuple(f"{site.name}." if site.name else "" for site in listed)

        def is_listed(operand: Operand) -> bool:
            below = operand.computed and any(name.startswith(prefixes) for name in operand.names)
            return below or not names.isdisjoint(operand.names)

        missed = [product for product in self.products if not any(map(is_listed, product))]
        return sorted({min(operand.names) for product in missed for operand in product})


def account(model: nn.Module, example: ModelExample) -> Account:
    """Run the model in both modes and record what it multiplies its data by; the model is left as it was."""
    train, evaluated = (_watch(model, call, mode) for call, mode in ((example.train, True), (example.eval, False)))
    products = dict.fromkeys([*train.products, *evaluated.products])
    return Account(tuple(products), train.bytes)


def _watch(model: nn.Module, call: ModelCall, mode: bool) -> _ProductWatch:
    watch = _ProductWatch(model)
    fresh, _ = call.fresh()
    with preserved(model, mode), _plain_attention(), torch.no_grad(), watch:
        model(*fresh.arguments, **fresh.named)
    return watch


class _ProductWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows parameters through views, copies and computations among themselves, to the products that they enter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[tuple[Operand, ...]] = []
        self.bytes = 0
        self._alive: list[Tensor] = []  # a freed storage could be mistaken for a new one at the same address
        names: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(_storage(parameter), set()).add(name)
        self._operands = {key: Operand(frozenset(aliases), computed=False) for key, aliases in names.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self._record_product(func.overloadpacket.__name__, inputs)
        self._record_outputs(inputs, [value for value in tree_leaves(result) if isinstance(value, Tensor)])
        return result

    def _record_product(self, operation: str, inputs: list[Tensor]) -> None:
        if operation in _FUSED:
            matrices = [self._operands.get(_storage(tensor)) for tensor in inputs if tensor.dim() > 1]
            self.products += [(operand,) for operand in matrices if operand is not None]
            return
        # Indices count the arguments that are tensors: addmm's bias comes before its operands.
        indices = _OPERANDS.get(operation, ())
        operands = [self._operands.get(_storage(inputs[index])) for index in indices]
        if product := tuple(operand for operand in operands if operand is not None):
            self.products.append(product)

    def _record_outputs(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Record tensors computed from parameters alone, and count the bytes of new tensors."""
        input_storages = {_storage(tensor) for tensor in inputs}
        operands = [self._operands.get(key) for key in input_storages]
        for tensor in outputs:
            key = _storage(tensor)
            if key in input_storages:
                continue
            self.bytes += tensor.numel() * tensor.element_size()
            self._operands.pop(key, None)
            if operands and all(operands):
                names = frozenset[str]().union(*(operand.names for operand in operands if operand))
                self._operands[key] = Operand(names, computed=True)
                self._alive.append(tensor)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep torch from the fused kernels of nn.MultiheadAttention, which hide the products inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
