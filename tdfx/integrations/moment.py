"""When a trainer switches: as its user says, or at an early step of a training whose length the trainer knows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tdfx.checks import check_whole
from tdfx.errors import ModelError, PolicyError
from tdfx.training.switch.when import AtEpoch, AtStep, When, early


@dataclass(frozen=True, slots=True)
class Moment:
    """What the user said about when to switch; the step is known only when training begins.

    Raises:
        PolicyError: Both say it, or the epoch is not a whole number of at least 1.
    """

    when: When | None
    """A moment in optimizer steps."""
    epoch: int | None
    """Epochs before the switch. With neither, it is an early step."""

    def __post_init__(self) -> None:
        if self.when is not None and self.epoch is not None:
            raise PolicyError(
                f"when={self.when!r} and epoch={self.epoch!r}: only one of them can say when to switch. Pass for example "
                f"epoch=3, or when=tdfx.AtStep(500), or neither for an early step."
            )
        if self.epoch is not None:
            check_whole("epoch", self.epoch, "the epochs before the switch", "epoch=3")

    def first(self, steps_per_epoch: Callable[[], int], length: int | None) -> When:
        """Return when to switch in a training that begins, with its number of steps if that is known.

        Raises:
            PolicyError: An early step cannot be chosen.
        """
        if self.when is not None:
            return self.when
        if self.epoch is not None:
            return AtEpoch(self.epoch, steps_per_epoch=steps_per_epoch())
        if length is None:
            raise PolicyError(
                "Neither when= nor epoch= is given, and the trainer does not know how many steps the training has, so no "
                "moment to switch can be chosen. Pass for example when=tdfx.AtStep(500) to the callback, or max_steps= to "
                "the trainer."
            )
        return early(max(1, length))

    def resumed(self, state: Mapping[str, Any], steps_per_epoch: Callable[[], int]) -> tuple[Mapping[str, Any], When]:
        """Return the state of a switch to load, and when to switch in a training that goes on.

        An epoch may have another number of steps than when the state was saved; the epochs that were left stay.
        """
        saved = _parse(state["when"])
        if self.when is not None or saved is None:
            return state, self.first(steps_per_epoch, 1)
        if self.epoch is None or state["done"]:
            return state, saved  # what was chosen stays
        when = AtEpoch(self.epoch, steps_per_epoch=steps_per_epoch())
        if not isinstance(saved, AtEpoch) or saved.epoch != when.epoch or saved == when:
            return state, when
        epochs_left = (state["next"] - state["step"]) / saved.steps_per_epoch
        following = state["step"] + max(1, math.ceil(epochs_left * when.steps_per_epoch))
        return {**state, "when": repr(when), "next": following}, when


def _parse(text: str) -> AtStep | AtEpoch | None:
    """Return the moment of a switch from its repr in a state; None for ``Settled``.

    >>> _parse("AtEpoch(epoch=1, steps_per_epoch=4)"), _parse("AtStep(step=10)"), _parse("Settled(every=1)")
    (AtEpoch(epoch=1, steps_per_epoch=4), AtStep(step=10), None)
    """
    numbers = [int(number) for number in re.findall(r"\w+=(\d+)", text)]
    if re.fullmatch(r"AtStep\(step=\d+\)", text):
        return AtStep(*numbers)
    if re.fullmatch(r"AtEpoch\(epoch=\d+, steps_per_epoch=\d+\)", text):
        return AtEpoch(numbers[0], steps_per_epoch=numbers[1])
    return None


def steps_per_epoch(batches: float, accumulated: int) -> int:
    """Return how many optimizer steps an epoch has; raise ModelError if the number of batches is infinite."""
    if not math.isfinite(batches):
        raise ModelError(
            "The training data has no length, so it is not known how many steps an epoch has. Pass when=tdfx.AtStep(...) in "
            "place of epoch=."
        )
    return math.ceil(batches / accumulated)
