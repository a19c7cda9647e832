"""What is done when a run ends with a save still under way, with an error, or by a signal. Loaded then."""

from __future__ import annotations

import warnings
from pathlib import Path

from weft.checkpoint import archive
from weft.devices.joining import let_others_end
from weft.devices.signals import SignalExit
from weft.loop.contents import state_of_run
from weft.step.state import RunState


def come_back(state: RunState, error: BaseException | None) -> None:
    """Where a signal ended the run SLURM may start it again, and processes that this script started end, too."""
    if isinstance(error, SignalExit) and state.is_global_zero:
        from weft.devices.requeue import requeue

        requeue(error.number, is_saved=state.saves)
    if isinstance(error, KeyboardInterrupt | SignalExit) and state.processes.world > 1:
        let_others_end(state.fabric)


def finish_saving(state: RunState, error: BaseException | None = None) -> None:
    """Wait for a save in the background. Its failure is raised; if another `error` ends the run, that one is noted."""
    if state.kept.writer is None:
        return
    try:
        with state.control.interruption.held():
            state.processes.first(state.kept.writer.wait) if error is None else state.kept.writer.wait()
    except Exception as late:
        if error is None:
            raise
        error.add_note(f"The last checkpoint was not written: {late}")
        if isinstance(error, SystemExit | KeyboardInterrupt):  # which is shown without its notes
            warnings.warn(f"The last checkpoint was not written: {late}", stacklevel=4)


def save_at_error(state: RunState, error: BaseException) -> Path:
    """Write what there is to `checkpoints/exception.ckpt`, in this process alone, and return its path.

    No other checkpoint is touched, and none of "auto", "last" and "best" finds it: it is resumed by its path only.
    """
    assert state.kept.run_dir is not None
    rank = state.processes.rank
    path = state.kept.run_dir / "checkpoints" / f"exception{f'-rank{rank}' if rank else ''}.ckpt"
    archive.write(path, state_of_run(state, error))
    return path
