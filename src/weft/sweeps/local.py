"""The workers of a sweep as processes on this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from weft.devices.signals import SignalExit, handled_by
from weft.sweeps.study import Study
from weft.sweeps.worker import Worker

POLL = 0.05  # seconds between two looks at the workers
MOST_DEATHS = 5  # of each worker, with nothing finished in between
PATIENCE = 20.0  # seconds that a worker has to save what it is at


def run_here(study: Study) -> None:
    """Start workers, and put another in the place of one that died, until all trials are done.

    Raises RuntimeError if too many trials failed, or if a worker dies before it has a trial.
    """
    count = study.config.workers
    workers: list[Worker] = []
    with _ended_by_signals():
        try:
            workers = [Worker(i, count, study.folder) for i in range(count)]
            last_words = _watch(study, workers)
        finally:
            _end(workers)
    if study.too_many_failures():
        errors = study.errors()
        log = f"\nThe end of the log of the last worker that died:\n{last_words}" if last_words else ""
        raise RuntimeError(f"{len(errors)} trials failed; the first said:\n{errors[0]}{log}")


def _watch(study: Study, workers: list[Worker]) -> str:
    """Until no worker is left. Returns the end of the log of the last one that died."""
    said = {t.number for t in study.trials() if t.state.is_finished()}
    deaths, last_words = 0, ""  # since something was last finished
    while workers:
        time.sleep(POLL)
        over = [w for w in workers if w.process.poll() is not None]
        if over or int(time.monotonic() / POLL) % 10 == 0:
            deaths = 0 if _say_what_is_new(study, said) else deaths
        for worker in over:
            workers.remove(worker)
            if worker.process.returncode == 0:
                continue
            deaths, last_words = deaths + 1, worker.log()
            if deaths > MOST_DEATHS * study.config.workers:
                raise RuntimeError(f"workers die before they finish a trial; the end of a log:\n{last_words}")
            if not study.too_many_failures():
                workers.append(Worker(worker.number, study.config.workers, study.folder))
    return last_words


def _say_what_is_new(study: Study, said: set[int]) -> bool:
    new = [t for t in study.trials() if t.state.is_finished() and t.number not in said]
    for trial in new:
        said.add(trial.number)
        shown = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial.params.items())
        what = f"{trial.value:.6g}" if trial.value is not None else trial.state.name.lower()
        if "superfluous" not in trial.user_attrs:
            print(f"trial {trial.number}: {what}  {shown}", file=sys.stderr, flush=True)
    return bool(new)


def _end(workers: list[Worker]) -> None:
    """End what is still running: a fit saves its state, and its trial is gone on with by the next call."""
    for worker in workers:
        worker.process.terminate()
    until = time.monotonic() + PATIENCE
    for worker in workers:
        try:
            worker.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within: a signal to leave ends the workers first; a SLURM job that is to come back is requeued."""
    asked: list[int] = []

    def leave(number: int, frame: Any) -> None:
        asked.append(number)
        if len(asked) > 1:  # the workers are ended already
            return
        raise KeyboardInterrupt if number == signal.SIGINT else SignalExit(number)

    with handled_by(leave):
        try:
            yield
        except SignalExit as error:
            from weft.devices.requeue import requeue

            requeue(error.number, is_saved=True)
            raise
