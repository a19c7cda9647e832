"""Checkpoints written by a thread of their own while training goes on. Loaded where that is asked for."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from weft.checkpoint.archive import plain
from weft.checkpoint.folder import save, step_path


class BackgroundWriter:
    """Saves checkpoints while the next steps run, with the same guarantees as `save`.

        writer = BackgroundWriter()
        writer.save(folder, step, state)     # copies the tensors, then returns
        writer.wait()                        # at the end: the last file is there, or its error is raised

    One save is in flight; the next one waits for it. An error of the writing thread is raised, once, by the next `save`
    or `wait`. The interpreter does not exit before the thread is done.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copies: dict[str, Any] = {}
        """The tensors of the last save on the CPU, written over by the next: new memory costs more than copying."""

    def save(
        self, folder: str | os.PathLike[str], step: int, state: Mapping[str, Any], *, keep: int = 2, best: bool = False
    ) -> Path:
        """The path that the checkpoint will have; see `save`. What cannot be loaded safely raises here and now."""
        self.wait()
        take = _copied(state, self._copies)

        def run() -> None:
            try:
                save(folder, step, take(), keep=keep, best=best)
            except BaseException as error:  # noqa: BLE001, carried to the training thread
                self._error = error

        self._thread = threading.Thread(target=run, name="weft-checkpoint", daemon=False)
        self._thread.start()
        return step_path(folder, step)

    def wait(self) -> None:
        """Return when the save in flight is on the disk; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _copied(state: Mapping[str, Any], copies: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """A function that gives, in another thread, a copy of `state` as it is now, on the CPU.

    What is on a GPU is copied there, if there is room, which takes a thousandth of the time of the way to the CPU; that
    it goes later, on a stream of its own, so that no step queues behind it.
    """
    if torch.cuda.is_initialized():
        with contextlib.suppress(torch.OutOfMemoryError):
            kept, device = [plain(state, clone="there")], torch.cuda.current_device()
            ready = torch.cuda.current_stream(device).record_event()

            def take() -> dict[str, Any]:
                with torch.cuda.stream(torch.cuda.Stream(device)):
                    torch.cuda.current_stream(device).wait_event(ready)
                    return plain(
                        kept.pop(), clone="cpu", kept=copies
                    )  # each waits for its own copy; then the GPU's are free

            return take
    on_cpu = plain(state, clone="cpu", kept=copies)
    return lambda: on_cpu
