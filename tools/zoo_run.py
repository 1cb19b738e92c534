"""Running a model so that it can be compared: what it returns, its buffers and gradients, and how far they may move.

The tolerance is measured, not tuned. A split by eigenvectors is backward stable: its factors are the exact factors of a
weight W + E, where E is no larger, relative to W, than the unit of rounding times a slowly growing function of the short
side d of W; for products and eigendecompositions of matrices of random sign that function is about sqrt(d) (Higham,
*Accuracy and Stability of Numerical Algorithms*, 2nd ed., chapters 2.8 and 3). Rounding in the
forward of a linear map is, by the same book, also a change of its weight of that size. So the *original* is run again with
every weight moved by

    W + eps · sqrt(d) · rms(W) · N(0, 1)

and each thing compared may differ by at most ``SAFETY`` times what it then moved by, plus the rounding of the thing itself,
``FLOOR`` units in the last place of its norm. ``SAFETY`` covers that a draw is random and a split's error is not. A gradient
is a sum whose terms may cancel (a bias ahead of a BatchNorm has none but rounding), so its floor is relative to the largest
gradient of the model.

What moves by more than the square root of eps under such a draw (the boxes of a detector, after a top-k among equals)
cannot be compared by any tolerance: it is left out and named, and only counts as seen by its structure.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import keystr, tree_flatten_with_path
from zoo_inputs import Call

SAFETY = 8.0
"""How many times further than under a random draw a rewritten model may be; no unit."""
FLOOR = 16.0
"""Rounding of what is compared, in units of eps times its norm."""
DRAWS = 2
"""How many times the original is run with moved weights."""
_SEED = 11

Leaves = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one run of a model showed."""

    outputs: Leaves
    structure: str
    """Types and nesting of what the model returned."""
    buffers: Leaves = field(default_factory=dict)
    gradients: Leaves = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gap:
    """How far two runs are apart, at the worst place."""

    share: float = 0.0
    """Difference over what is allowed; at most 1 for runs that agree."""
    relative: float = 0.0
    """Norm of the difference over the norm of the first run's, at the place with the largest share."""
    where: str = ""
    compared: int = 0
    unstable: tuple[str, ...] = ()
    """What moves by itself under rounding, and was not compared."""

    def and_also(self, other: Gap) -> Gap:
        """Return the worse of two, with the counts of both."""
        worse = self if self.share >= other.share else other
        return Gap(
            worse.share,
            worse.relative,
            worse.where,
            self.compared + other.compared,
            (*self.unstable, *other.unstable),
        )


@contextmanager
def preserved(model: nn.Module, mode: bool) -> Iterator[None]:
    """Set train or eval mode, and put the mode of every module and the values of every buffer back afterwards."""
    modes = [(one, one.training) for one in model.modules()]
    buffers = {name: one.detach().clone() for name, one in model.named_buffers()}
    try:
        model.train(mode)
        yield
    finally:
        for one, training in modes:
            one.training = training
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


def warm_up(model: nn.Module, call: Call, steps: int = 2) -> None:
    """Give BatchNorm the statistics of real data, as an average over a few forwards in train mode.

    With those of its initialisation the signal dies or grows without bound on its way through a deep network, and two
    models that have nothing to do with one another agree in eval mode.
    """
    norms = [one for one in model.modules() if isinstance(one, _NormBase) and one.track_running_stats]
    momenta = [one.momentum for one in norms]
    modes = [(one, one.training) for one in model.modules()]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for step in range(steps if norms else 0):
        _seed(step)
        fresh, _ = call.fresh()
        with torch.no_grad():
            model(*fresh.arguments, **fresh.named)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, mode in modes:
        module.training = mode


class Widened(TorchFunctionMode):
    """Reads float32 as float64 wherever a model's code says it: RAFT makes its grid of coordinates so.

    In float32 a handful of ReLUs switch sides under rounding, which moves gradients by steps that no tolerance foresees.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation with the other dtype."""
        if func is torch.Tensor.float:
            return args[0].double()
        wide = {key: torch.float64 if one is torch.float32 else one for key, one in (kwargs or {}).items()}
        return func(*(torch.float64 if one is torch.float32 else one for one in args), **wide)


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Move parameters that are constant at initialisation, since what they hold back cannot be compared.

    With a head of zeros (ViT) a model returns zeros whatever its layers do, a layer scale of 1e-6 (ConvNeXt) hides whole
    blocks, and a bias of zeros could be lost unseen.
    """
    source = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            terms = parameter[0].numel() if parameter.dim() > 1 else 100
            noise = torch.randn(parameter.shape, generator=source, dtype=parameter.dtype)
            parameter.add_(noise, alpha=terms**-0.5)


def observe(
    model: nn.Module,
    call: Call,
    *,
    mode: bool,
    wanted: Mapping[str, nn.Parameter] | None = None,
    watched: Iterable[str] = (),
) -> Seen:
    """Run a model once, from a fixed seed, and leave it as it was.

    Args:
        model: The model.
        call: What it is called with.
        mode: True for train mode.
        wanted: Parameters whose gradients to take, with those of the inputs; None for no backward at all.
        watched: Paths of submodules whose outputs to note as well.
    """
    fresh, inputs = call.fresh()
    with preserved(model, mode), _recording(model, watched) as recorded, torch.set_grad_enabled(wanted is not None):
        _seed(_SEED)
        returned = model(*fresh.arguments, **fresh.named)
        outputs, structure = flatten(returned)
        inner, shapes = flatten(dict(recorded))
        gradients = {} if wanted is None else _gradients(outputs, inputs, wanted)
        buffers = {name: one.detach().clone() for name, one in model.named_buffers()}
        all_outputs = {**outputs, **{f"inside{name}": one for name, one in inner.items()}}
        detached = {name: one.detach() for name, one in all_outputs.items()}
    return Seen(detached, f"{structure} {shapes}", buffers, gradients)


def flatten(value: Any) -> tuple[Leaves, str]:
    """Return the tensors in a structure by their path, and the structure itself in words; dataclasses are looked into.

    >>> leaves, words = flatten({"out": torch.zeros(2), "list": [torch.ones(1), None]})
    >>> sorted(leaves)
    ["['list'][0]", "['out']"]
    """
    leaves: Leaves = {}
    kinds: list[str] = []
    pairs, spec = tree_flatten_with_path(value)
    for path, leaf in pairs:
        name = keystr(path)
        if isinstance(leaf, Tensor):
            leaves[name] = leaf
            kinds.append(str(leaf.dtype))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            inner, words = flatten({one.name: getattr(leaf, one.name) for one in fields(leaf)})
            leaves |= {f"{name}{key}": one for key, one in inner.items()}
            kinds.append(f"{type(leaf).__qualname__}({words})")
        else:
            kinds.append(type(leaf).__qualname__)
    return leaves, f"{spec} {kinds}"


def rounding_response(
    model: nn.Module,
    reference: Mapping[str, Seen],
    weights: Iterable[str],
    again: Any,
) -> dict[str, dict[str, float]]:
    """Return how far each thing of a model moves if its weights are moved by their rounding.

    Args:
        model: The model, which is left alone: a copy is moved.
        reference: Runs of the model as it is, by a name for each.
        weights: Names of the parameters to move.
        again: Called with the moved copy; makes the same runs once more.

    Returns:
        For each run, the norm of the largest difference seen of each thing; infinity where its shape or kind changed.
    """
    moved = copy.deepcopy(model)
    found: dict[str, dict[str, float]] = {name: {} for name in reference}
    chosen = set(weights)
    for draw in range(DRAWS):
        _move(model, moved, chosen, torch.Generator().manual_seed(100 + draw))
        for name, seen in again(moved).items():
            for key, distance in _distances(reference[name], seen).items():
                found[name][key] = max(found[name].get(key, 0.0), distance)
    return found


def gap_of(
    reference: Leaves,
    found: Leaves,
    response: Mapping[str, float],
    scale_of: Callable[[str, Leaves], float] | None = None,
) -> Gap:
    """Compare two sets of tensors, given how far each of the first moves under rounding.

    Args:
        reference: Of the original.
        found: Of the model that should agree with it.
        response: From ``rounding_response``.
        scale_of: What the rounding of a thing is relative to, by its name; its own norm if left out.
    """
    if reference.keys() != found.keys():
        odd = min(reference.keys() ^ found.keys())
        return Gap(math.inf, math.inf, f"{odd} is only in one of the two")
    gap = Gap()
    for name, one in reference.items():
        scale = scale_of(name, reference) if scale_of else _norm(one)
        gap = gap.and_also(_gap(name, one, found[name], response.get(name, 0.0), scale))
    return gap


def largest(name: str, leaves: Leaves) -> float:
    """Return the norm of the largest of all: the scale of gradients, whose terms may cancel to nothing."""
    return max(_norm(one) for one in leaves.values())


def spread(name: str, leaves: Leaves) -> float:
    """Return the norm of a buffer; that of a mean with the spread of what it is the mean of, since it may be zero."""
    stem, found, _ = name.rpartition("running_mean")
    variance = leaves.get(f"{stem}running_var") if found else None
    return _norm(leaves[name]) + (0.0 if variance is None else _norm(variance.sqrt()))


def _gap(name: str, one: Tensor, other: Tensor, response: float, scale: float) -> Gap:
    eps = torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
    if response > math.sqrt(eps) * scale:
        return Gap(unstable=(name,))
    distance = _distance(one, other)
    allowed = SAFETY * response + FLOOR * eps * scale
    relative = distance / _norm(one) if distance and _norm(one) else distance
    share = distance / allowed if allowed else math.inf if distance else 0.0
    if math.isnan(share):
        share = math.inf
    return Gap(share, relative, name, 1)


def _distances(reference: Seen, seen: Seen) -> dict[str, float]:
    pairs = [
        (reference.outputs, seen.outputs),
        (reference.buffers, seen.buffers),
        (reference.gradients, seen.gradients),
    ]
    return {
        key: _distance(one, found[key]) if key in found else math.inf
        for first, found in pairs
        for key, one in first.items()
    }


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, other) else math.inf
    distance = float((one - other).double().norm())
    return math.inf if math.isnan(distance) else distance


def _norm(one: Tensor) -> float:
    return float(one.double().norm())


@torch.no_grad()
def _move(model: nn.Module, moved: nn.Module, chosen: set[str], source: torch.Generator) -> None:
    """Set the copy's parameters to the model's, the chosen ones moved by their rounding."""
    for (name, weight), target in zip(model.named_parameters(), moved.parameters(), strict=True):
        target.copy_(weight)
        if name in chosen and weight.numel():
            short = min(weight.shape[0], max(1, weight[0].numel()))
            size = torch.finfo(weight.dtype).eps * math.sqrt(short) * float(weight.square().mean().sqrt())
            target.add_(torch.randn(weight.shape, generator=source, dtype=weight.dtype), alpha=size)


def _gradients(outputs: Leaves, inputs: list[Tensor], wanted: Mapping[str, nn.Parameter]) -> Leaves:
    """Return the gradients of a fixed random projection of all outputs, each scaled to the same size."""
    source = torch.Generator().manual_seed(_SEED)
    parts = []
    for one in outputs.values():
        if one.is_floating_point() and one.requires_grad:
            direction = torch.randn(one.shape, generator=source, dtype=one.dtype)
            parts.append((one * direction).sum() / one.detach().norm().clamp_min(torch.finfo(one.dtype).tiny))
    named = {**{f"(input {place})": one for place, one in enumerate(inputs)}, **wanted}
    loss = torch.stack(parts).sum()
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: one for name, one in zip(named, found, strict=True) if one is not None}


@contextmanager
def _recording(model: nn.Module, watched: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Note what submodules return, the last time that they are called."""
    recorded: dict[str, Any] = {}
    handles = [model.get_submodule(path).register_forward_hook(_recorder(recorded, path)) for path in watched]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _recorder(recorded: dict[str, Any], path: str) -> Any:
    def record(module: nn.Module, arguments: Any, output: Any) -> None:
        recorded[path] = output

    return record


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
