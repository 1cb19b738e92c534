"""A module inside of what a trainer holds, which becomes another one and yet stays the object that it is."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tdfx.errors import ModelError
from tdfx.layers.copying import COMPILED, rebind
from tdfx.wrappers.compiled import compile_in_place, compile_settings_of, is_wrapped


class InPlaceModule(nn.Module):
    """Stands for a module in the hands of a trainer, which would go on with the old one if it were given a new one.

    ``plan``, ``rewrite`` and ``merge`` take it as the module itself, agreed upon by the processes of the wrapper around the
    whole, and return what comes of the module. With ``put`` the trainer's own module becomes that.

    Args:
        whole: What the trainer runs: a model, in DistributedDataParallel or ``torch.compile`` or not.
        path: The module's path in the model; empty for the model itself.

    Raises:
        ModelError: There is no such module.
    """

    replica: DistributedDataParallel | None
    """The wrapper around the whole."""
    model: nn.Module
    """The model out of its wrappers."""
    inside: nn.Module
    """The module that this stands for."""
    outer: nn.Module
    """The same, in the wrapper of ``torch.compile`` if it has one of its own."""

    def __init__(self, whole: nn.Module, path: str = "") -> None:
        super().__init__()
        replica, model = None, whole
        while is_wrapped(model) or isinstance(model, DistributedDataParallel):
            replica = model if isinstance(model, DistributedDataParallel) else replica
            model = cast("nn.Module", model._orig_mod if is_wrapped(model) else model.module)
        try:
            inside = model.get_submodule(path)
        except AttributeError as error:
            names = ", ".join(repr(name) for name, _ in model.named_children())
            raise ModelError(
                f"{type(model).__name__} has no module {path!r} to be rewritten. It has {names or 'none'}."
            ) from error
        outer = inside
        while is_wrapped(inside):
            inside = cast("nn.Module", inside._orig_mod)
        # Not as its children: it owns none of them.
        self.__dict__.update(replica=replica, model=model, inside=inside, outer=outer)

    def put(self, made: nn.Module) -> None:
        """Let the trainer's module become another, and its wrapper work for the parameters that it has now.

        All processes must do this at the same time, between an optimizer step and the next forward.

        Args:
            made: What ``rewrite`` with ``emit="modules"`` or ``merge`` has made of this; it is used up.

        Raises:
            ModelError: It is of another class.
        """
        replace_in_place(self.inside, made)
        self.renew()

    def renew(self) -> None:
        """Let the wrapper around the whole work for the parameters that the model has now; all processes must do this."""
        if self.replica is not None:
            from tdfx.distributed.ddp import renew  # as in tdfx.wrappers

            renew(self.replica)


def replace_in_place(module: nn.Module, made: nn.Module) -> None:
    """Let a module take over all that another of its class has, and stay the object that others hold.

    Raises:
        ModelError: The other is of another class.
    """
    if type(made) is not type(module):
        raise ModelError(
            f"A {type(module).__name__} cannot become a {type(made).__name__} and stay the object that the trainer holds. "
            f"Name the module that holds it, not the layer itself."
        )
    again = compile_settings_of(module)
    own: dict[str, Any] = made.__dict__
    for key in module.__dict__.keys() - own.keys():
        del module.__dict__[key]
    module.__dict__.update({key: value for key, value in own.items() if key != COMPILED})
    rebind(module, made)
    compile_in_place(module, again)
