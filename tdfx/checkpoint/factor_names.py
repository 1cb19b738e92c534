"""Join the factors in a ``state_dict`` by their names, where it is known how each weight was split; no model is needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdfx.errors import CheckpointError, KindError
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme
from tdfx.factors.scheme import Scheme
from tdfx.kinds.kind import LayerKind
from tdfx.kinds.registry import kind_named
from tdfx.layers.factorized import kernel_factor, like_parameter
from tdfx.layers.placement import full_precise
from tdfx.plans.plan import Plan, SitePlan
from tdfx.text import first_names

State = Mapping[str, Any]
_FACTOR = re.compile(r"(?:(?P<path>.+)\.)?factors\.(?P<index>\d+)\.(?P<what>weight|bias)")


@dataclass(frozen=True, slots=True)
class Split:
    """How one weight was split, and where its factors lie in a ``state_dict``."""

    path: str
    """Path of the factorized layer, or of the parameter; "" for the model itself."""
    kind: LayerKind | None
    """The kind of the layer; None for a parameter that functions use."""
    operation: Operation
    scheme: Scheme
    ranks: tuple[int, ...]

    @classmethod
    def of(
        cls, path: str, kind: str | None, shape: Sequence[int], groups: int, transposed: bool, scheme: str, ranks: Any
    ) -> Split:
        """Make it from what a plan or a checkpoint records; strides and paddings do not matter for the product."""
        try:
            layer_kind = None if kind is None else kind_named(kind)
        except KindError as error:
            raise CheckpointError(f"The weight of {path!r} cannot be joined: {error}") from error
        channels = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
        kernel = tuple(shape[2:])
        ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
        operation = Operation(
            in_channels=channels[0],
            out_channels=channels[1],
            kernel=kernel,
            stride=ones,
            padding=zeros,
            dilation=ones,
            groups=groups,
            transposed=transposed,
            output_padding=zeros if transposed else (),
        )
        return cls(path, layer_kind, operation, get_scheme(scheme), tuple(ranks))

    @classmethod
    def of_plan(cls, site: SitePlan) -> Split:
        """Make it from a site of a plan that is factorized."""
        path, kind = (site.name, site.kind) if site.parameter is None else (site.parameter, None)
        return cls.of(path, kind, site.shape, site.groups, site.transposed, str(site.scheme), site.ranks)

    @classmethod
    def of_record(cls, site: Mapping[str, Any]) -> Split:
        """Make it from what ``tdfx.save`` records of a site."""
        kind = None if site["slot"] else site["kind"]
        return cls.of(
            site["path"], kind, site["shape"], site["groups"], site["transposed"], site["scheme"], site["ranks"]
        )

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the factors' weights."""
        return [step.weight_shape for step in self.scheme.chain(self.operation, self.ranks)]

    def dense_name(self, path: str) -> str:
        """Return the name of the dense weight of a layer or parameter at a path."""
        return path if self.kind is None else _join(path, self.kind.weight)

    def bias_name(self, path: str) -> str:
        """Return the name of the bias of a layer at a path."""
        return _join(path, (self.kind and self.kind.bias) or "bias")

    def join(self, factors: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
        """Return the dense weight of factors, with the dtype and memory format that the factors of the model have."""
        dense = self.scheme.join(self.operation, [full_precise(factor) for factor in factors])
        template = kernel_factor([nn.Parameter(weight, requires_grad=False) for weight in like])
        return like_parameter(dense if self.kind is None else self.kind.from_dense(dense), template)


def factor_groups(state: State) -> dict[str, dict[str, str]]:
    """Return path -> the end of each name, such as ``0.weight`` -> the name, for all that looks like factors.

    >>> names = ["fc.factors.0.weight", "fc.factors.1.weight", "fc.factors.1.bias", "norm.weight"]
    >>> factor_groups(dict.fromkeys(names, torch.ones(1)))
    {'fc': {'0.weight': 'fc.factors.0.weight', '1.weight': 'fc.factors.1.weight', '1.bias': 'fc.factors.1.bias'}}
    """
    groups: dict[str, dict[str, str]] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and (match := _FACTOR.fullmatch(name)) is not None:
            groups.setdefault(match["path"] or "", {})[f"{match['index']}.{match['what']}"] = name
    return {path: names for path, names in groups.items() if "0.weight" in names}


def place_splits(state: State, plans: Sequence[Plan], *, advice: str) -> dict[str, Split]:
    """Return path in the ``state_dict`` -> how its weight was split, for all that it holds as factors.

    A plan names the layers of the module that was rewritten, which may be a part of what was saved, or lie in a wrapper:
    its paths are looked for under every prefix, and it must fit under exactly one.

    Raises:
        CheckpointError: Nothing says how some of the factors were split, or a plan fits at several places.
    """
    groups = factor_groups(state)
    placed: dict[str, Split] = {}
    for plan in plans:
        placed |= _place_plan(state, {path: names for path, names in groups.items() if path not in placed}, plan)
    placed |= tied_splits(state, placed)
    if unknown := sorted(groups.keys() - placed.keys()):
        wrong = " that fits" if plans else ""
        raise CheckpointError(
            f"The checkpoint holds factors of {len(unknown)} layers, {unknown[0] or 'the model itself'!r} first, and no "
            f"plan{wrong} that says how their weights were split: from the factors alone that could only be guessed. "
            f"{advice}"
        )
    return placed


def _place_plan(state: State, groups: Mapping[str, Mapping[str, str]], plan: Plan) -> dict[str, Split]:
    """Return path in the ``state_dict`` -> its split, for the sites of one plan that are held as factors."""
    splits = [Split.of_plan(site) for site in plan.factorized]
    # torch.compile adds names of its own at the place of each compiled module, which plans leave out.
    paths = {_uncompiled(path): path for path in groups}
    shapes = {path: _shapes(state, groups[real]) for path, real in paths.items()}
    dense = {_uncompiled(name) for name in state}

    def fits(split: Split, prefix: str) -> bool:
        path = _under(prefix, split.path)
        return shapes[path] == split.shapes if path in shapes else split.dense_name(path) in dense

    prefixes = {path[: len(path) - len(split.path)] for split in splits for path in paths if _ends(path, split.path)}
    fitting = [prefix for prefix in sorted(prefixes) if all(fits(split, prefix) for split in splits)]
    if len(fitting) > 1:
        raise CheckpointError(
            f"The plan of {plan.model or 'the model'} fits at {len(fitting)} places of this checkpoint: "
            f"{first_names(fitting)}. Merge the parts one by one: pass tdfx.merge_checkpoint the state_dict of each."
        )
    placed = {_under(prefix, split.path): split for prefix in fitting for split in splits}
    return {paths[path]: split for path, split in placed.items() if path in paths}


def join_factors(state: State, splits: Mapping[str, Split], masters: State | None = None) -> dict[str, Any]:
    """Return the ``state_dict`` with a dense weight in the place of the factors of each layer; all else is as it was.

    ``masters`` are wider copies of some of the tensors by name; they are what is joined.

    Raises:
        CheckpointError: A factor is missing, or has another shape than its split says.
    """
    groups = factor_groups(state)
    wide = masters or {}
    replaced: dict[str, Callable[[], dict[str, Any]]] = {}
    for path, split in splits.items():
        replaced[_first_factor(groups, path, split)] = _Joined(state, wide, groups[path], path, split)
    gone = {name for path in splits for name in groups[path].values()}
    dense: dict[str, Any] = {}
    for name, value in state.items():
        if name in replaced:
            dense |= replaced[name]()
        elif name not in gone:
            dense[name] = value
    return dense


@dataclass(frozen=True, slots=True)
class _Joined:
    state: State
    masters: State
    names: Mapping[str, str]
    path: str
    split: Split

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        """Return the dense weight and the bias by name."""
        names = [self.names.get(f"{index}.weight", "") for index in range(len(self.split.shapes))]
        like = [self.state.get(name) for name in names]
        shapes = [tuple(weight.shape) if isinstance(weight, Tensor) else None for weight in like]
        if shapes != self.split.shapes:
            raise CheckpointError(
                f"The factors of {self.path or 'the model itself'!r} have the shapes {shapes}, and {self.split.scheme.name} "
                f"at ranks {self.split.ranks} of a weight of shape {self.split.operation.weight_shape} has "
                f"{self.split.shapes}: the plan is of another run, or the checkpoint is incomplete. Pass the plan by which "
                f"this model was rewritten."
            )
        weights = [weight.detach() for weight in like if weight is not None]
        factors = [self.masters.get(name, weight) for name, weight in zip(names, weights, strict=True)]
        dense = {self.split.dense_name(self.path): self.split.join(factors, weights)}
        bias = self.names.get(f"{len(names) - 1}.bias")
        return dense if bias is None else dense | {self.split.bias_name(self.path): self.state[bias]}


def _first_factor(groups: Mapping[str, Mapping[str, str]], path: str, split: Split) -> str:
    first = groups.get(path, {}).get("0.weight")
    if first is None:
        raise CheckpointError(
            f"The checkpoint lacks the first factor of {path or 'the model itself'!r}, which {split.scheme.name} split. It "
            f"is incomplete: take another checkpoint."
        )
    return first


def tied_splits(state: State, placed: Mapping[str, Split]) -> dict[str, Split]:
    """Return the splits of layers that the model holds under another path too: their factors lie in the same memory."""
    groups = factor_groups(state)

    def memory(path: str) -> tuple[object, ...]:
        tensors = [state[name] for _, name in sorted(groups[path].items())]
        return tuple((each.untyped_storage().data_ptr(), each.storage_offset(), tuple(each.shape)) for each in tensors)

    known = {memory(path): split for path, split in placed.items() if path in groups}
    return {path: known[memory(path)] for path in groups if path not in placed and memory(path) in known}


def _shapes(state: State, names: Mapping[str, str]) -> list[tuple[int, ...]]:
    return [tuple(state[names[end]].shape) for end in sorted(names) if end.endswith("weight")]


def _uncompiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _under(prefix: str, path: str) -> str:
    return f"{prefix}{path}" if path else prefix.removesuffix(".")


def _ends(path: str, end: str) -> bool:
    return path == end or not end or path.endswith(f".{end}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
