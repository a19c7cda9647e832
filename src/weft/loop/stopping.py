"""Early stopping: the end of training, or of a phase, when the monitored metric has stopped improving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.events import Hook
from weft.step.history import is_better


class EarlyStopping(Hook):
    """Stops after `patience` validations in a row that did not improve the monitored metric by more than `min_delta`.

    The first `warmup` epochs do not count, and training goes on until `min_epochs`. A NaN is no improvement.
    Patience starts anew with each phase (whose own `patience` goes first), measured by what that phase itself reached,
    and with each fit.
    """

    def __init__(self, patience: int | None, min_delta: float = 0.0, warmup: int = 0, min_epochs: int = 0) -> None:
        self.patience, self.min_delta, self.warmup, self.min_epochs = patience, min_delta, warmup, min_epochs
        self.best: float | None = None
        self.bad_validations = 0
        self.phase = 0

    def on_fit_start(self, trainer: Any) -> None:
        if trainer.run.history.num_epochs:
            self.best = trainer.run.best.value
        self.phase = trainer.run.progress.phase

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        run = trainer.run
        patience = run.state.phase.patience or self.patience
        if run.progress.phase != self.phase:
            self.phase, self.bad_validations, self.best = run.progress.phase, 0, None
        monitor = run.state.epoch.monitor
        if monitor not in metrics:
            return  # not validated in this epoch
        if is_better(metrics[monitor], self.best, trainer.config.monitor_mode, by=self.min_delta):
            self.best, self.bad_validations = metrics[monitor], 0
        elif run.progress.epoch >= self.warmup:
            self.bad_validations += 1
        if patience is not None and self.bad_validations >= patience and run.progress.epoch + 1 >= self.min_epochs:
            run.state.end_phase("patience")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad_validations": self.bad_validations, "phase": self.phase}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.bad_validations = state_dict["best"], state_dict["bad_validations"]
        self.phase = state_dict["phase"]
