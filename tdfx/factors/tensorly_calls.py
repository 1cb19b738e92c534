"""All calls of TensorLy: its interface has changed often, and its choice of backend is global."""

from __future__ import annotations

import torch
from torch import Tensor


def iterate_tucker(w_oik: Tensor, left: Tensor, right: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return better orthonormal bases (o, p) and (i, q) of a weight's first two modes, by higher-order orthogonal iteration.

    Each iteration computes each basis again from the other, starting from the given ones; the error never grows.
    """
    taps = w_oik[0, 0].numel()
    ranks = left.shape[1], right.shape[1]
    if max(ranks) > min(ranks) * taps:  # TensorLy would fill the larger basis at random
        return left, right
    # Imported here because it takes longer than all of tdfx, and is rarely needed.
    import tensorly
    from tensorly.decomposition import partial_tucker

    core = torch.tensordot(torch.tensordot(w_oik, left, ([0], [0])), right, ([0], [0])).movedim((-2, -1), (0, 1))
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (_, bases), _ = partial_tucker(
            w_oik,
            rank=[*ranks],
            modes=[0, 1],
            init=(core, [left, right]),  # a new list, because the iteration writes to it
            n_iter_max=iterations,
            tol=0,
            random_state=0,  # never NumPy's global stream
        )
    return bases[0], bases[1]
