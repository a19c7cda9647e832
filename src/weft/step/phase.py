"""A phase: one stage of a run. A schedule: a scheduler and when it steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weft.config import Count, Positive, Time, check, parse_time


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

    @property
    def seconds(self) -> float | None:
        """`time` in seconds."""
        return parse_time(self.time) if isinstance(self.time, str) else self.time

    @property
    def watches(self) -> bool:
        """Whether it looks at the monitored metric."""
        return self.target is not None or self.plateau is not None


@dataclass(frozen=True)
class Phase:
    """One stage of a run. What is None stays as it was in the stage before.

    `epochs`: how many this phase lasts (>= 1). `data`: a `Data`, dataset or setup function used from here on.
    `freeze`: names of nodes or submodules (dotted) whose parameters do not train in this phase only.
    `weights`: weights of loss terms by name. `patience`: validations without improvement that end this phase,
    counted anew. `setup`: a function of the trainer, called when the phase begins (a longer rollout, say); a resumed
    run calls those of all phases up to its own again. `until`: a `weft.Until`, or its fields as a dict, that may end
    the phase before its epochs are over (`until={"plateau": 200}`).

    A phase goes on from the weights as they are. There is one best over all phases: where weights, data or the rollout
    change what the loss measures, name a `monitor_metric` that means the same throughout.
    """

    epochs: Count
    optimizer: Any = None
    scheduler: Any = None
    data: Any = None
    freeze: Sequence[str] = ()
    weights: Mapping[str, Any] | None = None
    patience: Count | None = None
    setup: Callable[[Any], Any] | None = None
    until: Until | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check(self)
        if isinstance(self.until, dict):
            object.__setattr__(self, "until", Until(**self.until))

    @property
    def ending(self) -> Until:
        """What ends it early."""
        return self.until if isinstance(self.until, Until) else Until()


@dataclass(frozen=True)
class Schedule:
    """A scheduler and when it steps.

    `factory`: a function of the optimizer, or a scheduler instance. `interval`: "epoch" or "step" (optimizer steps).
    `monitor`: the metric given to schedulers that want one (ReduceLROnPlateau); None: the run's monitored metric.
    """

    factory: Any
    interval: Literal["epoch", "step"] = "epoch"
    monitor: str | None = None
    frequency: Count = 1
    """Step at every n-th interval (>= 1)."""

    def __post_init__(self) -> None:
        check(self)
