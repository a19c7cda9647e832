"""A phase: one stage of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.types import check_count


@dataclass(frozen=True)
class Phase:
    """One stage of a run. What is None stays as it was in the stage before.

    `epochs`: how many this phase lasts (>= 1). `data`: a `Data`, dataset or setup function used from here on.
    `freeze`: names of nodes or submodules (dotted) whose parameters do not train in this phase only.
    `weights`: weights of loss terms by name. `patience`: validations without improvement that end this phase,
    counted anew. `setup`: a function of the trainer, called when the phase begins (a longer rollout, say); a resumed
    run calls those of all phases up to its own again.

    A phase goes on from the weights as they are. There is one best over all phases: where weights, data or the rollout
    change what the loss measures, name a `monitor_metric` that means the same throughout.
    """

    epochs: int
    optimizer: Any = None
    scheduler: Any = None
    data: Any = None
    freeze: Sequence[str] = ()
    weights: Mapping[str, Any] | None = None
    patience: int | None = None
    setup: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        check_count("Phase", "epochs", self.epochs)
        check_count("Phase", "patience", self.patience, optional=True)
        if isinstance(self.freeze, str):
            raise TypeError(f"Phase: freeze={self.freeze!r}; expected a list of names.")
