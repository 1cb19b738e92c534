"""What this machine is, and the numbers by which times on it are modelled: each measured once."""

from __future__ import annotations

import contextlib
import functools
import platform
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from tdfx.cost.setting import computing_in
from tdfx.cost.store import Store, cache_folder
from tdfx.cost.timing import take_turns

_VERSION = 2
"""To be raised when what is timed changes, so that times of before are not taken for times of now."""
_SIDE = {"cpu": 768, "cuda": 4096}
_STREAM = {"cpu": 2**24, "cuda": 2**25}
"""Values in each tensor: more than the caches hold, and little beside what training takes."""


@functools.cache
def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def describe_machine(device: str) -> str:
    """Return all that decides how long a computation of given shapes takes here, as one line of text.

    Args:
        device: As torch writes it; of a GPU the model counts, not the number.
    """
    kind = torch.device(device).type
    where = processor()
    if kind == "cuda":
        where = f"{torch.cuda.get_device_name(device)} cudnn {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    switches = (
        torch.get_num_threads(),
        torch.backends.mkldnn.enabled,
        *_precisions(),
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )
    version = f"{torch.__version__} cuda {torch.version.cuda}"
    return " | ".join(map(str, (_VERSION, kind, where, torch.backends.cpu.get_cpu_capability(), *switches, version)))


def _precisions() -> list[str]:
    """Return in which precision products of float32 are computed, by whichever of torch's two ways that was said."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn)
    inner = [getattr(one, name, None) for one in backends for name in ("matmul", "conv")]
    found = [str(getattr(one, "fp32_precision", "")) for one in (*backends, *inner)]
    # Where one of the ways was used, the other may refuse to be read.
    with contextlib.suppress(RuntimeError):
        found.append(torch.get_float32_matmul_precision())
    with contextlib.suppress(RuntimeError):
        found.append(str(torch.backends.cudnn.allow_tf32))
    return found


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a machine computes."""

    flops_per_second: float
    """Floating-point operations per second in a large matrix product."""
    bytes_per_second: float
    """Bytes per second read and written, in a sum of tensors larger than the caches."""
    seconds_per_call: float
    """What an operation takes that computes next to nothing, forward and backward, divided by three."""


def rates(device: str = "cpu", dtype: torch.dtype = torch.float32, *, cache: bool = True) -> Rates:
    """Return the rates of this machine, measured in about a second.

    Args:
        device: As torch writes it.
        dtype: Of the products.
        cache: Whether what was measured by an earlier process is read from disk, and what is measured now written.
    """
    prefix = f"{describe_machine(device)} rates {dtype}"
    if prefix not in _known:
        store, keys = Store(cache_folder()), [f"{prefix} {one.name}" for one in fields(Rates)]
        found = store.get(keys) if cache else {}
        if len(found) < len(keys):
            found = dict(zip(keys, _measure(device, dtype), strict=True))
            if cache:
                store.put(found)
        _known[prefix] = Rates(*(found[key] for key in keys))
    return _known[prefix]


_known: dict[str, Rates] = {}


@torch.no_grad()
def _measure(device: str, dtype: torch.dtype) -> tuple[float, float, float]:
    kind = torch.device(device).type
    side, values = _SIDE.get(kind, _SIDE["cuda"]), _STREAM.get(kind, _STREAM["cuda"])
    square = torch.ones(side, side, device=device, dtype=dtype)
    long, other = (torch.ones(values, device=device, dtype=dtype) for _ in range(2))
    tiny = torch.ones(8, 8, device=device, dtype=dtype, requires_grad=True)

    def step() -> None:
        with torch.enable_grad(), computing_in(None, kind):
            out = tiny @ tiny
        torch.autograd.grad(out, tiny, out.detach())

    product, stream, call = take_turns(
        [lambda: square @ square, lambda: torch.add(long, other, out=long), step], device=device, rounds=3
    )
    return 2 * side**3 / product.seconds, 3 * values * dtype.itemsize / stream.seconds, call.seconds / 3
