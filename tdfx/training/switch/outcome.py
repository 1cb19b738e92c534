"""What becomes of the sites for which a plan was made, and which it keeps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from tdfx.plans.plan import Plan, Reason, SitePlan
from tdfx.training.switch.events import What
from tdfx.training.switch.watch import RankWatch


@dataclass(frozen=True, slots=True)
class Outcome:
    """Which of the sites that a plan keeps will be asked for again, and why."""

    asked: tuple[SitePlan, ...]
    """Those that are kept of the sites that the plan was made for."""
    waiting: tuple[str, ...] = ()
    """Those without signal, which are asked again by themselves."""
    spare: tuple[str, ...] = ()
    """Those that a budget does not need now, as long as others wait that may come to give less than it counts on."""

    @classmethod
    def of(cls, made: Plan, names: Collection[str] | None, watch: RankWatch | None, final: bool) -> Outcome:
        """Return what becomes of the kept sites.

        Args:
            made: The plan.
            names: The sites that it was made for; None for all.
            watch: The sites that waited until then, if there is any waiting.
            final: Whether nothing is asked again.
        """
        asked = tuple(one for one in made.kept if names is None or one.name in names)
        if final or names is None or watch is None:
            return cls(asked)
        waiting = tuple(one.name for one in asked if one.reason is Reason.NO_SIGNAL)
        others = [name for name in watch.sites if name not in names or name in waiting]
        return cls(asked, waiting, tuple(one.name for one in asked if one.reason is Reason.NOT_NEEDED and others))

    def told(self, known: Collection[str], *, tersely: bool) -> Iterator[tuple[What, Sequence[str], str]]:
        """Yield what there is to say of them.

        Args:
            known: Those of which it was said before that they are to spare.
            tersely: Whether only what shows no signal is news: what else is kept was left out from the start.
        """
        if self.waiting:
            yield "waiting", self.waiting, "no signal above the noise yet"
        if news := [name for name in self.spare if name not in known]:
            yield "waiting", news, "not needed beside what the others give; asked again with the next that settles"
        kept = [one for one in self.asked if one.name not in {*self.waiting, *self.spare}]
        for reason in dict.fromkeys(one.reason for one in kept if not tersely or one.reason is Reason.NO_SIGNAL):
            of = [one for one in kept if one.reason is reason]
            yield "kept", [one.name for one in of], f"{reason}" + (f": {of[0].note}" if of[0].note else "")
