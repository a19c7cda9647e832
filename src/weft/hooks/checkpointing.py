"""Checkpoints: when they are written. What is in them and how they are written is not decided here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from weft.config import CheckpointConfig
from weft.events import Hook
from weft.saving import save_at_error


class Checkpointing(Hook):
    """Saves after every n steps, epochs or seconds, whenever the monitored metric improved, at a signal and at the end.

    An epoch that ends at the step of an earlier save is saved again under the same name: the later state holds. After an
    error it writes `exception.ckpt`, in each process for itself. A disk that fails ends the training with the error.
    `clock` gives seconds.
    """

    def __init__(self, config: CheckpointConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self._clock = config, clock

    def on_fit_start(self, trainer: Any) -> None:
        """Nothing is due yet."""
        self._seen = self._saved = trainer.run.progress.place
        self._saved_at = self._clock()

    def at_rest(self, trainer: Any) -> None:
        """Save if it is time to, and not this very state already."""
        run, seconds = trainer.run, self.config.every_n_seconds
        seen, self._seen = self._seen, run.progress.place
        by_clock = run.processes.due("save", seconds is not None and self._clock() - self._saved_at >= seconds)
        is_new = self._seen != self._saved or (run.ending and run.stop_reason is not None)
        if is_new and (by_clock or run.leaving or run.ending or self._is_due(run, seen)):
            run.save()
            self._saved, self._saved_at = run.progress.place, self._clock()

    def _is_due(self, run: Any, seen: tuple[int, int, int]) -> bool:
        config, step, epoch = self.config, run.progress.step, run.progress.epoch
        if config.every_n_steps and step // config.every_n_steps != seen[0] // config.every_n_steps:
            return True
        return epoch != seen[1] and bool((config.epochs and epoch % config.epochs == 0) or (config.best and run.improved))

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        """Write down what there is; if that fails too, the error carries a note."""
        if not trainer.run.begun:
            return
        try:
            save_at_error(trainer.run, error)
        except Exception as second:  # noqa: BLE001, the first error is the one to raise
            error.add_note(f"No checkpoint was written at this error: {type(second).__name__}: {second}")
