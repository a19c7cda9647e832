"""How long to wait for what must come: measured on this machine in this run, because it may be busy.

Such a limit only keeps a test that hangs from hanging for ever; what is waited for is the event itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def _age() -> float:
    """Seconds since this process began (where there is no /proc: those that it computed)."""
    try:
        began = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return time.process_time()
    import os

    return uptime - began / os.sysconf("SC_CLK_TCK")


START = _age()
"""What starting python, pytest and torch took here: about 4 s on a machine that has nothing else to do."""


def patience(at_least: float = 600.0, undisturbed: float | None = None) -> float:
    """Seconds to wait at most: 100 starts of a process, or 20 times what the `undisturbed` work took in this run."""
    return max(at_least, 100 * START if undisturbed is None else 20 * undisturbed)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What `call` returns, and the seconds that it took."""
    began = time.monotonic()
    return call(), time.monotonic() - began
