"""What differs between kinds of devices: waiting, precision, random numbers, names."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tdfx.errors import TdfxError

AnyDevice = torch.device | str
_WITHOUT_GENERATOR = frozenset({"cpu", "meta"})
"""Kinds whose random numbers are those of the CPU's generator, or none."""


def synchronize(device: AnyDevice) -> None:
    """Wait until a device has finished all its work."""
    device = torch.device(device)
    if device.type in {"cpu", "meta"}:
        return
    module = torch.get_device_module(device.type)
    if device.type == "mps":  # there is one such device, and its function takes no argument
        module.synchronize()
    else:
        module.synchronize(device)


def current(device: AnyDevice) -> AbstractContextManager[object]:
    """Return a context in which a device is the current one of its kind, on which work without a device is done."""
    device = torch.device(device)
    if device.type in {"cpu", "meta", "mps"} or device.index is None:
        return nullcontext()
    context: AbstractContextManager[object] = torch.get_device_module(device.type).device(device)
    return context


def short_name(device: torch.device) -> str:
    """Return the kind of a device, with its index unless it is the current one: "cuda", or "cuda:1".

    >>> short_name(torch.device("cpu", 0)), short_name(torch.device("mps", 0))
    ('cpu', 'mps')
    """
    if device.type in {"cpu", "meta", "mps"} or device.index is None:
        return device.type
    module = torch.get_device_module(device.type)
    return device.type if module.current_device() == device.index else f"{device.type}:{device.index}"


def has_float64(device: AnyDevice) -> bool:
    """Return whether a device computes in float64: Apple's do not, nor do some of Intel's."""
    device = torch.device(device)
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, on the CPU if its own device has no float64."""
    if has_float64(tensor.device):
        return tensor.to(torch.float64)
    return tensor.to("cpu").to(torch.float64)  # in two steps: the device could not convert it


@contextmanager
def random_streams_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Restore the random generator of the CPU and those of some devices, of whatever kind, afterwards.

    The devices of the kind of accelerator that this process uses are added: ``torch.manual_seed`` sets them all.
    """
    streams = {device for device in devices if device.type not in _WITHOUT_GENERATOR} | set(_devices_in_use())
    modules: list[tuple[Any, torch.device]] = [(torch.get_device_module(each.type), each) for each in streams]
    state = torch.get_rng_state()
    states = [module.get_rng_state(device) for module, device in modules]
    try:
        yield
    finally:
        torch.set_rng_state(state)
        for (module, device), saved in zip(modules, states, strict=True):
            module.set_rng_state(saved, device)


def _devices_in_use() -> list[torch.device]:
    """Return the devices of the accelerator of this process, if it was used already; none is initialized here."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return []
    module = torch.get_device_module(accelerator.type)
    is_used = getattr(module, "is_initialized", lambda: False)
    return [torch.device(accelerator.type, index) for index in range(module.device_count())] if is_used() else []


@cache
def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def hardware_name(device: AnyDevice) -> str:
    """Return the name of a device's hardware, with the version of the library that computes convolutions on it."""
    kind = torch.device(device).type
    if kind == "cuda":
        library = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        return f"{torch.cuda.get_device_name(device)} cudnn {library} hip {torch.version.hip}"
    if kind == "xpu":
        return str(torch.xpu.get_device_name(device))
    return processor()


def has_tf32() -> bool:
    """Return whether products of float32 on CUDA are computed in TF32, by either of torch's interfaces for it."""
    with suppress(RuntimeError):  # after one of them was used, the other may refuse to be read
        if torch.get_float32_matmul_precision() != "highest":
            return True
    return getattr(torch.backends.cuda.matmul, "fp32_precision", "") == "tf32"


def cache_bytes(device: AnyDevice) -> int:
    """Return how many bytes the last cache of a device holds, for CUDA; 0 where torch does not say."""
    if torch.device(device).type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def free_memory(device: AnyDevice) -> None:
    """Give the blocks that the allocator of a device keeps for later back to the device."""
    kind = torch.device(device).type
    empty_cache = None if kind in {"cpu", "meta"} else getattr(torch.get_device_module(kind), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


def raise_if_broken(error: RuntimeError) -> None:
    """Raise a TdfxError for an error after which a device computes nothing more, such as an illegal memory access.

    torch raises AcceleratorError for those. Running out of memory, or lacking a kernel, is no such error.
    """
    if isinstance(error, torch.AcceleratorError) and "out of memory" not in str(error).lower():
        raise TdfxError(
            f"The device failed while layers were timed, and computes nothing more in this process: {error}. Start the "
            f"process again, with CUDA_LAUNCH_BLOCKING=1 to see which operation fails."
        ) from error
