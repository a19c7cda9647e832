"""Worker processes of a DataLoader that outlive a signal to their whole group.

Terminals, SLURM and notebooks signal every process of a job. The main one finishes its step, for which it needs its
workers; if they died first, the loader would raise there, in the middle of anything. So they ignore what the main
process heeds, and end when it drops the loader, or with it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import DataLoader

from weft.devices.signals import SIGNALS


def iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """`iter(loader)`, whose workers, of any start method, ignore the signals that end a run."""
    if os.name == "nt":
        return iter(loader)
    resource_tracker.ensure_running()  # which in Python 3.11 unblocks two signals when it starts
    before, init = set(multiprocessing.active_children()), loader.worker_init_fn
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited: also a spawned one begins with it
    try:
        loader.worker_init_fn = partial(_ignore_signals, init)
        return iter(loader)
    finally:
        loader.worker_init_fn = init
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        started = [*set(multiprocessing.active_children()) - before]
        _STARTED[os.getpid()] = [w for w in _STARTED.get(os.getpid(), []) if w.is_alive()] + started


def _ignore_signals(init: Callable[[int], None] | None, number: int) -> None:
    """What a worker does first. A function, because programs that it starts would inherit SIG_IGN."""
    for one in SIGNALS:
        signal.signal(one, _nothing)
        signal.siginterrupt(one, False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if init is not None:
        init(number)


def _nothing(number: int, frame: Any) -> None:
    """Go on."""


_STARTED: dict[int, list[Any]] = {}
"""By the process that started them; a forked one has none of its parent's."""


@atexit.register  # before that of multiprocessing, which would send them SIGTERM and wait
def _end_workers() -> None:
    """End the workers that are left when the interpreter exits: persistent ones, and one that hangs."""
    if left := [worker for worker in _STARTED.get(os.getpid(), []) if worker.is_alive()]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler calls it an error
        for worker in left:
            worker.kill()
