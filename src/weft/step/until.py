"""What ends a phase before its epochs are over; `weft.loop.until` looks after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weft.config import Count, Positive, Time, check, complaints, parse_time


@dataclass(frozen=True)
class Until:
    """What ends a phase before its epochs are over: whichever comes first. What is None ends nothing.

    `target`: the monitored metric is at least as good. `plateau`: over so many validations (>= 1) its best got better
    by less than a share `gain` of what it was: 0.1, a tenth. `time`: seconds (> 0) in this phase, or "DD:HH:MM:SS".
    """

    target: float | None = None
    plateau: Count | None = None
    gain: Positive = 0.1
    time: Positive | Time | None = None

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def of(cls, given: Any) -> Until:
        """From one, or from its fields as a dict. TypeError for anything else, ValueError for wrong words."""
        if not isinstance(given, Until | dict):
            raise TypeError(f"Phase(until=...) is a weft.Until or a dict of its fields; got {given!r}.")
        if isinstance(given, dict) and (wrong := complaints(cls, given)):
            raise ValueError(f"Phase(until={given}): {'; '.join(wrong)}")
        return given if isinstance(given, Until) else cls(**given)

    @property
    def seconds(self) -> float | None:
        """`time` in seconds."""
        return parse_time(self.time) if isinstance(self.time, str) else self.time

    @property
    def watches(self) -> bool:
        """Whether it looks at the monitored metric."""
        return self.target is not None or self.plateau is not None
