"""What can be read of a ``Switch``: how far it has counted, what it has decided, and what that took."""

from __future__ import annotations

from tdfx.plans.plan import Plan
from tdfx.training.switch.collect import Collection
from tdfx.training.switch.state import SwitchEvent, SwitchState
from tdfx.training.switch.when import When


class SwitchStatus:
    """The part of a ``Switch`` that is only read."""

    when: When
    _state: SwitchState
    _collection: Collection
    _spent: dict[str, float]

    @property
    def spent(self) -> dict[str, float]:
        """Seconds spent in this process so far: ``"watching"`` ranks, ``"planning"``, and ``"rewriting"``."""
        return dict(self._spent)

    @property
    def steps(self) -> int:
        """Steps counted so far."""
        return self._state.step

    @property
    def done(self) -> bool:
        """True once the decision is made, and nothing will be switched any more."""
        return self._state.done

    @property
    def collecting(self) -> bool:
        """True while hooks on the model collect moments."""
        return self._collection.is_attached

    @property
    def due(self) -> bool:
        """True if the next call of ``step`` decides something."""
        return not self.done and self.steps + 1 >= self._state.next

    @property
    def plan(self) -> Plan | None:
        """The plan of what was switched, from the dense model; None as long as nothing was."""
        return self._state.plan

    @property
    def events(self) -> tuple[SwitchEvent, ...]:
        """The decisions so far, earliest first."""
        return self._state.events

    def __str__(self) -> str:
        head = f"Switch(when={self.when!r}): {self.steps} steps, {'done' if self.done else 'waiting'}"
        return "\n".join([head, *(f"  {event}" for event in self.events)])
