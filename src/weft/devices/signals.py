"""Interruption by signals: a flag that is read between steps, so that no step is torn.

SIGTERM and SIGUSR1 (a cluster takes the machine back) and SIGINT (Ctrl-C) set it; at the next boundary of a step the
run saves, if it writes checkpoints, and leaves.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class SignalExit(SystemExit):
    """Leaves the process because of the signal `number`, with exit status 128 + number (143 for SIGTERM)."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = signal.Signals(number)

    def requeue(self, is_saved: bool) -> None:
        """Ask SLURM to put this job back into its queue: what SIGUSR1 (`sbatch --signal=USR1@60`) means there.

        Nothing for other signals and outside SLURM. Warns if nothing was saved (it would start over again and again),
        and with SLURM's own words if it refuses.
        """
        job = os.environ.get("SLURM_JOB_ID")
        if self.number.name != "SIGUSR1" or job is None:
            return
        if "SLURM_ARRAY_JOB_ID" in os.environ and "SLURM_ARRAY_TASK_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        failure = "it writes no checkpoints to go on from" if not is_saved else _scontrol_requeue(job)
        if failure:
            warnings.warn(f"SLURM job {job} was not requeued: {failure}.", stacklevel=2)


def _scontrol_requeue(job: str) -> str:
    """Requeue the job; returns why it failed, "" if it did not."""
    if not re.fullmatch(r"[0-9_]+", job):
        return "its number is none"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"scontrol ended with {done.returncode}"


class Interruption:
    """Which signal asked the run to end, 0 if none did."""

    def __init__(self) -> None:
        self.asked = 0
        self._held = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within: SIGINT, SIGTERM and SIGUSR1 set `asked`. The handlers before are restored.

        A second Ctrl-C before the step is over interrupts at once. Only in the main thread, and only signals that
        nobody
        else handles: a handler that you have installed stays in force.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        ours = {number: handler for number, handler in before.items() if _is_free(handler)}

        def on_signal(number: int, frame: Any) -> None:
            if number == signal.SIGINT and self.asked == number and not self._held:
                raise KeyboardInterrupt
            elif number != signal.SIGINT or not self.asked:  # SIGTERM goes before a Ctrl-C
                self.asked = number

        on_signal.is_of_weft = True  # type: ignore[attr-defined]
        try:
            _REPLACED.append(ours)
            for number in ours:
                signal.signal(number, on_signal)
            yield
        finally:
            _REPLACED.pop()
            for number, handler in ours.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within: a second Ctrl-C only sets the flag too. For writing a checkpoint."""
        was, self._held = self._held, True
        try:
            yield
        finally:
            self._held = was

    def leave(self, number: int) -> None:
        """Raise what the signal means: KeyboardInterrupt for Ctrl-C, SignalExit for the others."""
        self.asked = 0
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SignalExit(number)


_REPLACED: list[dict[int, Any]] = []
"""The handlers that the fits under way replaced, of the outermost one first."""


def _before_fork() -> None:
    if _REPLACED:  # a signal to a child that still has our handlers would be lost
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_fork() -> None:
    if _REPLACED:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _in_child() -> None:
    """A forked child (a worker of a loader, of a pool) ends at signals as it would without a fit around it."""
    replaced = [item for handlers in reversed(_REPLACED) for item in handlers.items()]
    for number, handler in replaced:
        signal.signal(number, handler)
    _after_fork()
    _REPLACED.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


def _is_free(handler: Any) -> bool:
    """Whether nobody but python, the system, or an outer fit handles the signal."""
    return handler in (signal.SIG_DFL, signal.default_int_handler) or hasattr(handler, "is_of_weft")


def interactive() -> bool:
    """Whether this is an interactive interpreter (a notebook, a prompt), where an interruption returns a result."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)
