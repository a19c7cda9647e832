"""A stdout or stderr that is gone is replaced by nothing, on the level of the system.

So what waits in a buffer is no error when the interpreter exits. Loaded when a write has failed.
"""

from __future__ import annotations

import os
import select
import sys


def silence() -> None:
    """Send what goes to a stdout or stderr that is gone to nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
            found = select.poll()
            found.register(number, 0)
            gone = any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in found.poll(0))
        except (AttributeError, OSError, ValueError):  # no file, or a system without poll
            continue
        if gone:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
