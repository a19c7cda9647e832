"""Interruption by Ctrl-C: a flag that is read between steps, so that no step is torn."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interruption:
    """Whether Ctrl-C was pressed since the last look. A second one before that interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within: Ctrl-C sets the flag. The handler before is restored. Only in the main thread (else: nothing)."""
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or before is None:
            yield
            return

        def on_interrupt(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def check(self) -> None:
        """Raise KeyboardInterrupt if it was asked for."""
        if self.asked:
            self.asked = False
            raise KeyboardInterrupt


def interactive() -> bool:
    """Whether this is an interactive interpreter (a notebook, a prompt), where an interruption returns a result."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)
