"""Going on from a checkpoint. What happens, in this order:

    find_state        the file is read; the run learns its folder, its seed, how far it is and what it measured:
                      all that the making of its data and optimizers asks for
    begin
      compare         what may not change is refused, what changed otherwise is named
      _put_back       what trains and what was measured
      on_fit_start    and, in an open epoch, on_epoch_start: hooks see the run as it was saved
      _put_back       once more: hooks set things up there (resample, draw, step), and that happened before
      put_back_hooks  their own state, which on_fit_start begins anew
      _put_back_random  last, because everything before it may draw

Bit-identical means: same torch build, device, world size, number of threads. What a checkpoint lacks is an error, never
a guess. What it holds is told in `weft.loop.contents`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from weft.checkpoint import archive
from weft.checkpoint import folder as checkpoints
from weft.checkpoint.archive import CheckpointError
from weft.checkpoint.changed import set_attributes
from weft.checkpoint.folder import complete
from weft.checkpoint.hidden import attributes
from weft.checkpoint.weights import load_into
from weft.config import TrainerConfig
from weft.data.loaders import iterator_of
from weft.devices import seeding
from weft.devices.precision import scaler_of
from weft.loop.compatibility import compare
from weft.loop.contents import FORMAT, PARTS, parameter_names, stateful
from weft.loop.order import set_generators_in
from weft.loop.phases import num_epochs, replaces_optimizers
from weft.problem.weights import set_term_weights
from weft.records import folders, lease
from weft.step.state import FOUND_AGAIN

if TYPE_CHECKING:
    from weft.step.state import RunState

# ---- where to go on from ---------------------------------------------------------------------------------------------


def find_state(state: RunState, resume: str) -> dict[str, Any] | None:
    """The state to go on from; None for "auto" where there is nothing yet. The run learns its folder and how far it is.

    Raises CheckpointError if there is nothing for "last" and "best", or what a path names cannot be resumed.
    """
    found = state.processes.first(partial(_load, state.config, resume))  # shards are read later, by each process
    if found is None:
        return None
    saved, path = found[0], found[1].absolute()
    state.kept.goes_on_from(path, folders.folder_of(path) or state.kept.run_dir)
    _put_back_numbers(state, saved)
    return saved


def _load(config: TrainerConfig, resume: str) -> tuple[dict[str, Any], Path] | None:
    folder = folders.folder_to_resume(config, resume)
    try:
        return _load_from(config, resume, folder)
    except BaseException:
        if folder is not None:
            lease.release(folder.parent)
        raise


def _load_from(config: TrainerConfig, resume: str, folder: Path | None) -> tuple[dict[str, Any], Path] | None:
    if folder is None and resume in folders.RESUME_WORDS:
        if resume == "auto":
            return None
        raise CheckpointError(
            f"resume={resume!r}: there are no checkpoints in {folders.where_to_look(config)}; "
            "'auto' starts anew where there are none."
        )
    try:
        place = folder if resume in folders.RESUME_WORDS else None
        saved, path = checkpoints.load(place or resume, "best" if resume == "best" else "last", with_shards=False)
    except CheckpointError as error:
        if resume != "auto":
            raise
        warnings.warn(f"{error} The run starts anew (resume='auto').", stacklevel=8)
        if folder is not None:
            lease.release(folder.parent)
        return None
    check_format(saved, path)
    return saved, path


def check_format(saved: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError, saying what the file is, unless it is a checkpoint of a run in a format known here."""
    number = saved.get("format")
    if not isinstance(number, int):
        what = f"of format {number!r}" if number is not None else f"with the keys {list(saved)[:5]}"
        raise CheckpointError(
            f"{path} is no checkpoint of a run but a file {what}; weft.load_weights(problem, path) loads weights."
        )
    if number > FORMAT:
        raise CheckpointError(f"{path} was written by a newer weft (format {number}, known here: up to {FORMAT}).")
    if missing := [part for part in PARTS if part not in saved]:
        raise CheckpointError(f"{path} (format {number}) lacks {missing}.")


# ---- begin -----------------------------------------------------------------------------------------------------------


def begin(
    state: RunState, saved: Mapping[str, Any] | None, carried: Mapping[str, Any] | None, renew: tuple[str, ...] = ()
) -> None:
    """Call `on_fit_start`, and go on from the `saved` state, or from the one `carried` from other processes.

    What `renew` names ("optimizer", "scheduler") is as the options are now.
    """
    if saved is None:
        state.call("on_fit_start")
        if carried is not None:
            _put_back_carried(state, carried)
        return
    compare(state, saved, renew)
    saved = state_of_process(complete(saved, state.kept.resumed_from, state.processes), state.processes.rank)
    _same_names("hooks with state", dict(stateful(state.hooks)), saved["hooks"])
    if renew:
        from weft.loop.renewal import Renewal

        renewal = Renewal(state, renew)
    else:
        renewal = None
    _put_back(state, saved, renewal)
    _put_back_random(state, saved)
    state.call("on_fit_start")
    fits, number = state.progress.fits, state.control.number
    done_before = number < len(fits) and fits[number][1] == num_epochs(state)  # this fit of the script, and as long
    state.control.reopened = state.progress.batch > 0 and not done_before
    if state.control.reopened:
        state.call("on_epoch_start")
    _put_back(state, saved, renewal)
    put_back_hooks(state.hooks, saved)
    _start_workers_that_stay(state)
    _put_back_random(state, saved)
    if done_before:
        leave_to_next_fit(state)
    else:
        del state.progress.fits[number:]
        state.progress.begin_fit(num_epochs(state), state.config.max_steps, goes_on=True)


def leave_to_next_fit(state: RunState) -> None:
    """Train nothing: a script that fits several times was ended in a later fit than this one, which goes on instead."""
    progress, number = state.progress, state.control.number
    first, epochs = progress.fits[number]
    state.leave_to_next()
    state.warn_once(
        f"{state.kept.resumed_from} was saved in fit {len(progress.fits) + 1} of this run: fit {number + 1}, of epochs "
        f"{first} to {first + epochs - 1}, was over and trains nothing now. The next fit goes on from the checkpoint. "
        "(To train more epochs in this one, ask for another number: fit(..., epochs=...).)"
    )


def _start_workers_that_stay(state: RunState) -> None:
    """Have a dev loader with persistent workers begin, if it did in the process before.

    Only its first iterator draws a random number: the next epochs would begin from other ones.
    """
    loader = getattr(state.feed.splits.get("dev"), "loader", None)
    measured = state.history.values.get(state.config.dev_metric, [])
    if getattr(loader, "persistent_workers", False) and not all(map(math.isnan, measured)):
        iterator_of(loader)


def state_of_process(saved: Mapping[str, Any], rank: int) -> Mapping[str, Any]:
    """The state with what process `rank` had of its own. That of the first one, if there were not so many."""
    return {**saved, **saved["other_processes"][rank - 1]} if 0 < rank <= len(saved["other_processes"]) else saved


# ---- the parts -------------------------------------------------------------------------------------------------------


def _put_back(state: RunState, saved: Mapping[str, Any], renewal: Any = None) -> None:
    """What trains, and what was measured."""
    load_into(state.problem, saved["problem"], source="the checkpoint")
    state.training.others.load_state_dict(saved.get("others", {}), source="The checkpoint")
    set_attributes(state.problem, saved["module_state"])
    _put_back_optimizers(state, saved, renewal)
    _put_back_numbers(state, saved)
    state.epoch.put_back(saved)
    state.best.load_state_dict(saved["best"], state.problem)
    state.kept.has_best(state.best)
    state.kept.notes = archive.plain(saved["notes"])  # containers of its own: it will be written to
    state.trainer.state.clear()
    state.trainer.state.update(_moved(saved["state"], state.fabric.device))
    state.processes.set_own_buffers(state.problem, saved["own_buffers"])
    # Putting back is no change; what had changed since the start of the run stays known as changed.
    flags = {k: v for k, v in state.kept.attributes_at_start.items() if k.endswith(".requires_grad")}
    now = {k: None if k in saved["module_state"] else v for k, v in attributes(state.problem).items()}
    state.kept.attributes_at_start = {**now, **flags}


def _put_back_numbers(state: RunState, saved: Mapping[str, Any]) -> None:
    """How far the run is and what it measured: all that is needed before there are optimizers."""
    state.feed.seed = saved["seed"]
    state.progress.load_state_dict(saved["progress"])
    state.history.load_state_dict(saved["history"])
    reason = saved["stop_reason"]
    if state.progress.phase_ended and saved["options"].get("patience") != repr(state.config.patience):
        reason, state.progress.phase_ended = None, ""  # more patience than the run that ended had
    elif state.progress.phase_ended and state.progress.phase + 1 == len(state.training.phases):
        reason = state.progress.phase_ended
    state.control.stop_reason = None if reason in FOUND_AGAIN else reason


def _put_back_optimizers(state: RunState, saved: Mapping[str, Any], renewal: Any = None) -> None:
    set_term_weights(state.problem, saved["term_weights"])
    _same_names("optimizers", state.training.optimizers, saved["optimizers"])
    for name, optimizer in state.training.optimizers.items():
        _load_optimizer(name, optimizer, saved["optimizers"][name], state.problem)
        # Else schedulers warn that they step first, if the run goes on between the last step and the end of epoch 0.
        optimizer._opt_called = saved["progress"]["step"] > 0  # type: ignore[attr-defined]
    if renewal is None or not renewal.of_schedulers:
        _same_names("schedules", state.training.schedules, saved["schedules"])
        for name, schedule in state.training.schedules.items():
            schedule.load_state_dict(saved["schedules"][name])
    if renewal is not None:
        renewal.apply(state, saved)
    if (scaler := scaler_of(state.fabric)) is not None:
        scaler.load_state_dict(saved["scaler"])


def put_back_hooks(hooks: Iterable[Any], saved: Mapping[str, Any]) -> None:
    """Give each of `hooks`, the first ones of a run, the state that it had."""
    for name, hook in stateful(hooks):
        hook.load_state_dict(saved["hooks"][name])


def _put_back_random(state: RunState, saved: Mapping[str, Any]) -> None:
    """The random numbers of this process, and what `weft.loop.order` needs to find the place in an open epoch."""
    state.kept.put_back_random(saved)
    seeding.set_random_state(saved["random"])
    set_generators_in(state, saved["generators"])


def _put_back_carried(state: RunState, saved: Mapping[str, Any]) -> None:
    """Go on, in a second fit, with the optimizers and random numbers of a first one that was in other processes."""
    if state.control.continues or not replaces_optimizers(state):
        _put_back_optimizers(state, saved)
    seeding.set_random_state(state_of_process(saved, state.processes.rank)["random"])


def _same_names(what: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    missing, surplus = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
    if missing or surplus:
        raise ValueError(
            f"The checkpoint does not fit this trainer's {what}: it lacks {missing or 'none'} and has "
            f"{surplus or 'none'} besides. Resume with the {what} that the run was started with."
        )


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return type(value)((k, _moved(v, device)) for k, v in value.items())
    return type(value)(_moved(v, device) for v in value) if type(value) in (list, tuple) else value


def _load_optimizer(name: str, optimizer: Optimizer, saved: Mapping[str, Any], problem: nn.Module) -> None:
    """State by position, so the parameters must be the same ones in the same order; dtypes stay as they were saved."""
    here = parameter_names(optimizer, problem)
    if here != saved["parameters"]:
        raise ValueError(f"Optimizer {name!r} updates {here}; the checkpoint's updated {saved['parameters']}.")
    given = {key: value for key, value in saved.items() if key != "parameters"}  # some have more than states and groups
    optimizer.load_state_dict(given | {"param_groups": [dict(group) for group in saved["param_groups"]]})
    numbered = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in saved["state"].items():
        if isinstance(number, int):
            optimizer.state[numbered[number]] = _in_its_dtype(optimizer.state[numbered[number]], entries)


def _in_its_dtype(own: Any, saved: Any) -> Any:
    """What an optimizer made of `saved`, its tensors in their dtypes again: torch casts them to the parameter's."""
    if isinstance(own, Tensor) and isinstance(saved, Tensor):
        return own if own.dtype == saved.dtype else saved.to(own.device, copy=True)
    if isinstance(own, dict) and isinstance(saved, dict):
        own.update({key: _in_its_dtype(own[key], value) for key, value in saved.items() if key in own})
    elif type(own) in (list, tuple) and type(own) is type(saved) and len(own) == len(saved):
        return type(own)(map(_in_its_dtype, own, saved))
    return own
