"""Interruption by signals: a flag that is read between steps, so that no step is torn.

SIGTERM, SIGUSR1 and SIGXCPU (a cluster takes the machine back), SIGHUP (the terminal is gone) and SIGINT (Ctrl-C) set
it; at the next boundary of a step the run saves, if it writes checkpoints, and leaves. Where code of the user's own
runs between two pieces of a run (`with trainer.start(...)`), there is no boundary to wait for: it acts at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGXCPU") if hasattr(signal, n)]
PATIENCE = 10.0  # seconds that a loop of the user's own has to come to the end of its step
ECHO = 0.0
"""Seconds within which two Ctrl-C are one. In launched processes 1.0: the terminal's, and what is handed on of it."""
_STARTS_OTHERS = {"sweeps", "recipes", "cli"}  # rooms whose frames stand below the user's code, not above it


class SignalExit(SystemExit):
    """Leaves the process because of the signal `number`, with exit status 128 + number (143 for SIGTERM)."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = signal.Signals(number)

    def __reduce__(self) -> Any:  # from a launched process to the one that waits for it
        return SignalExit, (int(self.number),)


class Interruption:
    """Which signal asked the run to end, 0 if none did."""

    def __init__(self) -> None:
        self.asked = 0
        self.between: Callable[[], None] | None = None
        """What leaves the run where code around it is at work, unless that may be in the middle of a step."""
        self._held = self._overdue = False
        self._heard = float("-inf")
        self._alarm: threading.Timer | None = None

    @contextmanager
    def caught(self, at_once: bool = False) -> Iterator[None]:
        """Within: the SIGNALS set `asked`. The handlers before are restored.

        A second Ctrl-C before the step is over interrupts at once. Only in the main thread, and only signals that
        nobody else handles: a handler that you have installed stays in force. `at_once`: there is nothing to finish.
        """
        with handled_by(partial(self._heed, at_once)):
            try:
                yield
            finally:
                self.between = None
                self._forget_alarm()

    def _heed(self, at_once: bool, number: int, frame: FrameType | None) -> None:
        """What a signal does, in the main thread, where `frame` was being run."""
        if self._overdue:  # the alarm's own: see `_wait_for_the_step`
            self._overdue = False
            if self.asked and not _is_under_way(frame):
                self.leave(self.asked)
            return
        if number == signal.SIGINT:
            if time.monotonic() - self._heard < ECHO:
                return
            self._heard = time.monotonic()
        if number == signal.SIGINT and self.asked == number and not self._held:
            raise KeyboardInterrupt
        if number != signal.SIGINT or not self.asked:  # SIGTERM goes before a Ctrl-C
            self.asked = number
        if at_once:
            self.leave(number)
        if self.between is not None and not self._held and not _is_under_way(frame):
            self.between()
            self._wait_for_the_step()

    def _wait_for_the_step(self) -> None:
        """The user's code may be in the middle of a step, or wait for something: it has some time to end it."""

        def remind() -> None:
            self._overdue = True
            signal.pthread_kill(threading.main_thread().ident or 0, self.asked or signal.SIGTERM)

        if self._alarm is None:
            self._alarm = threading.Timer(PATIENCE, remind)
            self._alarm.daemon = True
            self._alarm.start()

    def _forget_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm.join()
            self._alarm = None

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
        raise KeyboardInterrupt if number == signal.SIGINT else SignalExit(number)


@contextmanager
def handled_by(heed: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within: `heed` is called at the SIGNALS that nobody else handles. Nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = {number: handler for number, handler in before.items() if _is_free(handler)}

    def on_signal(number: int, frame: FrameType | None) -> None:
        heed(number, frame)

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


def _is_under_way(frame: FrameType | None) -> bool:
    """Whether a piece of a run is being executed: then it comes to a boundary by itself."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "").split(".")
        if name[0] == "weft" and len(name) > 1 and name[1] not in _STARTS_OTHERS:
            return True
        frame = frame.f_back
    return False


_REPLACED: list[dict[int, Any]] = []
"""The handlers that the fits under way replaced, of the outermost one first."""


_MASKS: list[Any] = []


def _before_fork() -> None:
    if _REPLACED:  # a signal to a child that still has our handlers would be lost
        _MASKS.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def _after_fork() -> None:
    if _MASKS:
        signal.pthread_sigmask(signal.SIG_SETMASK, _MASKS.pop())


def _in_child() -> None:
    """A forked child (of a pool) ends at signals as it would without a fit around it.

    A worker of a loader does not: it begins with them blocked, and ignores them (`weft.data.workers`).
    """
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
