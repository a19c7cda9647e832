"""What a process does once it is one of several: wait for the others no longer than it may, and leave when they do."""

from __future__ import annotations

import atexit
import os
import subprocess
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning.fabric import Fabric

WATCH = "weft-watch-parent"


def join(fabric: Fabric, timeout: float | None, was_there: bool) -> None:
    """From here on a process waits for another one for at most `timeout` seconds, and ends after the script's first.

    `was_there`: `fabric` had its processes already.
    """
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment

    _limit_waiting(fabric, timeout)
    if was_there:
        return
    if fabric.world_size > 1:
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)  # else a process may abort when it ends after the first one
    if fabric.local_rank and os.environ.get("LOCAL_RANK") and isinstance(_environment(fabric), LightningEnvironment):
        _end_after_parent(timeout)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _environment(fabric: Fabric) -> Any:
    return getattr(fabric.strategy, "cluster_environment", None)


def _end_after_parent(timeout: float | None) -> None:
    """End this process, which the script's first one started, some time after that one ended without it.

    Fabric's first process ends the others when one of them fails; nobody would end a hanging one when the first fails.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(timeout if timeout is not None else 1800.0)
        os._exit(1)

    if not any(thread.name == WATCH for thread in threading.enumerate()):
        threading.Thread(target=watch, name=WATCH, daemon=True).start()


def _limit_waiting(fabric: Fabric, timeout: float | None) -> None:
    if timeout is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        mesh = getattr(fabric.strategy, "_device_mesh", None)  # of a problem in shards: it has groups of its own
        for group in (None, *(mesh.get_all_groups() if mesh is not None else ())):
            torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)


def let_others_end(fabric: Fabric) -> None:
    """Wait for the processes that this script started, which leave because of a signal, too.

    Fabric's watcher would take that for a failure, and kill this one. It watches the list that is emptied here.
    """
    started = getattr(getattr(fabric.strategy, "launcher", None), "procs", None) or []
    others, started[:] = list(started), []
    for process in others:
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
