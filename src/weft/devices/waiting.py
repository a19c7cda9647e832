"""A signal that comes while the user's code around a run is at work. Loaded when one comes."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

PATIENCE = 10.0  # seconds that a loop of the user's own has to come to the end of its step
_STARTS_OTHERS = {"sweeps", "recipes", "cli"}  # rooms whose frames stand below the user's code, not above it


def is_under_way(frame: FrameType | None) -> bool:
    """Whether a piece of a run is being executed: then it comes to a boundary by itself."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "").split(".")
        is_print = name[-1] == "streams"  # that of the user's code
        if name[0] == "weft" and len(name) > 1 and name[1] not in _STARTS_OTHERS and not is_print:
            return True
        frame = frame.f_back
    return False


def remind_later(interruption: Any) -> threading.Timer:
    """The user's code may be in the middle of a step, or wait for something: it has some time to end it."""

    def remind() -> None:
        interruption.overdue = True
        signal.pthread_kill(threading.main_thread().ident or 0, interruption.asked or signal.SIGTERM)

    alarm = threading.Timer(PATIENCE, remind)
    alarm.daemon = True
    alarm.start()
    return alarm
