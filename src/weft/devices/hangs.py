"""Which process hangs, and where: each of several writes down where it is before the others give up waiting for it.

A timer of the interpreter, which needs neither its lock nor another thread's help, writes the stack of a process that
has asked the others for nothing for most of their patience. Each time it does ask, the timer starts anew.
"""

from __future__ import annotations

import faulthandler
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SHARE = 0.7  # of the patience of the others, after which a silent process writes down where it is
_WEFT = str(Path(__file__).parents[1])
_HEAD = 120  # characters of the first line, which is written over at each collective: 1 us
_FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')


class HangWatch:
    """Keeps `hang/rank-<n>.txt` in the folder of a run: step, last collective and, if it comes to that, the stack."""

    def __init__(self, folder: Path, rank: int, patience: float, step: Callable[[], int]) -> None:
        self.folder, self.rank, self._step = folder / "hang", rank, step
        self._seconds, self._every, self._armed = SHARE * patience, patience / 20, float("-inf")
        self._keep, self._began = False, time.time()
        self.folder.mkdir(exist_ok=True)
        self._path = self.folder / f"rank-{rank}.txt"
        self._file = open(self._path, "wb", buffering=0)  # noqa: SIM115, kept for the timer
        self.mark("start")

    def mark(self, collective: str) -> None:
        """This process asks the others for something."""
        if self._file.closed:
            return
        main = threading.main_thread().ident or 0
        head = f"rank {self.rank}, step {self._step()}, last collective {collective}, thread 0x{main:016x}"
        with suppress(OSError, AttributeError):  # a disk that is full or away ends no training; not on Windows
            os.pwrite(self._file.fileno(), f"{head:<{_HEAD}}\n".encode(), 0)
        now = time.monotonic()
        if now - self._armed >= self._every:  # a timer is a thread
            self._armed = now
            with suppress(OSError):
                self._file.truncate(self._file.seek(_HEAD + 1))
            faulthandler.dump_traceback_later(self._seconds, file=self._file)

    def found(self) -> str:
        """Which processes did not come, and where each was, in words; "" if none has written that down."""
        silent = []
        for path in sorted(self.folder.glob("rank-*.txt")):
            if path.stat().st_mtime < self._began - 60:  # of a run before
                continue
            head, _, stack = path.read_text(encoding="utf-8", errors="replace").partition("\n")
            self._keep = self._keep or bool(stack)
            known = re.match(r"rank (\d+), step (\d+), last collective (\w+), thread (0x\w+)", head)
            if known is None or int(known[1]) == self.rank or not stack:
                continue
            own = next((part for part in stack.split("\n\n") if known[4] in part), stack)
            frames = _FRAME.findall(own)
            if any("distributed_c10d" in file for file, _, _ in frames):
                continue  # it waits, too
            of_users = (
                [f for f in frames if "/torch/" not in f[0] and not f[0].startswith(_WEFT)]
                or frames
                or [("?", "0", "?")]
            )
            file, line, name = of_users[0]
            silent.append(f"Process {known[1]} was at {file}, line {line}, in {name}, in or after step {known[2]}")
        return f" {'. '.join(silent)}. The stacks of all are in {self.folder}." if silent else ""

    def close(self) -> None:
        """The run is over: nothing is left behind, unless it told something."""
        if self._file.closed:
            return
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._keep:
            with suppress(OSError):
                self._path.unlink()
                self.folder.rmdir()
