"""A phase: one stage of a run. A schedule: a scheduler and when it steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weft.config import Count, check, with_manual


@with_manual
@dataclass(frozen=True)
class Phase:
    """One stage of a run. What is None stays as it was in the stage before.

    A phase goes on from the weights as they are. There is one best over all phases: where weights, data or the rollout
    change what the loss measures, name a `monitor_metric` that means the same throughout.
    """

    epochs: Count
    """How many this phase lasts (>= 1)."""
    optimizer: Any = None
    """An instance, a function of the parameters, or a dict of them by name."""
    scheduler: Any = None
    """A function of the optimizer, a `Schedule`, or a dict of them by optimizer name."""
    data: Any = None
    """A `Data`, dataset or setup function used from here on."""
    freeze: Sequence[str] = ()
    """Names of nodes or submodules (dotted) whose parameters do not train in this phase only."""
    weights: Mapping[str, Any] | None = None
    """Weights of loss terms by name."""
    patience: Count | None = None
    """Validations without improvement that end this phase (>= 1), counted anew."""
    setup: Callable[[Any], Any] | None = None
    """Called with the trainer when the phase begins (a longer rollout, say); a resumed run calls those before, too."""
    until: Any = None
    """A `weft.Until`, or its fields as a dict ({"plateau": 200}), that may end the phase before its epochs are over."""

    def __post_init__(self) -> None:
        check(self)
        if self.until is not None:
            from weft.step.until import Until

            object.__setattr__(self, "until", Until.of(self.until))


@with_manual
@dataclass(frozen=True)
class Schedule:
    """A scheduler and when it steps."""

    factory: Any
    """A function of the optimizer, or a scheduler instance."""
    interval: Literal["epoch", "step"] = "epoch"
    """At the end of "epoch"s, or at each "step" of the optimizer."""
    monitor: str | None = None
    """The metric given to schedulers that want one (ReduceLROnPlateau); None: the run's monitored metric."""
    frequency: Count = 1
    """Step at every n-th interval (>= 1)."""

    def __post_init__(self) -> None:
        check(self)
