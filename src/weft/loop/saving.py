"""Saving a run while it trains, and leaving it when a signal asks for it.

The hook `Checkpointing` decides when. All ranks take part in a save, the first one writes; after an error no rank waits
for another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from weft.checkpoint import archive
from weft.checkpoint import folder as checkpoints
from weft.checkpoint.archive import STATE, is_in_parts
from weft.config import CheckpointConfig
from weft.events import Hook
from weft.loop.contents import state_of_run
from weft.loop.settings import data_prints
from weft.loop.watching import Watch
from weft.records import lease
from weft.step.state import FOUND_AGAIN, RunState, Stage


class Checkpointing(Hook):
    """Saves after every n steps, epochs or seconds, whenever the monitored metric improved, at a signal and at the end.

    An epoch that ends at the step of an earlier save is saved again under the same name: the later state holds. After
    an error it writes `exception.ckpt`, in each process for itself. A disk that fails ends the training with the error.
    `clock` gives seconds.
    """

    def __init__(self, config: CheckpointConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self._clock = config, clock

    def on_fit_start(self, trainer: Any) -> None:
        """Nothing is due yet."""
        self._seen = self._saved = trainer.run.progress.place
        self._saved_at = self._clock()
        self._watch = Watch(trainer.run.state)

    def at_rest(self, trainer: Any) -> None:
        """Save if it is time to, and not this very state already."""
        state, seconds = trainer.run.state, self.config.every_n_seconds
        seen, self._seen = self._seen, state.progress.place
        by_clock = state.processes.due("save", seconds is not None and self._clock() - self._saved_at >= seconds)
        if state.control.left_open:  # an epoch that only closes for what the fit returns
            if state.control.ending:
                end_open(state)
            return
        is_new = self._seen != self._saved or (state.control.ending and state.control.stop_reason is not None)
        if is_new and (by_clock or state.control.leaving or state.control.ending or self._is_due(state, seen)):
            trainer.run.save()
            self._watch.tell(state)
            self._saved, self._saved_at = state.progress.place, self._clock()

    def _is_due(self, state: RunState, seen: tuple[int, int, int]) -> bool:
        config, step, epoch = self.config, state.progress.step, state.progress.epoch
        if config.every_n_steps and step // config.every_n_steps != seen[0] // config.every_n_steps:
            return True
        return epoch != seen[1] and bool(
            (config.epochs and epoch % config.epochs == 0) or (config.best and state.epoch.improved)
        )

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        """Write down what there is; if that fails too, the error carries a note."""
        if not trainer.run.state.control.begun:
            return
        from weft.loop.lastly import save_at_error

        try:
            save_at_error(trainer.run.state, error)
        except Exception as second:  # noqa: BLE001, the first error is the one to raise
            error.add_note(f"No checkpoint was written at this error: {type(second).__name__}: {second}")


def prepare_folder(state: RunState) -> None:
    """Refuse data that cannot be resumed, clear what killed processes left, and give up the future of a run that goes
    on from one of its older checkpoints."""
    source = state.source("train")
    why = ""
    if source is None:  # a loop of one's own
        pass
    elif not source.resident and source.one_shot:
        why = "is a one-shot iterable (a generator), which cannot be started again; pass a list or a DataLoader"
    elif not source.resident and getattr(source.loader, "persistent_workers", False):
        why = "keeps random state in its workers from epoch to epoch; pass persistent_workers=False"
    if why:
        raise ValueError(f"Checkpoints are asked for, but the training data {why}, or checkpoint=False.")
    if state.config.checkpointing is not None and state.config.checkpointing.background:
        from weft.checkpoint.background import BackgroundWriter

        state.kept.writer = BackgroundWriter()
    data_prints(state)  # of the data as it was made: a hook may resample it, and restores that itself
    assert state.kept.run_dir is not None
    if state.is_global_zero:
        folder = state.kept.run_dir / "checkpoints"
        checkpoints.clean(folder)
        if state.kept.resumed_from is not None and state.kept.resumed_from.parent == folder:
            checkpoints.set_last(state.kept.resumed_from)


def save_run(state: RunState) -> Path:
    """Write a checkpoint into the run's folder and return its path. Call on every rank; the first one writes."""
    if state.kept.run_dir is None:
        raise RuntimeError("save: this run has no folder; give the trainer root_dir or checkpoint=True.")
    folder, step = state.kept.run_dir / "checkpoints", state.progress.step
    stage = state.control.stage
    state.kept.save_wanted = stage is Stage.STEP_HOOKS
    if (
        state.kept.save_wanted
    ):  # hooks after the one that asks have not seen the step yet; `Run.end_step` comes back to it
        return checkpoints.step_path(folder, step)
    if stage is not Stage.REST:
        raise RuntimeError(f"save: {stage.value} is under way, so the state is not whole; save between updates.")
    with state.control.interruption.held():
        content = state_of_run(state)
        best = state.best.place
        # `best` names a file that carries the best weights; it moves when there are new ones.
        moves_best = state.best.epoch is not None and best != state.kept.best_saved
        options: dict[str, Any] = {"keep": (state.config.checkpointing or CheckpointConfig()).keep, "best": moves_best}
        write: Any = checkpoints.save
        if state.processes.in_shards:
            from weft.checkpoint.parts import write_parts

            content, options["write"] = write_parts(checkpoints.step_path(folder, step), content, state.processes)
        if state.kept.writer is not None and (state.control.leaving or state.control.ending):
            state.processes.first(state.kept.writer.wait)
        elif state.kept.writer is not None:
            write = state.kept.writer.save
        state.processes.first(partial(_write_as_owner, partial(write, folder, step, content, **options), folder))
        state.kept.has_best(state.best)
    return checkpoints.step_path(folder, step)


def _write_as_owner(write: Callable[[], Any], folder: Path) -> Any:
    lease.check(folder.parent)
    return write()


def save_open(state: RunState) -> None:
    """Write the state of an epoch that is left in its middle, as the last of this run: what follows is not saved."""
    save_run(state)
    state.control.left_open = True


def end_open(state: RunState) -> None:
    """The fit has come to its end. Whoever resumes it wants to go on, so why it stopped is taken out of the file.

    Not before: a process that dies while the epoch closes stops there again.
    """
    if state.control.stop_reason in FOUND_AGAIN or state.kept.run_dir is None:
        return
    path = checkpoints.step_path(state.kept.run_dir / "checkpoints", state.progress.step)

    def forget_reason() -> None:
        if state.kept.writer is not None:
            state.kept.writer.wait()
        file = path / STATE if is_in_parts(path) else path
        archive.write(file, {**archive.read(file), "stop_reason": None})

    state.processes.first(forget_reason)
