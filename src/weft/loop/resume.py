"""The whole state of a run as one dict, and back: saving and loading are mirror images.

    saved = state_of_run(state)       # everything that decides how the run goes on: tensors and plain values only
    restore_run(state, saved)         # in another process, on another day

Bit-identical means: same torch build, device, world size, number of threads. What may not change at all raises, what
changed otherwise is named in one warning. What a checkpoint lacks is an error, never a guess.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from weft.checkpoint import archive
from weft.checkpoint import folder as checkpoints
from weft.checkpoint.archive import CheckpointError
from weft.checkpoint.folder import complete
from weft.checkpoint.hidden import attributes, changed_attributes, set_attributes
from weft.checkpoint.weights import load_into
from weft.config import TrainerConfig
from weft.devices import seeding
from weft.devices.precision import scaler_of
from weft.devices.seeding import generator_states, set_generator_states
from weft.loop.compatibility import compare, fixed_settings, settings
from weft.loop.order import generators_in
from weft.loop.phases import num_epochs, replaces_optimizers
from weft.problem.reading import set_term_weights, term_weights
from weft.records import folders

if TYPE_CHECKING:
    from weft.step.state import RunState

FORMAT = 1

PARTS = (
    "format",
    "problem",
    "module_state",
    "term_weights",
    "optimizers",
    "schedules",
    "scaler",
    "progress",
    "stop_reason",
    "means",
    "logged",
    "recent",
    "own_buffers",
    "random_before_data",
    "random_before_epoch",
    "generators_before_epoch",
    "generators",
    "random",
    "other_processes",
    "evaluated",
    "history",
    "best",
    "hooks",
    "notes",
    "state",
    "seed",
    "fixed",
    "options",
    "error",
)


# ---- the mirror ------------------------------------------------------------------------------------------------------


def state_of_run(state: RunState, error: BaseException | None = None) -> dict[str, Any]:
    """Everything that decides how the run goes on: tensors and plain values only.

    Call on every rank, between steps. After an `error` no rank waits for another: the parts that each has of its own
    are those of this one alone, and the state may be that of the middle of a step.
    """
    own = _own_state(state)
    return {
        "format": FORMAT,
        "problem": state.problem.state_dict(),
        **({"others": others.state_dict()} if (others := state.training.others).tensors else {}),
        "module_state": changed_attributes(state.problem, state.kept.attributes_at_start),
        "term_weights": term_weights(state.problem),
        "optimizers": {name: _optimizer_state(o, state.problem) for name, o in state.training.optimizers.items()},
        "schedules": {name: s.state_dict() for name, s in state.training.schedules.items()},
        "scaler": scaler.state_dict() if (scaler := scaler_of(state.fabric)) is not None else None,
        "progress": {**state.progress.state_dict(), "seconds": state.seconds},
        # A process that dies after it was told to stop, and before the end, stops there again. Whoever resumes a fit
        # that # came to its end wants to go on.
        "stop_reason": None if error is not None or state.control.ending else state.control.stop_reason,
        **own,
        "other_processes": state.processes.gather(own)[1:] if error is None else [],
        "evaluated": dict(state.epoch.evaluated),
        "history": state.history.state_dict(),
        "best": state.best.state_dict(state.problem),
        "hooks": {name: hook.state_dict() for name, hook in _stateful(state.hooks)},
        "notes": state.kept.notes,
        "state": state.trainer.state,
        "seed": state.feed.seed,
        "fixed": fixed_settings(state),
        "options": settings(state),
        "error": None if error is None else f"{type(error).__name__}: {error}",
    }


def _own_state(state: RunState) -> dict[str, Any]:
    """What each process has of its own: random numbers, and what it measured in the open epoch."""
    return {
        "means": state.epoch.means.state_dict(),
        "logged": state.epoch.logged.state_dict(),
        "recent": state.epoch.recent.state_dict(),
        "own_buffers": state.processes.own_buffers(state.problem),
        "random_before_data": state.kept.random_before_data,
        "random_before_epoch": state.kept.random_before_epoch,
        "generators_before_epoch": state.kept.generators_before_epoch,
        "generators": generator_states(generators_in(state)),
        "random": seeding.random_state(),
    }


def state_of_process(saved: Mapping[str, Any], rank: int) -> Mapping[str, Any]:
    """The state with what process `rank` had of its own. That of the first one, if there were not so many."""
    return {**saved, **saved["other_processes"][rank - 1]} if 0 < rank <= len(saved["other_processes"]) else saved


def restore_run(state: RunState, saved: Mapping[str, Any], hooks: bool = True) -> None:
    """Go on from what `state_of_run` gave. Random state comes last: everything before it may draw.

    `hooks=False` leaves the hooks' own state out: before `on_fit_start` they may not be ready for it.
    """
    saved = state_of_process(saved, state.processes.rank)
    load_into(state.problem, saved["problem"], source="the checkpoint")
    state.training.others.load_state_dict(saved.get("others", {}), source="The checkpoint")
    set_attributes(state.problem, saved["module_state"])
    _restore_optimizers(state, saved)
    restore_numbers(state, saved)
    state.epoch.means.load_state_dict(saved["means"])
    state.epoch.logged.load_state_dict(saved["logged"])
    state.epoch.recent.load_state_dict(saved["recent"])
    state.epoch.evaluated = dict(saved["evaluated"])
    state.best.load_state_dict(saved["best"], state.problem)
    state.kept.best_saved = (state.best.name, state.best.value, state.best.epoch)
    own = dict(_stateful(state.hooks))
    _same_names("hooks with state", own, saved["hooks"])
    for name, hook in own.items() if hooks else ():
        hook.load_state_dict(saved["hooks"][name])
    state.kept.notes = archive.plain(saved["notes"])  # containers of its own: it will be written to
    state.trainer.state.clear()
    state.trainer.state.update(_moved(saved["state"], state.fabric.device))
    state.processes.set_own_buffers(state.problem, saved["own_buffers"])
    # Putting back is no change; what had changed since the start of the run stays known as changed.
    flags = {k: v for k, v in state.kept.attributes_at_start.items() if k.endswith(".requires_grad")}
    now = {k: None if k in saved["module_state"] else v for k, v in attributes(state.problem).items()}
    state.kept.attributes_at_start = {**now, **flags}
    state.kept.random_before_data, state.kept.random_before_epoch = (
        saved["random_before_data"],
        saved["random_before_epoch"],
    )
    state.kept.generators_before_epoch = saved["generators_before_epoch"]
    state.kept.random_to_resume, state.kept.generators_to_resume = saved["random"], saved["generators"]
    seeding.set_random_state(saved["random"])
    set_generator_states(generators_in(state), saved["generators"])


def restore_carried(state: RunState, saved: Mapping[str, Any]) -> None:
    """Go on, in a second fit, with the optimizers and random numbers of a first one that was in other processes."""
    if state.control.continues or not replaces_optimizers(state):
        _restore_optimizers(state, saved)
    seeding.set_random_state(state_of_process(saved, state.processes.rank)["random"])


def restore_hooks(hooks: Iterable[Any], saved: Mapping[str, Any]) -> None:
    """Give `hooks`, the first ones of a run, the state that they had at its end."""
    for name, hook in _stateful(hooks):
        hook.load_state_dict(saved["hooks"][name])


def _restore_optimizers(state: RunState, saved: Mapping[str, Any]) -> None:
    set_term_weights(state.problem, saved["term_weights"])
    _same_names("optimizers", state.training.optimizers, saved["optimizers"])
    for name, optimizer in state.training.optimizers.items():
        _load_optimizer(name, optimizer, saved["optimizers"][name], state.problem)
        # Else schedulers warn that they step first, if the run goes on between the last step and the end of epoch 0.
        optimizer._opt_called = saved["progress"]["step"] > 0  # type: ignore[attr-defined]
    _same_names("schedules", state.training.schedules, saved["schedules"])
    for name, schedule in state.training.schedules.items():
        schedule.load_state_dict(saved["schedules"][name])
    if (scaler := scaler_of(state.fabric)) is not None:
        scaler.load_state_dict(saved["scaler"])


def begin(state: RunState, saved: Mapping[str, Any] | None, carried: Mapping[str, Any] | None) -> None:
    """Call `on_fit_start`, and go on from the `state` of a checkpoint, or the one `carried` from other processes.

    The hooks of a resumed run see the state as it was saved, and what they change at the start is put back.
    """
    if saved is None:
        state.call("on_fit_start")
        if carried is not None:
            restore_carried(state, carried)
        return
    compare(state, saved)
    saved = complete(saved, state.kept.resumed_from, state.processes)
    restore_run(state, saved, hooks=False)
    state.call("on_fit_start")
    state.control.reopened = state.progress.batch > 0
    if state.control.reopened:
        state.call("on_epoch_start")
    restore_run(state, saved)
    state.progress.begin_fit(num_epochs(state), state.config.max_steps, goes_on=True)


def restore_numbers(state: RunState, saved: Mapping[str, Any]) -> None:
    """How far the run is and what it measured: all that is needed before there are optimizers."""
    state.feed.seed = saved["seed"]
    state.progress.load_state_dict(saved["progress"])
    state.history.load_state_dict(saved["history"])
    state.control.stop_reason = saved["stop_reason"]
    if state.progress.phase_ended and saved["options"].get("patience") != repr(state.config.patience):
        state.control.stop_reason, state.progress.phase_ended = None, ""  # more patience than the run that ended had
    elif state.progress.phase_ended and state.progress.phase + 1 == len(state.training.phases):
        state.control.stop_reason = state.progress.phase_ended
    if state.control.stop_reason in ("max_steps", "max_time"):
        state.control.stop_reason = None  # found again from the steps there are and the new process's time


def _same_names(what: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    missing, surplus = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
    if missing or surplus:
        raise ValueError(
            f"The checkpoint does not fit this trainer's {what}: it lacks {missing or 'none'} and has "
            f"{surplus or 'none'} besides. Resume with the {what} that the run was started with."
        )


def _stateful(hooks: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Hooks with state, by class name and number; modules of the problem are saved with it."""
    seen = Counter[str]()
    for hook in hooks:
        if not isinstance(hook, nn.Module) and hasattr(hook, "state_dict") and hasattr(hook, "load_state_dict"):
            kind = type(hook).__name__
            seen[kind] += 1
            yield kind if seen[kind] == 1 else f"{kind}.{seen[kind]}", hook


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return type(value)((k, _moved(v, device)) for k, v in value.items())
    return type(value)(_moved(v, device) for v in value) if type(value) in (list, tuple) else value


# ---- optimizers ------------------------------------------------------------------------------------------------------


def _optimizer_state(optimizer: Optimizer, problem: nn.Module) -> dict[str, Any]:
    saved = optimizer.state_dict()
    return {**saved, "parameters": _parameter_names(optimizer, problem)}


def _parameter_names(optimizer: Optimizer, problem: nn.Module) -> list[list[str]]:
    names = {id(p): name for name, p in problem.named_parameters()}
    return [[names.get(id(p), f"of shape {tuple(p.shape)}") for p in g["params"]] for g in optimizer.param_groups]


def _load_optimizer(name: str, optimizer: Optimizer, saved: Mapping[str, Any], problem: nn.Module) -> None:
    """State by position, so the parameters must be the same ones in the same order; dtypes stay as they were saved."""
    here = _parameter_names(optimizer, problem)
    if here != saved["parameters"]:
        raise ValueError(f"Optimizer {name!r} updates {here}; the checkpoint's updated {saved['parameters']}.")
    groups = [{k: v for k, v in group.items()} for group in saved["param_groups"]]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    numbered = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in saved["state"].items():  # torch casts saved to the parameter's dtype
        own = optimizer.state[numbered[number]] if isinstance(number, int) else {}
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if isinstance(value, Tensor) and isinstance(own.get(key), Tensor) and own[key].dtype != value.dtype:
                own[key] = value.to(own[key].device, copy=True)


# ---- where to go on from ---------------------------------------------------------------------------------------------


def find_state(state: RunState, resume: str) -> dict[str, Any] | None:
    """The state to go on from; None for "auto" where there is nothing yet. The run learns its folder and how far it is.

    Raises CheckpointError if there is nothing for "last" and "best", or what a path names cannot be resumed.
    """
    found = state.processes.first(
        partial(_load, state.config, resume)
    )  # tensors in shards are read later, by each process
    if found is None:
        return None
    saved, path = found[0], found[1].absolute()
    state.kept.resumed_from, state.kept.run_dir = path, folders.folder_of(path) or state.kept.run_dir
    restore_numbers(state, saved)
    return saved


def _load(config: TrainerConfig, resume: str) -> tuple[dict[str, Any], Path] | None:
    folder = folders.folder_to_resume(config, resume)
    if folder is None and resume in folders.RESUME_WORDS:
        if resume == "auto":
            return None
        raise CheckpointError(
            f"resume={resume!r}: there are no checkpoints in {folders.where_to_look(config)}; "
            "'auto' starts anew where there are none."
        )
    try:
        saved, path = checkpoints.load(folder or resume, "best" if resume == "best" else "last", with_shards=False)
    except CheckpointError as error:
        if resume != "auto":
            raise
        warnings.warn(f"{error} The run starts anew (resume='auto').", stacklevel=7)
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
