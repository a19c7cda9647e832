"""What a run is given before it trains: its data, made and made anew, and its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from weft.data.data import SPLITS, Data, nothing_to_train_on
from weft.data.splits import batches_of, check_finite
from weft.devices import seeding
from weft.devices.precision import float_dtype
from weft.loop.phases import data_of_phase
from weft.step.history import Best
from weft.step.state import RunState


def make_data(state: RunState, random: dict[str, Any] | None = None) -> None:
    """Make the data of this phase; on resume in the `random` state in which it was made before."""
    if random is not None:
        seeding.set_random_state(random)
    else:
        state.progress.data_epoch = state.progress.epoch
    state.kept.begin_data(seeding.random_state())
    seed = state.config.seed if state.processes.world == 1 else state.feed.seed
    assert state.feed.make is not None
    with seeding.data_randomness(seed, index=state.progress.refreshes):
        use_data(state, data_of_phase(state) or state.feed.make())


def renew_data(state: RunState) -> None:
    """Make the data anew: a refresh, or a phase that brings its own."""
    state.progress.refreshes += 1
    make_data(state)


def use_data(state: RunState, data: Data) -> None:
    """Train, evaluate and predict with `data` from here on."""
    fabric, processes = state.fabric, state.processes
    if read := getattr(state.problem, "own_data", None):  # Supervised
        data = replace(data, **{split: read(getattr(data, split)) for split in SPLITS})
    check_finite(data, state.config.strict_data)
    place: dict[str, Any] = {"device": fabric.device, "dtype": float_dtype(fabric), "to_device": fabric.to_device}
    share: dict[str, Any] = {"rank": processes.data_rank, "world": processes.data_world}
    splits = {split: batches_of(data, split, seed=state.feed.seed, **place, **share) for split in SPLITS}
    state.feed.use(data, splits)
    if data.pre_batch is not None:
        from weft.devices.generators import fix_kept_batches

        fix_kept_batches(splits.values())


def train_batches(state: RunState, rest: Callable[..., None]) -> Iterable[Any]:
    """The training batches of the epoch that were not used yet. `rest`: what leaves the run."""
    source = state.source("train")
    if source is None:
        raise nothing_to_train_on(state.feed.data)
    if source.resident and state.progress.batch == 0:  # tensors know their order
        state.kept.begin_epoch()
        return state.batches_of("train")
    from weft.loop import order

    return order.train_batches(state, rest)


def forget_best_of_other_data(state: RunState, before: Mapping[str, Any]) -> None:
    """In a second fit on other data, of which the first one's best tells nothing, count the best anew, and say so.

    `before`: the batches by split of the fit before. What is monitored is measured on the dev data, if there is some.
    """
    split = "dev" if state.has("dev") else "train"
    was, now = before.get(split), state.source(split)
    if not before or state.best.value is None:
        return
    if was is not None and was is not now:
        from weft.loop.settings import print_of

        if print_of(was) == print_of(now):
            return
    elif was is now:
        return
    state.best = Best()
    state.warn_once(f"The {split} data are others than in the fit before: the best epoch is one of this fit.")


def enter_folder(state: RunState, until: ExitStack) -> Path | None:
    """The folder of the run, which the first process owns `until` then: new, of the fit before, or of the resumed run.

    None if nothing asks for one. Raises RunInUseError, in every process, where another run is under way in it.
    """
    folder, is_new = state.kept.run_dir, state.kept.run_dir is None
    if is_new:
        folder = new_folder(state)
    if folder is not None:
        from weft.records import lease

        if not is_new:
            state.processes.first(partial(lease.acquire, folder))
        if state.is_global_zero:
            lease.enter(folder)
            until.callback(lease.release, folder)
        if state.processes.world > 1:
            watch: Any = state.processes
            until.callback(watch.watch(folder, lambda: state.progress.step, state.config.timeout))
    return folder


def leave_folder(state: RunState) -> None:
    """Let others have the folder of the run."""
    if state.kept.run_dir is not None and state.is_global_zero:
        from weft.records import lease

        lease.release(state.kept.run_dir)


def check_folder(state: RunState) -> None:
    """Raise RunInUseError if it is known that another process has taken the folder over."""
    if state.kept.run_dir is not None and state.is_global_zero:
        from weft.records import lease

        lease.check(state.kept.run_dir, look=False)


def save_result(state: RunState, result: Any) -> None:
    """Write what came out into the folder of the run, unless it is another's by now."""
    from weft.records import lease

    assert state.kept.run_dir is not None
    lease.check(state.kept.run_dir)
    result.save(state.kept.run_dir)


def new_folder(state: RunState) -> Path | None:
    """The folder of a new run, None if nothing asks for one."""
    config, options = state.config, state.trainer.options
    asked = (config.root_dir, config.checkpointing, options["loggers"], config.profiler, options["profiler"])
    if all(one in (None, False) for one in asked):
        return None
    from weft.records import folders

    return state.processes.first(partial(folders.new_folder, config, options))


def take_folder(state: RunState, is_new: bool) -> None:
    """The run begins: what an earlier one of its name left in its new folder is moved out of the way."""
    if is_new and state.kept.run_dir is not None:
        from weft.records import folders

        state.processes.first(partial(folders.set_aside, state.kept.run_dir))


def forget_folder(state: RunState) -> None:
    """The run was refused before it began: its new folder goes, where nothing is in it."""
    if state.kept.run_dir is not None and state.is_global_zero and not state.control.begun:
        from weft.records import folders

        folders.forget(state.kept.run_dir, root_is_ours=state.config.root_dir is None)
