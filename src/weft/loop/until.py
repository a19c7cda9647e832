"""Phases that end by themselves: at a target, on a plateau, after a time (`weft.Until`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from weft.events import Hook
from weft.step.history import is_better
from weft.step.until import Until


class Ending(Hook):
    """Ends the phase in force as its `until` says; the stop reason of the last phase is what ended it."""

    def __init__(self) -> None:
        self.phase, self.began = 0, 0.0
        self.best: list[float] = []
        """The best of the phase after each of its last validations, the oldest first."""

    def on_fit_start(self, trainer: Any) -> None:
        self._begin(trainer.run.state)

    def _begin(self, state: Any) -> None:
        self.phase, self.began, self.best = state.progress.phase, state.seconds, []

    def on_epoch_start(self, trainer: Any) -> None:
        if trainer.run.progress.phase != self.phase:
            self._begin(trainer.run.state)

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        state = trainer.run.state
        until = state.phase.until or Until()
        value = metrics.get(state.epoch.monitor or "")
        if value is not None and until.watches:
            reason = self._of_metric(until, value, trainer.config.monitor_mode)
            if reason:
                state.end_phase(reason)
        late = until.seconds is not None and state.seconds - self.began >= until.seconds
        if until.seconds is not None and state.processes.due("until", late):
            state.end_phase("time")

    def _of_metric(self, until: Until, value: float, mode: str) -> str:
        before = self.best[-1] if self.best else math.nan
        now = value if math.isnan(before) or is_better(value, before, mode) else before
        self.best.append(now)
        if until.target is not None and not (math.isnan(now) or is_better(until.target, now, mode)):
            return "target"
        if until.plateau is None or len(self.best) <= until.plateau:
            del self.best[: -(until.plateau or 1)]
            return ""
        old = self.best.pop(0)
        return "" if is_better(now, old, mode, by=until.gain * abs(old)) else "plateau"

    def state_dict(self) -> dict[str, Any]:
        return {"phase": self.phase, "began": self.began, "best": list(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.phase, self.began, self.best = state_dict["phase"], state_dict["began"], list(state_dict["best"])
