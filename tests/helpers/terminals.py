"""Programs in a terminal of their own: what they show there, and keys that are pressed."""

from __future__ import annotations

import os
import pty
import select
import termios
import time

from tests.helpers.patience import patience


def start_in_terminal(*command: str) -> tuple[int, int]:
    """(process, terminal) of a command that runs in a terminal of its own."""
    process, master = pty.fork()
    if process == 0:
        termios.tcsetwinsize(0, (24, 200))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        os.execve(command[0], command, environment)
    return process, master


def read_terminal(master: int, until: str) -> str:
    """What a program wrote to its terminal until `until` appears in it, or the program ends."""
    text, deadline = "", time.monotonic() + patience()
    while until not in text and time.monotonic() < deadline:
        if select.select([master], [], [], 0.5)[0]:
            try:
                text += os.read(master, 65536).decode(errors="replace")
            except OSError:  # the program ended
                break
    return text
