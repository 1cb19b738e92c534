"""Train PyTorch models faster: factorize their layers mid-training, merge them back, and prove it.

``plan`` shows what a rewrite would do to each layer. ``rewrite`` returns a factorized model that goes on training, and
``merge`` the original architecture. ``verify`` proves by ONNX that two models are the same. ``Switch`` rewrites at the right
moment of a training loop. ``save`` and ``load`` write and read checkpoints of factorized models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tdfx.checkpoint.former_modules import register_former_modules

__version__ = "0.1.0"

register_former_modules()

if TYPE_CHECKING:
    from tdfx.public import *  # noqa: F403
    from tdfx.public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """Import all public names at the first use of one, so that ``tdfx --help`` need not wait for torch."""
        names = globals()
        if name == "__all__" or not name.startswith("__"):  # Python itself asks for many names with two underscores
            public = importlib.import_module("tdfx.public")
            names.update({each: getattr(public, each) for each in public.__all__}, __all__=public.__all__)
        if name not in names:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return names[name]

    def __dir__() -> list[str]:
        __getattr__("__all__")
        return sorted(globals())
