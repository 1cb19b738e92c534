"""Reads, checks and updates the containers in which training loops keep the masters of their parameters."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from operator import setitem
from typing import Any

import torch
from torch import Tensor, nn

from tdfx.errors import OptimizerError
from tdfx.layers.paths import parameters_by_path

Pair = tuple[nn.Parameter, Tensor]
"""A parameter of the model and its master."""

WritePairs = Callable[[list[Pair]], None]
"""Replaces the content of a container by other pairs."""


def read_pairs(masters: Any, model: nn.Module) -> tuple[list[Pair], WritePairs]:
    """Return the pairs of a container, each checked, and the function that writes other pairs into it.

    Raises:
        OptimizerError: It is no mapping, list of pairs, or two lists side by side, or it does not go with the model.
    """
    pairs, write = _open_container(masters)
    names = {id(parameter): name for name, parameter in parameters_by_path(model)}
    for index, (parameter, master) in enumerate(pairs):
        if id(parameter) not in names:
            raise OptimizerError(
                f"Entry {index} of masters= is for a {_described(parameter)} which is no parameter of this "
                f"{type(model).__name__}. Pass pairs of a parameter of the model as it is now and its master, in this order."
            )
        _check_pair(names[id(parameter)], parameter, master)
    for position, role in ((0, "parameter"), (1, "master")):
        seen: dict[int, str] = {}
        for pair in pairs:
            name = names[id(pair[0])]
            if id(pair[position]) in seen:
                raise OptimizerError(
                    f"masters= has one {role} in two entries, for {seen[id(pair[position])]!r} and for {name!r}. Each "
                    f"parameter has one master of its own; a parameter that several layers share counts once."
                )
            seen[id(pair[position])] = name
    return pairs, write


def _open_container(masters: Any) -> tuple[list[Pair], WritePairs]:
    if isinstance(masters, MutableMapping):

        def write_mapping(pairs: list[Pair]) -> None:
            masters.clear()
            masters.update(pairs)

        return list(masters.items()), write_mapping
    if isinstance(masters, list | tuple) and len(masters) == 2 and all(isinstance(part, list) for part in masters):
        parameters, copies = masters
        if len(parameters) != len(copies):
            raise OptimizerError(
                f"masters= has lists of {len(parameters)} parameters and {len(copies)} masters: each parameter stands "
                f"beside its own master. One flat master of all parameters cannot be taken apart; keep one for each."
            )

        def write_lists(pairs: list[Pair]) -> None:
            parameters[:] = [parameter for parameter, _ in pairs]
            copies[:] = [master for _, master in pairs]

        return list(zip(parameters, copies, strict=True)), write_lists
    if isinstance(masters, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in masters):
        return list(masters), partial(setitem, masters, slice(None))
    raise OptimizerError(
        f"masters= is a {type(masters).__name__}, which tdfx cannot update in place. Pass a dict from each parameter to its "
        f"master, a list of such pairs, or two lists side by side, parameters first."
    )


def _check_pair(name: str, parameter: nn.Parameter, master: Any) -> None:
    if not isinstance(master, Tensor) or not (master.is_floating_point() and parameter.is_floating_point()):
        problem = (
            f", a {_described(parameter)}, is a {_described(master)}: both must be tensors of real floating-point "
            f"numbers. Pass only parameters of which the optimizer trains a wider copy."
        )
    elif master.shape != parameter.shape:
        problem = (
            f" has shape {tuple(master.shape)}, and the parameter has {tuple(parameter.shape)}. Pass the masters of "
            f"the model as it is now; they must have been rewritten along with it."
        )
    elif torch.finfo(master.dtype).eps > torch.finfo(parameter.dtype).eps:
        problem = f" is {master.dtype}, coarser than the parameter's {parameter.dtype}. Put the parameter first."
    elif master.device != parameter.device:
        problem = (
            f" is on {master.device}, and the parameter on {parameter.device}. Move both to one device for this call."
        )
    else:
        return
    raise OptimizerError(f"The master of {name!r}{problem}")


def _described(value: Any) -> str:
    return f"{value.dtype} tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
