"""Leaving in time: a run whose steps are long must stop before SLURM's signal, which comes minutes before the end."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from weft.devices.requeue import told_of
from weft.events import Hook
from weft.loop.default_hooks import OF_THIS_PROCESS


class LeaveInTime(Hook):
    """Ends the run as the signal would, if the next step and save could last until `leave_by` (Unix time).

    The slowest step so far is what the next one may take: from the end of one to the end of the next, with all that
    comes between (a save, an evaluation).
    """

    def __init__(self, leave_by: float, clock: Callable[[], float] = time.time) -> None:
        self._leave_by, self._clock = leave_by, clock

    def on_fit_start(self, trainer: Any) -> None:
        """No step has been measured."""
        self._slowest, self._last = 0.0, self._clock()

    def on_step_end(self, trainer: Any, batch: Any, loss: Any) -> None:
        """Measure, and look whether there is time for another one."""
        now = self._clock()
        self._slowest, self._last = max(self._slowest, now - self._last), now
        if now + self._slowest > self._leave_by:
            trainer.run.state.control.interruption.asked = signal.SIGUSR1


def leave_in_time(grace: int) -> None:
    """From here on all runs of this process leave `grace` seconds, a step and a save before their job's time limit."""
    end = told_of(os.environ.get("SLURM_JOB_ID", "")).get("EndTime", "")
    try:
        leave_by = datetime.fromisoformat(end).timestamp() - grace
    except ValueError:  # no limit, or no answer
        leave_by = math.inf
    if leave_by < math.inf:
        OF_THIS_PROCESS.append(lambda: LeaveInTime(leave_by))
