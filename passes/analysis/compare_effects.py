"""A graph run beside the module that it stands for: whether both do the same on the example inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from tdfx.passes.analysis.guard import ParameterGuard, WritesParameterError
from tdfx.passes.analysis.observe import Inputs, split_inputs
from tdfx.passes.analysis.sandbox import isolated, scratch_copy
from tdfx.passes.analysis.user_state import UserState
from tdfx.passes.program import Traced

_SAMPLES = 2
"""So many samples of the example inputs are enough to see whether two computations are the same."""
_MOST_GRADIENTS = 2**18
"""So many gradients are compared, of the smallest parameters: all would take memory, and the time of a training step."""
_ROUNDING = 1e3
"""So many roundings may two computations differ by that are the same but for their order."""


@dataclass(frozen=True, slots=True)
class _Effects:
    """What two calls in one mode did."""

    outputs: Any
    gradients: list[Tensor | None]
    buffers: list[Tensor]
    state: Mapping[str, Any]


def difference(module: nn.Module, traced: Traced, inputs: Inputs) -> str:
    """Return in what a graph differs from its module on example inputs, in either mode; "" if in nothing.

    Both are called twice in each mode, with the same random numbers. Where the module itself cannot be called, as without
    targets in train mode, nothing can be compared.
    """
    templates: dict[int, fx.GraphModule] = {}
    for training in (True, False):
        mode = "train" if training else "eval"
        try:
            with ParameterGuard(module):
                expected, given = _effects_of_module(module, inputs, training)
        except WritesParameterError as error:
            return str(error)
        except Exception:
            continue
        graph = traced.graphs[0 if training else -1]
        try:
            with ParameterGuard(module):
                effects = _effects(_as_graph(module, graph, training, templates), given)
        except Exception as error:  # whatever it raises, the module did not
            message = (str(error).splitlines() or [""])[0]
            return f"in {mode} mode a graph of it raises {type(error).__name__}: {message}"
        if what := _compare(effects, expected):
            return f"in {mode} mode a graph of it differs in its {what} on the example inputs"
    return ""


def _effects_of_module(module: nn.Module, inputs: Inputs, training: bool) -> tuple[_Effects, Inputs]:
    """Return what a module does, and the inputs for which it does: a few samples of them, or all."""
    few = _few(inputs)
    try:
        return _effects(scratch_copy(module, training=training), few), few
    except Exception:
        if few is inputs:
            raise
        return _effects(scratch_copy(module, training=training), inputs), inputs


def _as_graph(module: nn.Module, graph: fx.Graph, training: bool, templates: dict[int, fx.GraphModule]) -> nn.Module:
    """Return a scratch copy of a module that runs a graph; the code of each graph is generated once."""
    scratch = scratch_copy(module, training=training)
    if id(graph) not in templates:
        templates[id(graph)] = fx.GraphModule(scratch, copy.deepcopy(graph))
    template = templates[id(graph)]
    graph_module: nn.Module = object.__new__(type(template))
    graph_module.__dict__.update({**scratch.__dict__, **template.__dict__})
    for held in ("_modules", "_parameters", "_buffers", "training"):
        graph_module.__dict__[held] = scratch.__dict__[held]
    return graph_module


def _few(inputs: Inputs) -> Inputs:
    """Return the first samples of a batch, where all tensors are of one batch."""
    tensors = [value for value in tree_flatten(inputs)[0] if isinstance(value, Tensor)]
    sizes = {tensor.shape[0] for tensor in tensors if tensor.dim()}
    if len(sizes) != 1 or min(sizes) <= _SAMPLES or any(not tensor.dim() for tensor in tensors):
        return inputs
    few: Inputs = tree_map_only(Tensor, lambda tensor: tensor[:_SAMPLES], inputs)
    return few


def _effects(module: nn.Module, inputs: Inputs) -> _Effects:
    """Call a scratch copy twice and return all that this did, with the gradients of the second call."""
    arguments, named = tree_map_only(Tensor, Tensor.clone, split_inputs(inputs))
    trained = list(_small_parameters(module))
    with isolated(module), torch.enable_grad():
        torch.manual_seed(0)
        outputs = [module(*arguments, **named) for _ in range(2)]
        sums = [_sum(value) for value in _tensors(outputs[-1]) if value.requires_grad]
        gradients = torch.autograd.grad(sums, trained, allow_unused=True) if sums and trained else []
        state = UserState(module).contents
    detached = tree_map_only(Tensor, Tensor.detach, outputs)
    buffers = [buffer.detach().clone() for buffer in module.buffers()]
    return _Effects(detached, list(gradients), [*buffers, *_tensors((arguments, named))], state)


def _small_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the smallest parameters that train, such as biases: their gradients come by way of all the others."""
    total = 0
    trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
    for parameter in sorted(trained, key=nn.Parameter.numel):
        total += parameter.numel()
        yield parameter
        if total > _MOST_GRADIENTS:
            return


def _sum(tensor: Tensor) -> Tensor:
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return (
        values * torch.linspace(0.5, 1.5, values.numel(), device=values.device).view(values.shape).to(values.dtype)
    ).sum()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def _compare(effects: _Effects, expected: _Effects) -> str:
    leaves, form = tree_flatten(effects.outputs)
    expected_leaves, expected_form = tree_flatten(expected.outputs)
    if str(form) != str(expected_form) or not all(map(_are_same, leaves, expected_leaves)):
        return "outputs"
    if not _are_all_same(effects.gradients, expected.gradients):
        return "gradients"
    if not _are_all_same(effects.buffers, expected.buffers):
        return "buffers"
    for path, value in expected.state.items():
        if path in effects.state and not _are_same_state(effects.state[path], value):
            return f"effect on {path!r}"
    return ""


def _are_all_same(values: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(values) == len(others) and all(map(_are_same, values, others))


def _are_same(value: Any, other: Any) -> bool:
    value, other = (each.to_dense() if isinstance(each, Tensor) and each.is_sparse else each for each in (value, other))
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return type(value) is type(other) and (
            not isinstance(value, int | float | str) or value == other or value != value
        )
    if value.shape != other.shape or value.dtype != other.dtype or value.device != other.device:
        return False
    if value.is_meta or not value.numel() or torch.equal(value, other):
        return True
    if not value.is_floating_point() and not value.is_complex():
        return False
    bound = _ROUNDING * torch.finfo(value.dtype).eps * float(other.abs().nan_to_num().max())
    return torch.allclose(value, other, rtol=0.0, atol=bound, equal_nan=True)


def _are_same_state(value: Any, other: Any) -> bool:
    """Compare what an object held: numbers by value, all else by its kind and its length."""
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return _are_same(value, other)
    if isinstance(value, dict) and isinstance(other, dict):
        return all(
            _are_same(value[key], other[key])
            for key in value.keys() & other.keys()
            if isinstance(value[key], int | float)
        )
    if isinstance(value, list | tuple | set) and isinstance(other, list | tuple | set):
        return len(value) == len(other)
    return True
