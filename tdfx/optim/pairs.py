"""The containers in which training loops keep the masters of their parameters, read and checked."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from tdfx.errors import OptimizerError

Pair = tuple[nn.Parameter, Tensor]
"""A parameter of the model and its master."""

Write = Callable[[list[Pair]], None]
"""Puts other pairs into a container."""


def nowhere(pairs: list[Pair]) -> None:
    """Put the pairs of nobody nowhere."""


def unpacked(masters: Any, model: nn.Module) -> tuple[list[Pair], Write]:
    """Return the pairs of a container, and the function that puts others into it.

    Args:
        masters: A mapping, a list of pairs, or two lists side by side.
        model: The model whose parameters they are for.

    Raises:
        OptimizerError: It is something else, or does not go with the model.
    """
    pairs, write = _read(masters)
    names = {id(one): name for name, one in model.named_parameters()}
    for index, (parameter, master) in enumerate(pairs):
        if id(parameter) not in names:
            raise OptimizerError(
                f"Entry {index} of masters= is for a {_said(parameter)} which is no parameter of this "
                f"{type(model).__name__}. Pass pairs of a parameter of the model as it is now and its master, in this order."
            )
        _check_pair(names[id(parameter)], parameter, master)
    for position, whose in ((0, "parameter"), (1, "master")):
        seen: dict[int, str] = {}
        for pair in pairs:
            name = names[id(pair[0])]
            if id(pair[position]) in seen:
                raise OptimizerError(
                    f"masters= has one {whose} in two entries, for {seen[id(pair[position])]!r} and for {name!r}. Each "
                    f"parameter has one master of its own; a parameter that several layers share is one."
                )
            seen[id(pair[position])] = name
    return pairs, write


def _read(masters: Any) -> tuple[list[Pair], Write]:
    """Return the pairs of a container, and the function that puts others into it."""
    if isinstance(masters, MutableMapping):

        def refill(pairs: list[Pair]) -> None:
            masters.clear()
            masters.update(pairs)

        return list(masters.items()), refill
    if isinstance(masters, list | tuple) and len(masters) == 2 and all(isinstance(one, list) for one in masters):
        models, others = masters
        if len(models) != len(others):
            raise OptimizerError(
                f"masters= has lists of {len(models)} parameters and {len(others)} masters: each parameter stands beside "
                f"its own master. One flat master of all parameters cannot be taken apart; keep one for each."
            )

        def relist(pairs: list[Pair]) -> None:
            models[:], others[:] = [one for one, _ in pairs], [one for _, one in pairs]

        return list(zip(models, others, strict=True)), relist
    if isinstance(masters, list) and all(isinstance(one, tuple) and len(one) == 2 for one in masters):

        def repair(pairs: list[Pair]) -> None:
            masters[:] = pairs

        return list(masters), repair
    raise OptimizerError(
        f"masters= is a {type(masters).__name__}, and what is kept in it could not be brought up to date. Pass a dict from "
        f"each parameter to its master, a list of such pairs, or two lists side by side, parameters first."
    )


def _check_pair(name: str, parameter: nn.Parameter, master: Any) -> None:
    if not isinstance(master, Tensor) or not (master.is_floating_point() and parameter.is_floating_point()):
        raise OptimizerError(
            f"The master of {name!r}, a {_said(parameter)}, is a {_said(master)}: both must be tensors of real "
            f"floating-point numbers. Pass only those of which the optimizer trains a wider copy."
        )
    if master.shape != parameter.shape:
        raise OptimizerError(
            f"The master of {name!r} has shape {tuple(master.shape)}, and the parameter has {tuple(parameter.shape)}. Pass "
            f"the masters of the model as it is now; they must have been rewritten along with it."
        )
    if torch.finfo(master.dtype).eps > torch.finfo(parameter.dtype).eps:
        raise OptimizerError(
            f"The master of {name!r} is {master.dtype}, coarser than the parameter's {parameter.dtype}. Pass the parameter "
            f"first and its master second."
        )
    if master.device != parameter.device:
        raise OptimizerError(
            f"The master of {name!r} is on {master.device}, and the parameter on {parameter.device}. Bring both to one "
            f"device for this call."
        )


def _said(value: Any) -> str:
    return f"{value.dtype} tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
