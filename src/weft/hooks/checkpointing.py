"""Checkpoints: when they are written. What is in them and how they are written is not decided here."""

from __future__ import annotations

import time
from typing import Any

from weft.config import CheckpointConfig
from weft.events import Hook


class Checkpointing(Hook):
    """Saves after every n steps, epochs or seconds, and whenever the monitored metric improved."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self.step = self.epoch = 0
        self.saved_at = time.monotonic()

    def on_fit_start(self, trainer: Any) -> None:
        self.step, self.epoch = trainer.run.progress.step, trainer.run.progress.epoch

    def at_rest(self, trainer: Any) -> None:
        run, config = trainer.run, self.config
        step, epoch = run.progress.step, run.progress.epoch
        closed = epoch != self.epoch
        due = (
            (config.every_n_steps and step != self.step and step % config.every_n_steps == 0)
            or (config.epochs and closed and epoch % config.epochs == 0)
            or run.processes.due("save", bool(config.every_n_seconds and time.monotonic() - self.saved_at >= config.every_n_seconds))
            or (config.best and closed and run.improved)
        )
        self.step, self.epoch = step, epoch
        if due:
            run.save()
            self.saved_at = time.monotonic()
