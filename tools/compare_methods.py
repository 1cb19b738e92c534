"""The methods of ``compare.py``: tdfx and other packages, each called as its documentation says, at the same ranks.

A method gets a model in training and its optimizer, may change both, and returns what to continue with. No code of other
packages is copied here: packages are imported where they are installed, and the paper's code from a checkout.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from study_data import Batch
from torch import Tensor, nn
from torch.optim import Optimizer

import tdfx

Continuation = tuple[nn.Module, Optimizer | None]
"""The model to continue with and its optimizer; None for a new optimizer."""
Apply = Callable[[nn.Module, Optimizer, float, Batch], Continuation]
"""Takes a model, its optimizer, the share of the full ranks, and a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to factorize a model in the middle of its training."""

    name: str
    apply: Apply
    module: str = ""
    """The module that it needs; "" for none."""
    version: str = ""
    """The version of that package that it needs; "" for any."""
    install: tuple[str, ...] = ()
    """Arguments of ``pip install``, one call each."""

    def is_installed(self) -> bool:
        """Return True if it can run in this environment."""
        if self.version:
            return metadata.version(self.module) == self.version
        return not self.module or importlib.util.find_spec(self.module) is not None


def rank_of(full: int, share: float) -> int:
    """Return a share of a full rank, at least 1.

    >>> rank_of(64, 0.25), rank_of(1, 0.25)
    (16, 1)
    """
    return max(1, round(share * full))


def layers_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | nn.Conv2d]]:
    """Yield the parent module, the name there, and the layer, of each ungrouped Conv2d and each Linear."""
    for parent in list(model.modules()):
        for name, layer in list(parent._modules.items()):
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
                yield parent, name, layer


def _tdfx(policy: Callable[[float], tdfx.Policy]) -> Apply:
    def apply(model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Continuation:
        return tdfx.rewrite(model, policy(share), example_inputs=(batch[0],), optimizer=optimizer), optimizer

    return apply


def _by_hand(model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Continuation:
    """Use TensorLy's Tucker-2 for kernels and the SVD for the rest, as tutorials do, with a new optimizer."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    for parent, name, layer in layers_of(model):
        if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1:
            ranks = [rank_of(size, share) for size in layer.weight.shape[:2]]
            with tensorly.backend_context("pytorch"):
                (core, (last, first)), _ = partial_tucker(layer.weight.data, rank=ranks, modes=[0, 1], init="svd")
            parent._modules[name] = _tucker_chain(layer, core, last, first)
        else:
            parent._modules[name] = _svd_chain(layer, share)
    return model, None


def _tucker_chain(layer: nn.Conv2d, core: Tensor, last: Tensor, first: Tensor) -> nn.Module:
    kernel = nn.Conv2d(core.shape[1], core.shape[0], 1, bias=False)
    kernel.weight.data, kernel.kernel_size = core.contiguous(), layer.kernel_size
    kernel.stride, kernel.padding, kernel.dilation = layer.stride, layer.padding, layer.dilation
    return nn.Sequential(_pointwise(first.T, None), kernel, _pointwise(last, layer.bias))


def _svd_chain(layer: nn.Linear | nn.Conv2d, share: float) -> nn.Module:
    u, s, vt = torch.linalg.svd(layer.weight.data.flatten(1), full_matrices=False)
    rank = rank_of(len(s), share)
    w_out, w_in = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vt[:rank]
    if isinstance(layer, nn.Conv2d):
        first_conv = _pointwise(w_in, None)
        first_conv.stride = layer.stride
        return nn.Sequential(first_conv, _pointwise(w_out, layer.bias))
    first, last = nn.Linear(w_in.shape[1], rank, bias=False), nn.Linear(rank, w_out.shape[0])
    first.weight.data, last.weight.data = w_in.contiguous(), w_out.contiguous()
    last.register_parameter("bias", layer.bias)
    return nn.Sequential(first, last)


def _pointwise(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
    conv.weight.data = weight[:, :, None, None].contiguous()
    conv.register_parameter("bias", cast("nn.Parameter | None", bias))
    return conv


def _greenformer(model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Continuation:
    from greenformer import auto_fact

    for parent, name, layer in layers_of(model):
        # Called with a layer it returns a layer; called with a model it skips the model's direct children.
        rank = rank_of(min(layer.weight.shape[0], layer.weight.shape[1:].numel()), share)
        parent._modules[name] = auto_fact(layer, rank=rank, solver="svd", num_iter=20)
    return model, None


def _fasterai(model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Continuation:
    from fasterai.misc.conv_decomposer import Conv_Decomposer
    from fasterai.misc.fc_decomposer import FC_Decomposer

    with_convs = Conv_Decomposer().decompose(model, percent_removed=1 - share, method="tucker")
    return FC_Decomposer().decompose(with_convs, percent_removed=1 - share), None


def _tensorly_torch(model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Continuation:
    import tltorch

    for parent, name, layer in layers_of(model):
        if isinstance(layer, nn.Conv2d):
            ranks = (*(rank_of(size, share) for size in layer.weight.shape[:2]), *layer.kernel_size)
            parent._modules[name] = tltorch.FactorizedConv.from_conv(
                layer, rank=ranks, decompose_weights=True, factorization="tucker", implementation="factorized"
            )
        else:
            # Its linear layers factorize tensors of many modes, so the rank of a matrix does not apply to them.
            parent._modules[name] = tltorch.FactorizedLinear.from_linear(
                layer, rank=share, factorization="blocktt", implementation="reconstructed", bias=layer.bias is not None
            )
    return model, None


def _composer(model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Continuation:
    import composer.functional as cf

    cf.apply_factorization(
        model, min_channels=1, latent_channels=share, min_features=1, latent_features=share, optimizers=optimizer
    )
    return model, optimizer


def _paper(checkout: Path, model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Continuation:
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    import tensorly
    from decompositions import decompose_model

    tensorly.set_backend("pytorch")
    config: dict[str, Any] = dict.fromkeys(("rank", "threshold", "mask_conv_layers"))
    config |= {"conv_ranks": _conv_ranks(model, share), "exclude_first_conv": False, "exclude_linears": False}
    with contextlib.redirect_stdout(io.StringIO()):
        return decompose_model(model, "tucker", config), None


def _conv_ranks(model: nn.Module, share: float, after_first: bool = False) -> list[int]:
    """Return ranks in the order of the paper's code: one for the first convolution of a block, two for each other."""
    ranks: list[int] = []
    for child in model._modules.values():
        if child is not None and len(list(child.children())) > 0:
            ranks += _conv_ranks(child, share, after_first)
        elif type(child) is nn.Conv2d:
            rank_out, rank_in = (rank_of(size, share) for size in child.weight.shape[:2])
            ranks += [rank_out, rank_in] if after_first else [rank_out]
            after_first = True
    return ranks


def all_methods(paper_code: Path | None) -> list[Method]:
    """Return all methods; the paper's own only with a checkout of its code."""
    every_layer = partial(tdfx.Policy, min_gain=0, round_to=1)
    methods = [
        Method(name="tdfx, same ranks", apply=_tdfx(lambda share: every_layer(rank=tdfx.Ratio(of=share)))),
        Method(name="tdfx", apply=_tdfx(lambda share: tdfx.Policy(rank=tdfx.Ratio(of=share)))),
        Method(name="TensorLy by hand", apply=_by_hand),
        Method(
            name="Greenformer",
            apply=_greenformer,
            module="greenformer",
            # Its own requirements can no longer be met: one of them is a package that refuses to be installed.
            install=("--no-deps greenformer matrix-fact", "cvxopt", "transformers<4.50"),
        ),
        Method(name="fasterai", apply=_fasterai, module="fasterai", install=("fasterai",)),
        Method(name="TensorLy-Torch", apply=_tensorly_torch, module="tltorch", install=("tensorly-torch",)),
        Method(name="Composer", apply=_composer, module="composer", install=("mosaicml",)),
    ]
    if paper_code is not None:
        methods.append(
            Method(
                name="the paper's code",
                apply=partial(_paper, paper_code.resolve()),
                module="tensorly",
                version="0.4.3",
                # Later versions have other names for its arguments.
                install=("--no-deps tensorly==0.4.3", "nose"),
            )
        )
    return methods


def apply_quietly(method: Method, *arguments: Any) -> Continuation:
    """Apply a method without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method.apply(*arguments)
