"""What belongs to libraries and not to the user, and which of their objects a user's forward may change."""

from __future__ import annotations

import logging
import multiprocessing.sharedctypes
import queue
import sys
import threading
import types
import weakref
from typing import Any

import torch
from torch.utils._contextlib import _DecoratorContextManager

LIBRARIES = frozenset({"torch", "numpy", "tdfx", "functorch"}) | sys.stdlib_module_names
"""Packages whose classes and functions hold nothing of the user's."""
_MACHINERY = (
    *("torch._", "torch.fx.", "torch.distributed.", "torch.export.", "torch.jit.", "torch.utils.data.", "tdfx."),
    *("asyncio.", "concurrent.", "multiprocessing.", "queue.", "selectors.", "socket.", "ssl.", "subprocess."),
    *("threading.", "ast.", "importlib.", "inspect.", "typing.", "unittest."),
)
"""Packages whose objects refer to half of a program, or to threads and processes that run on meanwhile."""
_HOLDERS = (
    threading.local,
    threading.Event,
    threading.Semaphore,
    multiprocessing.sharedctypes.SynchronizedBase,
    queue.Queue,
    logging.Logger,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
    weakref.WeakSet,
    torch.autocast,
    _DecoratorContextManager,
)
"""Classes of these that hold what a user puts there, or what a context has found."""


def is_of_library(module: str) -> bool:
    """Return True for the name of a module, as of a class or a function, that is not the user's."""
    return module.split(".")[0] in LIBRARIES


def keeps_state(value: Any) -> bool:
    """Return True for an object whose attributes a user's forward may change."""
    if isinstance(value, _HOLDERS):
        return True
    return not isinstance(value, types.ModuleType) and not f"{type(value).__module__}.".startswith(_MACHINERY)


def is_foreign(module: types.ModuleType | None) -> bool:
    """Return True for a module that is not the user's."""
    name, file = getattr(module, "__name__", ""), getattr(module, "__file__", None) or ""
    return is_of_library(name) or "site-packages" in file
