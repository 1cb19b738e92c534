"""What ``compare.py`` compares: tdfx and what others offer, each called as its own pages say, at the same ranks.

A method gets a model in training and its optimizer, both its own to change, and gives back what to go on with. None of the
others' code is here: packages are imported where they are installed, and the paper's code from a checkout.
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
from study_tasks import Batch
from torch import Tensor, nn
from torch.optim import Optimizer

import tdfx

Made = tuple[nn.Module, Optimizer | None]
"""A model to go on with and its optimizer; None for a new one."""
Apply = Callable[[nn.Module, Optimizer, float, Batch], Made]
"""From a model, its optimizer, the share of the full ranks, and a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to factorize a model in the middle of its training."""

    name: str
    apply: Apply
    ranks: str = "the share, all layers"
    """Which ranks it takes on which layers."""
    module: str = ""
    """What must be importable; nothing for what is here."""
    version: str = ""
    """Of the package of that name, where it must be one."""
    install: tuple[str, ...] = ()
    """What pip is given, one call each."""

    def is_here(self) -> bool:
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
    """Yield the owner, the name there, and the layer, of each ungrouped Conv2d and each Linear."""
    for owner in list(model.modules()):
        for name, one in list(owner._modules.items()):
            if isinstance(one, nn.Linear) or (isinstance(one, nn.Conv2d) and one.groups == 1):
                yield owner, name, one


def _tdfx(policy: Callable[[float], tdfx.Policy]) -> Apply:
    def apply(model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Made:
        return tdfx.rewrite(model, policy(share), example_inputs=(batch[0],), optimizer=optimizer), optimizer

    return apply


def _by_hand(model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Made:
    """Tucker-2 by TensorLy for kernels and the SVD for the rest, as tutorials do: layers are replaced, the optimizer new."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    for owner, name, one in layers_of(model):
        if isinstance(one, nn.Conv2d) and max(one.kernel_size) > 1:
            ranks = [rank_of(size, share) for size in one.weight.shape[:2]]
            with tensorly.backend_context("pytorch"):
                (core, (last, first)), _ = partial_tucker(one.weight.data, rank=ranks, modes=[0, 1], init="svd")
            owner._modules[name] = _tucker_chain(one, core, last, first)
        else:
            owner._modules[name] = _svd_chain(one, share)
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
        enter = _pointwise(w_in, None)
        enter.stride = layer.stride
        return nn.Sequential(enter, _pointwise(w_out, layer.bias))
    enter_linear, leave = nn.Linear(w_in.shape[1], rank, bias=False), nn.Linear(rank, w_out.shape[0])
    enter_linear.weight.data, leave.weight.data = w_in.contiguous(), w_out.contiguous()
    leave.register_parameter("bias", layer.bias)
    return nn.Sequential(enter_linear, leave)


def _pointwise(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    made = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
    made.weight.data = weight[:, :, None, None].contiguous()
    made.register_parameter("bias", cast("nn.Parameter | None", bias))
    return made


def _greenformer(model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Made:
    from greenformer import auto_fact

    for owner, name, one in layers_of(model):
        # Called with a layer it returns one; called with a model it leaves the layers right under it alone.
        rank = rank_of(min(one.weight.shape[0], one.weight.shape[1:].numel()), share)
        owner._modules[name] = auto_fact(one, rank=rank, solver="svd", num_iter=20)
    return model, None


def _fasterai(model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Made:
    from fasterai.misc.conv_decomposer import Conv_Decomposer
    from fasterai.misc.fc_decomposer import FC_Decomposer

    made = Conv_Decomposer().decompose(model, percent_removed=1 - share, method="tucker")
    return FC_Decomposer().decompose(made, percent_removed=1 - share), None


def _tensorly_torch(model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Made:
    import tltorch

    for owner, name, one in layers_of(model):
        if isinstance(one, nn.Conv2d):
            ranks = (*(rank_of(size, share) for size in one.weight.shape[:2]), *one.kernel_size)
            owner._modules[name] = tltorch.FactorizedConv.from_conv(
                one, rank=ranks, decompose_weights=True, factorization="tucker", implementation="factorized"
            )
        else:
            # Its linear layers have tensors of many modes, for which ranks of a matrix say nothing.
            owner._modules[name] = tltorch.FactorizedLinear.from_linear(
                one, rank=share, factorization="blocktt", implementation="reconstructed", bias=one.bias is not None
            )
    return model, None


def _composer(model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Made:
    import composer.functional as cf

    cf.apply_factorization(
        model, min_channels=1, latent_channels=share, min_features=1, latent_features=share, optimizers=optimizer
    )
    return model, optimizer


def _paper(checkout: Path, model: nn.Module, optimizer: Optimizer, share: float, batch: Batch) -> Made:
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    import tensorly
    from decompositions import decompose_model

    tensorly.set_backend("pytorch")
    config = {
        "rank": None,
        "threshold": None,
        "conv_ranks": _conv_ranks(model, share),
        "mask_conv_layers": None,
        "exclude_first_conv": False,
        "exclude_linears": False,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        return decompose_model(model, "tucker", config), None


def _conv_ranks(model: nn.Module, share: float, seen: bool = False) -> list[int]:
    """Return ranks in the order in which the paper's code takes them: one for the first convolution of a block, two else."""
    found: list[int] = []
    for one in model._modules.values():
        if one is not None and len(list(one.children())) > 0:
            found += _conv_ranks(one, share, seen)
        elif type(one) is nn.Conv2d:
            out, into = (rank_of(size, share) for size in one.weight.shape[:2])
            found += [out, into] if seen else [out]
            seen = True
    return found


def methods(paper_code: Path | None) -> list[Method]:
    """Return all methods; the paper's own only with a checkout of its code."""
    same = partial(tdfx.Policy, min_gain=0, round_to=1)
    found = [
        Method(name="tdfx, same ranks", apply=_tdfx(lambda share: same(rank=tdfx.Ratio(of=share)))),
        Method(
            name="tdfx",
            apply=_tdfx(lambda share: tdfx.Policy(rank=tdfx.Ratio(of=share))),
            ranks="the share, rounded, where it pays",
        ),
        Method(name="TensorLy by hand", apply=_by_hand),
        Method(
            name="Greenformer",
            apply=_greenformer,
            module="greenformer",
            # Its own requirements cannot be met any more: one of them is a package that refuses to be installed.
            install=("--no-deps greenformer matrix-fact", "cvxopt", "transformers<4.50"),
        ),
        Method(name="fasterai", apply=_fasterai, module="fasterai", install=("fasterai",)),
        Method(
            name="TensorLy-Torch",
            apply=_tensorly_torch,
            ranks="convolutions: the share; linear: of the parameters",
            module="tltorch",
            install=("tensorly-torch",),
        ),
        Method(name="Composer", apply=_composer, module="composer", install=("mosaicml",)),
    ]
    if paper_code is not None:
        found.append(
            Method(
                name="the paper's code",
                apply=partial(_paper, paper_code.resolve()),
                ranks="convolutions: the share; linear: VBMF",
                module="tensorly",
                version="0.4.3",
                # Later ones call its arguments by other names.
                install=("--no-deps tensorly==0.4.3", "nose"),
            )
        )
    return found


def quietly(apply: Apply, *arguments: Any) -> Made:
    """Call a method without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return apply(*arguments)
