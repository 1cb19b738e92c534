"""Second moments of what flows into each site and of the gradients at its outputs, from the user's own training steps."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import unserializable_hook

from tdfx.checks import check_whole
from tdfx.cost.setting import autocast_now
from tdfx.distributed.processes import Processes
from tdfx.errors import CheckpointError, ModelError, nearest
from tdfx.factors.moments import FEWEST_ROWS, SiteMoments, mean_diagonal, moment_shape, sample_rows, second_moment
from tdfx.factors.operation import Operation
from tdfx.help_texts import hide_private
from tdfx.passes.analysis.loop import LoopSettings, SiteSetting
from tdfx.passes.analysis.observe import is_channels_last
from tdfx.passes.analysis.training_hooks import Arrange, TrainingHooks

_KEPT = 8
"""How many newer units may begin while a unit has no gradients yet, and how many batches are kept."""


class Moments:
    """Records second moments of the inputs and the output gradients of every site while a model trains as it does.

    The training loop stays as it is, and computes the same bits as without. While the hooks are attached, a model that
    ``torch.compile`` has compiled runs eagerly. Attach them to the module that the loop calls; if the loop calls it within a
    function that is compiled, nothing is recorded. Remove them before the model is rewritten.

    Args:
        model: The model, in whatever wrapper it trains.
        steps: About how many steps will be recorded. The share of rows that is sampled is ``1 / (2 * steps)``, but at least
            256 rows of each call; and after the first step a site with more rows is recorded at every second one.

    Example:
        >>> import tdfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> with tdfx.Moments(model) as moments:
        ...     for _ in range(2):
        ...         model(torch.randn(32, 8)).square().mean().backward()
        >>> moments.units, moments.of("0.weight").inputs.shape
        (2, torch.Size([1, 8, 8]))
    """

    nonfinite: Counter[str]
    """Path of a site's weight -> its units that were left out: they had NaN or infinite values, or gradients of zero."""

    @hide_private
    def __init__(self, model: nn.Module, *, steps: int = 8, _share: float | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"model is a {type(model).__name__}, not a torch.nn.Module. Pass the module that you train."
            )
        check_whole("steps", steps, "about how many training steps will be recorded", "steps=8")
        self.nonfinite = Counter()
        self._share, self._takes_turns = (1 / (2 * steps), True) if _share is None else (_share, False)
        self._totals: dict[str, _Sums] = {}
        self._units = 0
        self._begun = 0
        self._waiting: deque[_Unit] = deque(maxlen=_KEPT + 1)
        self._batches: deque[_Batch] = deque(maxlen=_KEPT)
        self._loop: LoopSettings | None = None
        self._hooks = TrainingHooks(model, self._on_forward, self._on_call)

    def __enter__(self) -> Moments:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off the model; what was recorded stays. Does nothing the second time."""
        self._hooks.remove()

    @property
    def units(self) -> int:
        """How many forward passes were recorded with their backward pass, apart from those without finite values."""
        self._fold()
        return self._units

    @property
    def batches(self) -> list[_Batch]:
        """The positional and the named arguments of the last eight recorded forward passes; their tensors are not copied."""
        self._fold()
        return list(self._batches)

    @property
    def loop(self) -> LoopSettings | None:
        """In which precision and memory format the last forward pass computed; None before the first."""
        return self._loop

    def of(self, weight_path: str) -> SiteMoments | None:
        """Return the moments at one site, or None where none were recorded.

        Args:
            weight_path: The path of the dense weight in the model without wrappers, whether or not it is factorized.
        """
        self._fold()
        sums = self._totals.get(weight_path)
        if sums is None:
            return None
        samples = max(round(sums.rows), 1)
        return SiteMoments(inputs=sums.inputs / sums.rows, outputs=sums.outputs / sums.rows, samples=samples)

    def state_dict(self) -> dict[str, Any]:
        """Return what was recorded, in plain types and tensors; the batches are not part of it."""
        self._fold()
        sites = {
            path: {"inputs": sums.inputs, "outputs": sums.outputs, "rows": sums.rows}
            for path, sums in self._totals.items()
        }
        return {"units": self._units, "begun": self._begun, "sites": sites}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned, in place of what was recorded here; ``"batches"`` may be added to it.

        Raises:
            CheckpointError: It is no such state, or that of another model.
        """
        try:
            units, totals = int(state["units"]), {path: _Sums(**site) for path, site in state["sites"].items()}
            shapes = {path: (tuple(sums.inputs.shape), tuple(sums.outputs.shape)) for path, sums in totals.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"This is no state of tdfx.Moments ({type(error).__name__}: {error}). Pass what state_dict() returned."
            ) from error
        operations = self._hooks.operations
        for path, shape in shapes.items():
            if path not in operations:
                raise CheckpointError(
                    f"The state has moments of {path!r}, and the model has no such weight. Nearest: "
                    f"{nearest(path, operations)}. Load it for the model that it was recorded on."
                )
            operation = operations[path]
            channels = operation and (operation.in_channels, operation.out_channels)
            if operation and channels and shape != tuple(moment_shape(operation.groups, count) for count in channels):
                raise CheckpointError(
                    f"The state has moments of shapes {shape[0]} and {shape[1]} for {path!r}, which has {channels[0]} input "
                    f"and {channels[1]} output channels. Load it for the model that it was recorded on."
                )
        self._waiting.clear()
        self._units, self._totals = units, totals
        self._begun = int(state.get("begun", units))  # the rows that are sampled next depend on it
        self._batches.clear()
        self._batches.extend(state.get("batches", ()))

    def knows(self, weight_paths: Iterable[str]) -> bool:
        """Return True if the model has all of these weights."""
        return self._hooks.operations.keys() >= set(weight_paths)

    def join(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Record a call of the model that has begun already, with these positional arguments."""
        self._hooks.enter(model, arguments, {})

    def average(self, processes: Processes) -> None:
        """Average what the processes have recorded, to the same bits on all of them, which must call this together."""
        self._fold()
        own = {"units": torch.tensor(float(self._units), dtype=torch.float64)}
        for path, sums in self._totals.items():
            own |= {f"inputs {path}": sums.inputs, f"outputs {path}": sums.outputs}
            own[f"rows {path}"] = torch.tensor(sums.rows, dtype=torch.float64)
        mean = processes.average_tensors(own)
        self._units = round(float(mean.pop("units")))
        paths = [name.removeprefix("rows ") for name in mean if name.startswith("rows ")]
        self._totals = {
            path: _Sums(mean[f"inputs {path}"], mean[f"outputs {path}"], float(mean[f"rows {path}"])) for path in paths
        }

    def _on_forward(self, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            sites = {} if self._loop is None else self._loop.sites
            self._loop = replace(LoopSettings.now((args, named)), sites=sites)
            self._begin(tree_map_only(Tensor, Tensor.detach, (args, named)))

    def _begin(self, batch: _Batch | None = None) -> _Unit:
        self._fold()
        unit = _Unit(self._begun, batch)
        self._begun += 1
        self._waiting.append(unit)
        return unit

    def _on_call(self, path: str, operation: Operation, x: Tensor, output: Tensor, arrange: Arrange) -> None:
        """Take the input's moment of one call; it is added to the unit when the gradient of the output arrives.

        So a call counts as often as a gradient flows through it. A checkpointed block runs twice, and the gradients flow
        through one of the runs.
        """
        unit = self._waiting[-1] if self._waiting else None
        # A method other than forward begins a unit when the former has its gradients.
        if unit is None or (unit.sites and not self._hooks.in_forward and not _in_backward()):
            unit = self._begin()
        if x.numel() > FEWEST_ROWS * operation.in_channels and self._rests(path, unit.number):
            return
        self._record_setting(path, x, output)
        dim, groups, share, turn = -1 - operation.dims, operation.groups, self._share, unit.number
        with _aside(), torch.autocast(x.device.type, enabled=False):
            rows = sample_rows(x, dim, share, turn)
            inputs, count = second_moment(rows, groups), len(rows)

        def on_gradient(gradient: Tensor) -> None:
            with _aside(), torch.autocast(gradient.device.type, enabled=False):
                outputs = second_moment(sample_rows(arrange(gradient), dim, share, turn), groups)
                unit.add(path, _Sums(inputs, outputs, count))

        # An operation in place on a view, such as a ReLU, replaces the view's own gradient function, and hooks with it.
        base = output._base
        is_same = base is not None and base.numel() == output.numel() and base.shape[dim:] == output.shape[dim:]
        target = base if base is not None and is_same and base.requires_grad else output
        target.register_hook(unserializable_hook(on_gradient))  # type: ignore[no-untyped-call]

    def _record_setting(self, path: str, x: Tensor, output: Tensor) -> None:
        if self._loop is not None and path not in self._loop.sites:
            seen = SiteSetting(output.dtype, autocast_now(x.device.type), is_channels_last(x))
            self._loop = replace(self._loop, sites={**self._loop.sites, path: seen})

    def _rests(self, path: str, number: int) -> bool:
        """Return True if a site is not recorded in a unit: half of the sites in turns, after the first unit."""
        return self._takes_turns and number > 0 and (number + self._hooks.turn_of(path)) % 2 == 0

    def _fold(self) -> None:
        """Add the units that have their gradients to the totals, with one wait for each device."""
        if _in_backward():
            return
        units = [unit for unit in self._waiting if unit.sites]
        self._waiting = deque((unit for unit in self._waiting if not unit.sites), self._waiting.maxlen)
        with _aside():
            for unit in units:
                usable = unit.usable_sites()
                for path in list(unit.sites):
                    sums = unit.sites.pop(path)  # frees the memory of one site after the other
                    if path not in usable:
                        self.nonfinite[path] += 1
                        continue
                    total = self._totals.get(path)
                    self._totals[path] = sums.normalized() if total is None else total.plus(sums.normalized())
                if usable:
                    self._units += 1
                    self._batches.extend([unit.batch] if unit.batch is not None else [])


_Batch = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over rows at one site."""

    inputs: Tensor
    outputs: Tensor
    rows: float
    """Rows of the input; a mean over processes need not be whole."""

    def plus(self, other: _Sums) -> _Sums:
        """Return the sums over the rows of both, on the other's device; the other alone if they differ in shape."""
        if (self.inputs.shape, self.outputs.shape) != (other.inputs.shape, other.outputs.shape):
            return other
        inputs, outputs = (
            mine.to(new) + new for mine, new in ((self.inputs, other.inputs), (self.outputs, other.outputs))
        )
        return _Sums(inputs, outputs, self.rows + other.rows)

    def normalized(self) -> _Sums:
        """Return the sums with ``outputs`` scaled to a mean diagonal of one a row."""
        return _Sums(self.inputs, self.outputs / mean_diagonal(self.outputs) * self.rows, self.rows)

    def is_usable(self) -> Tensor:
        """Return whether all values are finite and the gradients are not all zero, as a tensor."""
        return self.inputs.isfinite().all() & self.outputs.isfinite().all() & (mean_diagonal(self.outputs) > 0)


@dataclass(slots=True)
class _Unit:
    """One forward pass and its backward pass: a step, or a part of one where gradients are accumulated."""

    number: int
    batch: _Batch | None
    sites: dict[str, _Sums] = field(default_factory=dict)
    """Path of a weight -> the sums over its calls whose gradients have arrived."""

    def add(self, path: str, sums: _Sums) -> None:
        """Add the sums over one call."""
        self.sites[path] = self.sites[path].plus(sums) if path in self.sites else sums

    def usable_sites(self) -> set[str]:
        """Return the sites with usable sums, which are read from each device at once."""
        by_device: defaultdict[torch.device, dict[str, Tensor]] = defaultdict(dict)
        for path, sums in self.sites.items():
            by_device[sums.inputs.device][path] = sums.is_usable()
        return {
            path
            for flags in by_device.values()
            for path, is_usable in zip(flags, torch.stack(list(flags.values())).tolist(), strict=True)
            if is_usable
        }


@contextmanager
def _aside() -> Iterator[None]:
    """Compute outside of autograd and unseen by the user's modes, which count or record operations."""
    with torch.no_grad(), torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def _in_backward() -> bool:
    """Return True within a backward pass, in which a checkpointed block runs once more."""
    return torch._C._current_graph_task_id() != -1
