"""A phase: one stage of a run. A schedule: a scheduler and when it steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weft.config import Count, check


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
    until: Any = None

    def __post_init__(self) -> None:
        check(self)
        if self.until is not None:
            from weft.step.until import Until

            object.__setattr__(self, "until", Until.of(self.until))


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
