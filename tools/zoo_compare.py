"""Compare runs of two models, with a tolerance that is measured.

A split by eigenvectors is backward stable: its factors are the exact factors of a weight W + E, where E, relative to W,
is at most the unit of rounding times a slowly growing function of the short side d of W; for products and
eigendecompositions of matrices of random sign that function is about sqrt(d) (Higham, *Accuracy and Stability of
Numerical Algorithms*, 2nd ed., chapters 2.8 and 3). By the same book, rounding in the forward of a linear map is also a
change of its weight of that size. So the *original* is run again with every weight changed to

    W + eps · sqrt(d) · rms(W) · N(0, 1)

and each tensor compared may differ by at most ``SAFETY`` times the change that this caused, plus its own rounding,
``FLOOR`` units in the last place of its norm. ``SAFETY`` is there because a draw is random and a split's error is not.
The terms of a gradient may cancel (a bias before a BatchNorm has no gradient but rounding), so its floor is relative to
the largest gradient of the model.

Tensors that change by more than the square root of eps under such a draw (such as the boxes of a detector, after a top-k
among equals) cannot be compared with any tolerance: they are left out and named, and only their structure is compared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from zoo_run import Observation, Tensors

SAFETY = 8.0
"""How many times further than under a random draw a rewritten model may be from the original; no unit."""
FLOOR = 16.0
"""Rounding of the compared tensor, in units of eps times its norm."""
DRAWS = 2
"""How many times the original is run with changed weights."""


@dataclass(frozen=True, slots=True)
class Gap:
    """The difference of two runs, at the worst tensor."""

    share: float = 0.0
    """Difference divided by what is allowed; at most 1 for runs that agree."""
    relative: float = 0.0
    """Norm of the difference divided by the norm of the first run's, at the tensor with the largest share."""
    where: str = ""
    compared: int = 0
    unstable: tuple[str, ...] = ()
    """Tensors that change under rounding alone, and were not compared."""

    def combine(self, other: Gap) -> Gap:
        """Return the worse of two, with the counts of both."""
        worse = self if self.share >= other.share else other
        compared, unstable = self.compared + other.compared, (*self.unstable, *other.unstable)
        return Gap(worse.share, worse.relative, worse.where, compared, unstable)


def rounding_response(
    model: nn.Module,
    reference: Mapping[str, Observation],
    weights: Iterable[str],
    observe_copy: Callable[[nn.Module], Mapping[str, Observation]],
) -> dict[str, dict[str, float]]:
    """Return how far each tensor of a model changes if its weights are changed by their rounding.

    ``reference`` holds runs of the model by name, and ``observe_copy`` repeats them on a copy whose ``weights`` were
    changed. The result is for each run the norm of the largest change of each tensor; infinity if its shape changed.
    """
    model_copy = copy.deepcopy(model)
    response: dict[str, dict[str, float]] = {name: {} for name in reference}
    chosen = set(weights)
    for draw in range(DRAWS):
        _perturb(model, model_copy, chosen, torch.Generator().manual_seed(100 + draw))
        for name, observation in observe_copy(model_copy).items():
            for key, distance in _distances(reference[name], observation).items():
                response[name][key] = max(response[name].get(key, 0.0), distance)
    return response


def gap_of(
    reference: Tensors,
    tensors: Tensors,
    response: Mapping[str, float],
    scale_of: Callable[[str, Tensors], float] | None = None,
) -> Gap:
    """Compare tensors with those of the original, given how far each of them changes under rounding.

    ``scale_of`` returns what the rounding of a tensor is relative to, by its name; its own norm if left out.
    """
    if reference.keys() != tensors.keys():
        name = min(reference.keys() ^ tensors.keys())
        return Gap(math.inf, math.inf, f"{name} is only in one of the two")
    gap = Gap()
    for name, expected in reference.items():
        scale = scale_of(name, reference) if scale_of else _norm(expected)
        gap = gap.combine(_gap(name, expected, tensors[name], response.get(name, 0.0), scale))
    return gap


def largest_norm(name: str, tensors: Tensors) -> float:
    """Return the norm of the largest of all: the scale of gradients, whose terms may cancel."""
    return max(_norm(tensor) for tensor in tensors.values())


def norm_and_deviation(name: str, tensors: Tensors) -> float:
    """Return the norm of a buffer, plus the standard deviations for a running mean, because the mean may be zero."""
    stem, is_mean, _ = name.rpartition("running_mean")
    variance = tensors.get(f"{stem}running_var") if is_mean else None
    return _norm(tensors[name]) + (0.0 if variance is None else _norm(variance.sqrt()))


def _gap(name: str, expected: Tensor, tensor: Tensor, response: float, scale: float) -> Gap:
    eps = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
    if response > math.sqrt(eps) * scale:
        return Gap(unstable=(name,))
    distance = _distance(expected, tensor)
    allowed = SAFETY * response + FLOOR * eps * scale
    relative = distance / _norm(expected) if distance and _norm(expected) else distance
    share = distance / allowed if allowed else math.inf if distance else 0.0
    if math.isnan(share):
        share = math.inf
    return Gap(share, relative, name, 1)


def _distances(reference: Observation, observation: Observation) -> dict[str, float]:
    tensors = {**observation.outputs, **observation.buffers, **observation.gradients}
    references = {**reference.outputs, **reference.buffers, **reference.gradients}
    return {name: _distance(expected, tensors.get(name)) for name, expected in references.items()}


def _distance(expected: Tensor, tensor: Tensor | None) -> float:
    if tensor is None or expected.shape != tensor.shape or expected.dtype != tensor.dtype:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, tensor) else math.inf
    distance = float((expected - tensor).double().norm())
    return math.inf if math.isnan(distance) else distance


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


@torch.no_grad()
def _perturb(model: nn.Module, model_copy: nn.Module, chosen: set[str], generator: torch.Generator) -> None:
    """Set the copy's parameters to the model's, the chosen ones changed by their rounding."""
    for (name, weight), target in zip(model.named_parameters(), model_copy.parameters(), strict=True):
        target.copy_(weight)
        if name in chosen and weight.numel():
            short = min(weight.shape[0], max(1, weight[0].numel()))
            size = torch.finfo(weight.dtype).eps * math.sqrt(short) * float(weight.square().mean().sqrt())
            target.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype), alpha=size)
