"""Structural copies: every module is a new object, every parameter and buffer is the same object as before.

A rewrite must leave the user's model as it was, and must not copy its weights, for which the device may have no room.
Neither of Python's copies does that: ``copy.deepcopy`` copies the weights, and ``copy.copy`` copies one module whose
children are still the user's own. So each module gets a *twin*, a new object of the same class, and every attribute of the
twin is *translated*: wherever it refers to a module of the original, it must refer to that module's twin. A list of layers,
a bound method or a hook that was merely shared would go on calling the original's layers, and the copy would compute with
them.

README.md in this folder lists what makes this hard.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar, cast

import torch
from torch import nn

from tdfx.layers.module_state import COMPILED, HOOKS, STATE_DICT_HOOKS
from tdfx.layers.placement import placeholder
from tdfx.layers.translator import Translator

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def structural_copy(model: ModuleT, replace: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """Copy every module of a model and no tensor: parameters and buffers are the same objects in both.

    The copy has the same classes, attributes, hooks and names in the same order, and each module is in the same train or
    eval mode. Containers that are attributes are copied; references to a module or to such a container in them, in bound
    methods and in closures become references to its twin. Code from ``compile()`` is left out. TorchScript modules cannot
    be taken apart and are shared.

    Args:
        model: Any module; it is left as it was.
        replace: Submodule -> the module that takes its place, at every path where it occurs.

    Returns:
        The copy; if ``replace`` names the root, the module that takes its place.
    """
    replace = replace or {}
    modules = list(_modules_to_copy(model, replace))
    copied = [module for module in modules if module not in replace and not isinstance(module, torch.jit.ScriptModule)]
    twins = {id(module): replace.get(module, module) for module in modules}
    # Not by the class's constructor, which needs arguments and may draw random numbers or open files.
    twins |= {id(module): object.__new__(type(module)) for module in copied}
    # All twins exist before the first is filled, because modules may refer to one another in circles.
    translate = Translator(twins, copied, model)
    # The handles of hooks refer to these.
    translate.copies |= {id(old.__dict__[name]): new.__dict__[name] for old, new in replace.items() for name in HOOKS}
    for module in copied:
        translate.fill(twins[id(module)], module)
        twins[id(module)].__dict__.pop(COMPILED, None)
    for new in replace.values():
        for name in HOOKS:
            new.__dict__[name].update({key: translate(hook) for key, hook in new.__dict__[name].items()})
    return twins[id(model)]


def rebind(model: nn.Module, former: nn.Module) -> None:
    """Replace, in a model's attributes, references to modules of a former model by its own modules of the same path.

    A model that takes the place of a former one was given its attributes: bound methods, hooks and closures that refer to
    the former model's modules. Parameters, buffers and children are not touched.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    twins = {
        id(old): modules[path]
        for path, old in former.named_modules(remove_duplicate=False)
        if path in modules and modules[path] is not old
    }
    _translate_attributes(model, twins, former, skip={"_parameters", "_buffers", "_modules"})


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules inside a model, in place, also in the attributes that refer to them."""
    _translate_attributes(model, {id(old): new for old, new in replacements.items()}, model)


def shell_of(module: ModuleT) -> ModuleT:
    """Return a structural copy of one module whose parameters are placeholders on the meta device, which need no memory.

    The placeholders keep shape, dtype and ``requires_grad``; the layer can be built again from the copy.
    """
    shell = cast("ModuleT", structural_copy(module))
    for name, parameter in shell._parameters.items():
        if parameter is not None:
            shell._parameters[name] = nn.Parameter(placeholder(parameter), requires_grad=parameter.requires_grad)
    return shell


def copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give one module the hooks of another: those of calls in place of its own, those of saving and loading besides them.

    A hook that is given its module, or is a method of it, gets the target.
    """
    translate = Translator({id(source): target})
    for name in HOOKS:
        target.__dict__[name] = translate(source.__dict__[name])
    target.__dict__["_is_full_backward_hook"] = source.__dict__["_is_full_backward_hook"]
    for name in STATE_DICT_HOOKS:
        target.__dict__[name].update(translate(source.__dict__[name]))


def _modules_to_copy(model: nn.Module, replace: Mapping[nn.Module, nn.Module]) -> Iterator[nn.Module]:
    """Yield each module once; the children of modules that will be replaced are left out."""
    seen: set[int] = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting.extend(() if module in replace else module._modules.values())


def _translate_attributes(
    model: nn.Module, twins: Mapping[int, nn.Module], root: nn.Module, skip: Collection[str] = ()
) -> None:
    """Translate the attributes of a model's modules in place, apart from those of given names."""
    translate = Translator(twins, model.modules(), root)
    # This keeps the old values alive: the translator remembers them by id, and the handles of hooks refer to them weakly.
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    for module, values in attributes:
        module.__dict__.update({key: translate(value) for key, value in values.items() if key not in skip})
