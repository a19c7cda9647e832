"""Where a signal ends a run besides at the rest after a step: before the first one, after the last, and in between."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weft.devices.fabric import let_others_end
from weft.devices.signals import SignalExit, interactive
from weft.loop.feeding import leave_folder
from weft.loop.streams import lasting_streams
from weft.step.state import RunState, Stage


@contextmanager
def before_training(state: RunState) -> Iterator[None]:
    """Within: nothing is lost yet, so a signal ends the process at once, and SLURM may have the job back."""
    before = state.kept.run_dir
    try:
        with state.control.interruption.caught(at_once=True), lasting_streams():
            yield
    except BaseException as error:
        if state.kept.run_dir is not before:
            leave_folder(state)
        if isinstance(error, SignalExit) and state.config.checkpointing is not None and state.processes.rank == 0:
            from weft.devices.requeue import requeue

            requeue(error.number, is_saved=True)
        raise


def heed_early(state: RunState, between: Callable[[], None]) -> None:
    """Leave, if a signal came before the first step. Every process must call. `between`: what leaves later on."""
    interruption = state.control.interruption
    if state.processes.agree(interruption) and interruption.asked:
        interruption.leave(interruption.asked)
    interruption.between = between


def heed_late(state: RunState, error: BaseException | None) -> None:
    """Leave, if a signal came after the last step. In an interpreter Ctrl-C has stopped what it was to stop."""
    interruption = state.control.interruption
    if error is not None or not interruption.asked or (interruption.asked == signal.SIGINT and interactive()):
        return
    try:
        interruption.leave(interruption.asked)
    except SignalExit as leave:
        come_back(state, leave)
        raise


def come_back(state: RunState, error: BaseException | None) -> None:
    """Where a signal ended the run SLURM may start it again, and processes that this script started end, too."""
    if isinstance(error, SignalExit) and state.is_global_zero:
        from weft.devices.requeue import requeue

        requeue(error.number, is_saved=state.saves)
    if isinstance(error, KeyboardInterrupt | SignalExit) and state.processes.world > 1:
        let_others_end(state.fabric)


def rest_if_waiting(state: RunState, in_batches: bool, rest: Callable[..., None]) -> None:
    """At a signal while code around this run is at work: rest, and leave, unless that may be within a step."""
    if state.processes.world == 1 and state.control.stage is Stage.REST and not in_batches:
        rest(epoch_over=True)
