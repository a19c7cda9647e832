"""What a checkpoint of a run holds: everything that decides how it goes on, as one dict.

    saved = state_of_run(state)       # tensors and plain values only

`weft.loop.resume` puts it back. A run that only saves loads this half alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from weft.checkpoint.changed import changed_attributes
from weft.devices import seeding
from weft.devices.generators import generator_states
from weft.devices.precision import scaler_of
from weft.loop.order import generators_in
from weft.loop.settings import fixed_settings, settings
from weft.problem.weights import term_weights

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
        "optimizers": {name: optimizer_state(o, state.problem) for name, o in state.training.optimizers.items()},
        "schedules": {name: s.state_dict() for name, s in state.training.schedules.items()},
        "scaler": scaler.state_dict() if (scaler := scaler_of(state.fabric)) is not None else None,
        "progress": {**state.progress.state_dict(), "seconds": state.seconds},
        # A process that dies after it was told to stop, and before the end, stops there again. Whoever resumes a fit
        # that came to its end wants to go on.
        "stop_reason": None if error is not None or state.control.ending else state.control.stop_reason,
        **own,
        "other_processes": state.processes.gather(own)[1:] if error is None else [],
        "evaluated": dict(state.epoch.evaluated),
        "history": state.history.state_dict(),
        "best": state.best.state_dict(state.problem),
        "hooks": {name: hook.state_dict() for name, hook in stateful(state.hooks)},
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


def stateful(hooks: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Hooks with state, by class name and number; modules of the problem are saved with it."""
    seen = Counter[str]()
    for hook in hooks:
        if not isinstance(hook, nn.Module) and hasattr(hook, "state_dict") and hasattr(hook, "load_state_dict"):
            kind = type(hook).__name__
            seen[kind] += 1
            yield kind if seen[kind] == 1 else f"{kind}.{seen[kind]}", hook


def optimizer_state(optimizer: Optimizer, problem: nn.Module) -> dict[str, Any]:
    """The state of an optimizer, with the names of the parameters it updates."""
    return {**optimizer.state_dict(), "parameters": parameter_names(optimizer, problem)}


def parameter_names(optimizer: Optimizer, problem: nn.Module) -> list[list[str]]:
    """The names of the parameters of each group, in order."""
    names = {id(p): name for name, p in problem.named_parameters()}
    return [[names.get(id(p), f"of shape {tuple(p.shape)}") for p in g["params"]] for g in optimizer.param_groups]
