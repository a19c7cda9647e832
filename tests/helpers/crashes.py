"""Processes that die, writes that are torn and interrupts that come at a chosen moment of a save."""

from __future__ import annotations

import io
import os
import shutil
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def state_of_step(step: int, numbers: int = 300) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "problem": {"w": torch.randn(numbers, generator=generator)}, "note": "a" * step}


def in_child(body: Callable[[], None]) -> int:
    """The exit code of a forked process that runs `body`: 0, 99 for an exception, minus the signal if killed."""
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:  # noqa: BLE001, reported by the exit code
            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


IO_CALLS = {"open", "write", "flush", "fsync", "__exit__", "close", "replace", "unlink", "mkdir", "scandir"}


@contextmanager
def interrupted_at(number: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """Calls `act` at the `number`-th moment just before or just after a call of the operating system or a file.

    A write is torn: half-written bytes are on the disk at that moment. Gives the list of moments so far.
    """
    moments: list[str] = []

    def profile(frame: Any, event: str, function: Any) -> None:
        name = getattr(function, "__name__", "")
        on_disk = isinstance(
            getattr(function, "__self__", None), (io.BufferedWriter, io.BufferedReader, types.ModuleType)
        )
        if event not in ("c_call", "c_return") or name not in IO_CALLS or not on_disk:
            return
        moments.append(f"{event} {name}")
        if len(moments) == number:
            if event == "c_call" and name == "write" and isinstance(function.__self__, io.BufferedWriter):
                function.__self__.write(b"PK\x03\x04 torn")
                function.__self__.flush()
            sys.setprofile(None)
            act()

    sys.setprofile(profile)
    try:
        yield moments
    finally:
        sys.setprofile(None)


def die_at_every_moment(template: Path, action: Callable[[Path], None], check: Callable[[Path], bool]) -> list[bool]:
    """What `check` says of a copy of the folder after a process died at the 1st, 2nd, ... moment of `action`."""
    counted = template.with_name("counted")
    shutil.copytree(template, counted)
    with interrupted_at(0, lambda: None) as moments:
        action(counted)
    results = []
    for number in range(1, len(moments) + 1):
        folder = template.with_name(f"died-{number}")
        shutil.copytree(template, folder)

        def body(folder: Path = folder, number: int = number) -> None:
            with interrupted_at(number, lambda: os._exit(77)):
                action(folder)

        assert in_child(body) == 77
        results.append(check(folder))
        shutil.rmtree(folder)
    return results
