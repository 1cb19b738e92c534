"""A module that a trainer holds: it is rewritten in place, so that it stays the same object."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tdfx.errors import ModelError
from tdfx.layers.copying import rebind
from tdfx.layers.module_state import COMPILED
from tdfx.wrappers.compiled import compile_in_place, compile_settings_of, inner_module, is_wrapped


class InPlaceModule(nn.Module):
    """A reference to a module that a trainer goes on using after a rewrite returned another one.

    ``plan``, ``rewrite`` and ``merge`` accept it in the place of the module, together with the processes of the
    DistributedDataParallel around the model, or of FSDP2. ``replace_with`` moves the new module into the trainer's module.

    Args:
        trained: The model that the trainer runs, with or without DistributedDataParallel and ``torch.compile`` around it, or
            after ``fully_shard``.
        path: The module's path in the model; empty for the model itself.
    """

    ddp: DistributedDataParallel | None
    """The DistributedDataParallel around the model."""
    model: nn.Module
    """The model without its wrappers."""
    target: nn.Module
    """The module that is rewritten, without a wrapper."""
    wrapped_target: nn.Module
    """The same module in its own ``torch.compile`` wrapper, if it has one."""
    called: nn.Module
    """What the training calls to run that module: itself, or the outermost ``torch.compile`` around it."""
    path: str
    """The path of that module in the model."""
    is_sharded: bool
    """True if ``fully_shard`` was called on the model, or on parts of it."""

    def __init__(self, trained: nn.Module, path: str = "") -> None:
        super().__init__()
        ddp, model, compiled = None, trained, None
        while is_wrapped(model) or isinstance(model, DistributedDataParallel):
            ddp = model if isinstance(model, DistributedDataParallel) else ddp
            compiled = model if compiled is None and is_wrapped(model) else compiled
            model = cast("nn.Module", model._orig_mod if is_wrapped(model) else model.module)
        try:
            wrapped_target = model.get_submodule(path)
        except AttributeError as error:
            names = ", ".join(repr(name) for name, _ in model.named_children())
            raise ModelError(
                f"{type(model).__name__} has no module {path!r} to be rewritten. It has {names or 'none'}."
            ) from error
        called = wrapped_target if path or compiled is None else compiled
        # Set in __dict__, so that they do not become its submodules: it owns none of them.
        self.__dict__.update(ddp=ddp, model=model, target=inner_module(wrapped_target))
        self.__dict__.update(wrapped_target=wrapped_target, called=called, path=path, is_sharded=is_sharded(trained))

    def replace_with(self, rewritten: nn.Module) -> None:
        """Move what ``merge``, or ``rewrite`` with ``emit="modules"``, returned into the trainer's module.

        DDP or FSDP2 is set up for it. All processes must call this at the same time, between an optimizer step and the next
        forward.
        """
        if self.is_sharded:
            from tdfx.distributed.fsdp import change_in_place  # imported late, as in tdfx.wrappers.unwrap

            change_in_place(self.model, lambda: replace_in_place(self.target, rewritten))
            return
        replace_in_place(self.target, rewritten)
        self.rebuild_reducer()

    def reshard(self) -> None:
        """Let a model that is sharded hold its shards, and no whole parameters, which optimizers do not know."""
        if self.is_sharded:
            from tdfx.distributed.fsdp import reshard  # imported late, as in tdfx.wrappers.unwrap

            reshard(self.model)

    def rebuild_reducer(self) -> None:
        """Set up DistributedDataParallel for the model's present parameters; all processes must call this."""
        if self.ddp is not None:
            from tdfx.distributed.ddp import rebuild_reducer  # imported late, as in tdfx.wrappers.unwrap

            rebuild_reducer(self.ddp)


def is_sharded(model: nn.Module) -> bool:
    """Return True if ``fully_shard`` was called on a model or a part of it; its class is not imported for this."""
    return any(base.__name__ == "FSDPModule" for module in model.modules() for base in type(module).__mro__)


def replace_in_place(module: nn.Module, replacement: nn.Module) -> None:
    """Give a module all attributes of another one of its class, while it stays the object that others hold."""
    if type(replacement) is not type(module):
        raise ModelError(
            f"A {type(module).__name__} cannot become a {type(replacement).__name__} and stay the object that the trainer "
            f"holds. Name the module that holds it, not the layer itself."
        )
    recompile = compile_settings_of(module)
    attributes: dict[str, Any] = {key: value for key, value in vars(replacement).items() if key != COMPILED}
    module.__dict__.clear()
    module.__dict__.update(attributes)
    rebind(module, replacement)
    compile_in_place(module, recompile)
