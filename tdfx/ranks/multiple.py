"""The number that ranks should be a multiple of on a device, and how to round to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

AUTO = "auto"
"""Given in place of a number: the multiple is taken from the weight's dtype and device."""

_CPU_BYTES = {"AVX512": 64, "AVX2": 32}
_OTHER_BYTES = 16


def device_multiple(
    dtype: torch.dtype, device: torch.device, *, capability: str | tuple[int, int] | None = None
) -> int:
    """Return the number that a dimension should be a multiple of, for products to run at full speed.

    CUDA: 16 bytes, and 128 bytes from compute capability 8.0 on (NVIDIA, *Matrix Multiplication Background User's Guide*).
    CPU: one vector register, of 64 bytes with AVX512, 32 with AVX2, otherwise 16. Other devices: 16 bytes.

    Args:
        dtype: In which products are computed: that of the weight, or of autocast.
        device: Where the weight lies.
        capability: The CUDA compute capability, or the name of the CPU's vector instructions; None asks the device.

    >>> device_multiple(torch.float16, torch.device("cuda"), capability=(8, 0))
    64
    >>> device_multiple(torch.float32, torch.device("cpu"), capability="AVX2")
    8
    """
    size = _OTHER_BYTES
    if device.type == "cuda":
        compute = torch.cuda.get_device_capability(device) if capability is None else capability
        size = 128 if tuple(compute) >= (8, 0) else 16
    elif device.type == "cpu":
        instructions = torch.backends.cpu.get_cpu_capability() if capability is None else capability
        size = _CPU_BYTES.get(str(instructions), _OTHER_BYTES)
    return size // dtype.itemsize


def round_gently(ranks: Sequence[int], full: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Round each rank up to a multiple, but to less than twice as much, and never above its full rank.

    A rank below the multiple is rounded up to a power of two instead, which still divides a block evenly.

    >>> round_gently((5, 17, 40, 65, 30), (512, 512, 512, 512, 31), 64)
    (8, 32, 64, 128, 31)
    """
    blocks = (min(multiple, 1 << (rank - 1).bit_length()) for rank in ranks)
    rounded = (-(-rank // block) * block for rank, block in zip(ranks, blocks, strict=True))
    return tuple(min(pair) for pair in zip(rounded, full, strict=True))
