"""The whole state of a run as one dict, and back: saving and loading are mirror images.

    state = state_of_run(run)       # everything that decides how the run goes on: tensors and plain values only
    restore_run(run, state)         # in another process, on another day

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
from weft.checkpoint.hidden import attributes, changed_attributes, set_attributes
from weft.checkpoint.parts import complete
from weft.checkpoint.weights import load_into
from weft.config import TrainerConfig
from weft.data.loaders import LoaderBatches
from weft.devices import seeding
from weft.devices.precision import scaler_of
from weft.devices.seeding import generator_states, generators_of, own_generators, set_generator_states
from weft.loop.compatibility import compare, fixed_settings, settings
from weft.problem.reading import set_term_weights, term_weights
from weft.records import folders

if TYPE_CHECKING:
    from weft.loop.run import Run

FORMAT = 1

PARTS = (
    "format", "problem", "module_state", "term_weights", "optimizers", "schedules", "scaler", "progress", "stop_reason",
    "means", "logged", "recent", "own_buffers", "random_before_data", "random_before_epoch", "generators_before_epoch",
    "generators", "random", "other_processes", "evaluated", "history", "best", "hooks", "notes", "state", "seed", "fixed",
    "options", "error",
)  # fmt: skip


# ---- the mirror ------------------------------------------------------------------------------------------------------


def state_of_run(run: Run, error: BaseException | None = None) -> dict[str, Any]:
    """Everything that decides how the run goes on: tensors and plain values only.

    Call on every rank, between steps. After an `error` no rank waits for another: the parts that each has of its own are
    those of this one alone, and the state may be that of the middle of a step.
    """
    own = _own_state(run)
    return {
        "format": FORMAT,
        "problem": run.problem.state_dict(),
        "module_state": changed_attributes(run.problem, run.kept.attributes_at_start),
        "term_weights": term_weights(run.problem),
        "optimizers": {name: _optimizer_state(o, run.problem) for name, o in run.optimizers.items()},
        "schedules": {name: s.state_dict() for name, s in run.schedules.items()},
        "scaler": scaler.state_dict() if (scaler := scaler_of(run.fabric)) is not None else None,
        "progress": {**run.progress.state_dict(), "seconds": run.seconds},
        # A process that dies after it was told to stop, and before the end, stops there again. Whoever resumes a fit that
        # came to its end wants to go on.
        "stop_reason": None if error is not None or run.ending else run.stop_reason,
        **own,
        "other_processes": run.processes.gather(own)[1:] if error is None else [],
        "evaluated": dict(run.evaluated),
        "history": run.history.state_dict(),
        "best": run.best.state_dict(run.problem),
        "hooks": {name: hook.state_dict() for name, hook in _stateful(run.hooks)},
        "notes": run.kept.notes,
        "state": run.trainer.state,
        "seed": run.seed,
        "fixed": fixed_settings(run),
        "options": settings(run),
        "error": None if error is None else f"{type(error).__name__}: {error}",
    }


def _own_state(run: Run) -> dict[str, Any]:
    """What each process has of its own: random numbers, and what it measured in the open epoch."""
    return {
        "means": run.means.state_dict(),
        "logged": run.logged.state_dict(),
        "recent": run.recent.state_dict(),
        "own_buffers": run.processes.own_buffers(run.problem),
        "random_before_data": run.random_before_data,
        "random_before_epoch": run.random_before_epoch,
        "generators_before_epoch": run.kept.generators_before_epoch,
        "generators": generator_states(_generators(run)),
        "random": seeding.random_state(),
    }


def state_of_process(state: Mapping[str, Any], rank: int) -> Mapping[str, Any]:
    """The state with what process `rank` had of its own. That of the first one, if there were not so many."""
    return {**state, **state["other_processes"][rank - 1]} if 0 < rank <= len(state["other_processes"]) else state


def restore_run(run: Run, state: Mapping[str, Any], hooks: bool = True) -> None:
    """Go on from what `state_of_run` gave. Random state comes last: everything before it may draw.

    `hooks=False` leaves the hooks' own state out: before `on_fit_start` they may not be ready for it.
    """
    state = state_of_process(state, run.processes.rank)
    load_into(run.problem, state["problem"], source="the checkpoint")
    set_attributes(run.problem, state["module_state"])
    _restore_optimizers(run, state)
    restore_numbers(run, state)
    run.means.load_state_dict(state["means"])
    run.logged.load_state_dict(state["logged"])
    run.recent.load_state_dict(state["recent"])
    run.evaluated = dict(state["evaluated"])
    run.best.load_state_dict(state["best"], run.problem)
    run.kept.best_saved = (run.best.name, run.best.value, run.best.epoch)
    own = dict(_stateful(run.hooks))
    _same_names("hooks with state", own, state["hooks"])
    for name, hook in own.items() if hooks else ():
        hook.load_state_dict(state["hooks"][name])
    run.kept.notes = archive.plain(state["notes"])  # containers of its own: it will be written to
    run.trainer.state.clear()
    run.trainer.state.update(_moved(state["state"], run.fabric.device))
    run.processes.set_own_buffers(run.problem, state["own_buffers"])
    # Putting back is no change; what had changed since the start of the run stays known as changed.
    flags = {k: v for k, v in run.kept.attributes_at_start.items() if k.endswith(".requires_grad")}
    now = {k: v for k, v in attributes(run.problem).items() if k not in state["module_state"]}
    run.kept.attributes_at_start = {**now, **flags}
    run.random_before_data, run.random_before_epoch = state["random_before_data"], state["random_before_epoch"]
    run.kept.generators_before_epoch = state["generators_before_epoch"]
    run.random_to_resume, run.kept.generators_to_resume = state["random"], state["generators"]
    seeding.set_random_state(state["random"])
    set_generator_states(_generators(run), state["generators"])


def restore_carried(run: Run, state: Mapping[str, Any]) -> None:
    """Go on, in a second fit, with the optimizers and random numbers of a first one that was in other processes."""
    if run.continues or not any(p.optimizer is not None or p.scheduler is not None for p in run.phases[1:]):
        _restore_optimizers(run, state)
    seeding.set_random_state(state_of_process(state, run.processes.rank)["random"])


def restore_hooks(hooks: Iterable[Any], state: Mapping[str, Any]) -> None:
    """Give `hooks`, the first ones of a run, the state that they had at its end."""
    for name, hook in _stateful(hooks):
        hook.load_state_dict(state["hooks"][name])


def _restore_optimizers(run: Run, state: Mapping[str, Any]) -> None:
    set_term_weights(run.problem, state["term_weights"])
    _same_names("optimizers", run.optimizers, state["optimizers"])
    for name, optimizer in run.optimizers.items():
        _load_optimizer(name, optimizer, state["optimizers"][name], run.problem)
        # Else schedulers warn that they step first, if the run goes on between the last step and the end of epoch 0.
        optimizer._opt_called = state["progress"]["step"] > 0  # type: ignore[attr-defined]
    _same_names("schedules", run.schedules, state["schedules"])
    for name, schedule in run.schedules.items():
        schedule.load_state_dict(state["schedules"][name])
    if (scaler := scaler_of(run.fabric)) is not None:
        scaler.load_state_dict(state["scaler"])


def begin(run: Run, state: Mapping[str, Any] | None, carried: Mapping[str, Any] | None) -> None:
    """Call `on_fit_start`, and go on from the `state` of a checkpoint, or the one `carried` from other processes.

    The hooks of a resumed run see the state as it was saved, and what they change at the start is put back.
    """
    if state is None:
        run.call("on_fit_start")
        if carried is not None:
            restore_carried(run, carried)
        return
    compare(run, state)
    state = complete(state, run.kept.resumed_from, run.processes)
    restore_run(run, state, hooks=False)
    run.call("on_fit_start")
    run.reopened = run.progress.batch > 0
    if run.reopened:
        run.call("on_epoch_start")
    restore_run(run, state)
    run.begin_fit()


def restore_numbers(run: Run, state: Mapping[str, Any]) -> None:
    """How far the run is and what it measured: all that is needed before there are optimizers."""
    run.seed = state["seed"]
    run.progress.load_state_dict(state["progress"])
    run.history.load_state_dict(state["history"])
    run.stop_reason = state["stop_reason"]
    if run.progress.phase_ended and state["options"].get("patience") != repr(run.config.patience):
        run.stop_reason, run.progress.phase_ended = None, ""  # more patience than the run that ended had
    elif run.progress.phase_ended and run.progress.phase + 1 == len(run.phases):
        run.stop_reason = run.progress.phase_ended
    if run.stop_reason in ("max_steps", "max_time"):
        run.stop_reason = None  # found again from the steps there are and the new process's time


def train_batches(run: Run) -> Iterable[Any]:
    """The training batches of the epoch that were not used yet.

    A loader starts over in the random state of the epoch's start, and is skipped to its place; then the random state is
    again what it was, or what a checkpoint says.
    """
    start, kept = run.progress.batch, run.kept
    random, generators = run.random_to_resume, kept.generators_to_resume
    run.random_to_resume, kept.generators_to_resume = None, {}
    if start == 0:
        run.random_before_epoch, kept.generators_before_epoch = None, {}
        if isinstance(run.source("train"), LoaderBatches):  # tensors know their order
            run.random_before_epoch, kept.generators_before_epoch = seeding.random_state(), generator_states(_generators(run))
        return run.batches_of("train")
    own = _generators(run)
    if random is None:
        random, generators = seeding.random_state(), generator_states(own)
    if run.random_before_epoch is not None:
        seeding.set_random_state(run.random_before_epoch)
        set_generator_states(own, kept.generators_before_epoch)
    batches = run.batches_of("train", start)
    seeding.set_random_state(random)
    set_generator_states(own, generators)
    return batches


def _generators(run: Run) -> dict[str, Any]:
    source = run.source("train")
    of_data = generators_of(source.loader) if isinstance(source, LoaderBatches) else {}
    return of_data | own_generators((f"problem.{name}", module) for name, module in run.problem.named_modules())


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
    state = optimizer.state_dict()
    return {**state, "parameters": _parameter_names(optimizer, problem)}


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
    for number, entries in saved["state"].items():  # torch casts state to the parameter's dtype
        own = optimizer.state[numbered[number]] if isinstance(number, int) else {}
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if isinstance(value, Tensor) and isinstance(own.get(key), Tensor) and own[key].dtype != value.dtype:
                own[key] = value.to(own[key].device, copy=True)


# ---- where to go on from ---------------------------------------------------------------------------------------------


def find_state(run: Run, resume: str) -> dict[str, Any] | None:
    """The state to go on from; None for "auto" where there is nothing yet. The run learns its folder and how far it is.

    Raises CheckpointError if there is nothing for "last" and "best", or what a path names cannot be resumed.
    """
    found = run.processes.first(partial(_load, run.config, resume))  # tensors in shards are read later, by each process
    if found is None:
        return None
    state, path = found[0], found[1].absolute()
    run.kept.resumed_from, run.run_dir = path, folders.folder_of(path) or run.run_dir
    restore_numbers(run, state)
    return state


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
        state, path = checkpoints.load(folder or resume, "best" if resume == "best" else "last", with_shards=False)
    except CheckpointError as error:
        if resume != "auto":
            raise
        warnings.warn(f"{error} The run starts anew (resume='auto').", stacklevel=7)
        return None
    check_format(state, path)
    return state, path


def check_format(state: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError, saying what the file is, unless it is a checkpoint of a run in a format known here."""
    number = state.get("format")
    if not isinstance(number, int):
        what = f"of format {number!r}" if number is not None else f"with the keys {list(state)[:5]}"
        raise CheckpointError(
            f"{path} is no checkpoint of a run but a file {what}; weft.load_weights(problem, path) loads weights."
        )
    if number > FORMAT:
        raise CheckpointError(f"{path} was written by a newer weft (format {number}, known here: up to {FORMAT}).")
    if missing := [part for part in PARTS if part not in state]:
        raise CheckpointError(f"{path} (format {number}) lacks {missing}.")

