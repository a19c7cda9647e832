"""The stages of a run: which optimizers, schedules, term weights and frozen parts are in force."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from weft.data.data import Data, as_data
from weft.step.optimizers import build_optimizers
from weft.step.state import RunState
from weft.step.trained import adopt


def num_epochs(state: RunState) -> int:
    """The epochs of all phases together; with `fast_dev_run` at most one."""
    if state.control.epochs is not None:
        return state.control.epochs
    planned = sum(phase.epochs for phase in state.trainer.phases) or state.config.epochs
    return min(1, planned) if state.config.fast_dev_run else planned


def was_over(resumed: Mapping[str, Any] | None) -> bool:
    """Whether the fit that a run goes on from had come to its end."""
    return resumed is not None and resumed["progress"]["epoch"] >= resumed["progress"]["last_epoch"]


def data_of_phase(state: RunState) -> Data | None:
    """The data of the phase in force, or of the last one before that brought its own; None: those of the fit."""
    phases = state.training.phases[: state.progress.phase + 1]
    given = [phase.data for phase in phases if phase.data is not None]
    return as_data(given[-1]) if given else None


def is_over(state: RunState) -> bool:
    """Whether the phase in force has trained all its epochs, or was ended. A single phase lasts as long as the fit."""
    progress, phases = state.progress, state.training.phases
    return bool(progress.phase_ended) or (progress.phase_epoch >= state.phase.epochs and len(phases) > 1)


def ends_here(state: RunState) -> bool:
    """Whether the open epoch is the last one of the fit or of its phase, or training was told to stop."""
    progress = state.progress
    ends_phase = len(state.training.phases) > 1 and progress.phase_epoch + 1 >= state.phase.epochs
    return progress.epoch + 1 >= progress.last_epoch or ends_phase or state.control.stop_reason is not None


def is_nth(state: RunState) -> bool:
    """Whether the open epoch is one that `validate_every` names."""
    return (state.progress.epoch + 1) % state.config.validate_every == 0


def to_next(state: RunState) -> bool:
    """Go to the next phase; False where there is none."""
    progress = state.progress
    if progress.phase + 1 == len(state.training.phases):
        return False
    progress.next_phase()
    return True


def put_in_force(state: RunState, anew: bool = True) -> None:
    """What the phase of `state.progress` says. Without `anew` a run goes on in it: optimizers and weights are there."""
    phase = state.phase
    unfreeze(state.training.frozen)
    if anew:
        if phase.weights:
            from weft.problem.weights import set_term_weights

            set_term_weights(state.problem, dict(phase.weights))
        if phase.setup is not None:
            phase.setup(state.trainer)
        _make_optimizers(state)
    adopt(state)
    state.training.frozen = freeze(state.problem, phase.freeze)


def _make_optimizers(state: RunState) -> None:
    """The optimizers and schedules of the phase. Those of the one before go on where it names none.

    A second fit goes on with the optimizers it has, unless a later phase has replaced those of the first, or they have
    made no step: what refused the fit may have been put right in the problem.
    """
    phase, training, is_first = state.phase, state.training, state.progress.phase == 0
    if is_first and training.optimizers and state.progress.step and not replaces_optimizers(state):
        return
    if is_first or phase.optimizer is not None:
        given = phase.optimizer if phase.optimizer is not None else state.trainer.configure_optimizers()
        # before anything is frozen: what trains in a later phase must be in the optimizer
        optimizers = build_optimizers(given, state.problem)
        state.processes.arrange(optimizers)
        if state.kept.run_dir is None:
            training.train_by(optimizers, {})
        else:
            from weft.loop.settings import optimizers_made

            training.train_by(optimizers, optimizers_made(optimizers))
            state.kept.in_force = {}
    # read after configure_optimizers, which may have set it
    scheduler = state.trainer.options["scheduler"] if phase.scheduler is None and is_first else phase.scheduler
    if scheduler is not None:
        from weft.step.schedules import build_schedulers

        schedules = build_schedulers(scheduler, training.optimizers)
        if state.kept.run_dir is None:
            training.step_by(schedules)
        else:
            from weft.loop.made import schedules_made

            training.step_by(schedules, schedules_made(training.optimizers, schedules))


def replaces_optimizers(state: RunState) -> bool:
    """Whether a phase after the first brings optimizers or schedules of its own."""
    return any(p.optimizer is not None or p.scheduler is not None for p in state.training.phases[1:])


def freeze(problem: nn.Module, names: Sequence[str]) -> list[tuple[nn.Parameter, bool]]:
    """Stop the training of the named nodes, submodules or parameters; `unfreeze` puts it back."""
    if not names:
        return []
    from weft.problem.named import parameters_under

    parameters = [p for name in names for p in parameters_under(problem, name)[1]]
    frozen = [(p, p.requires_grad) for p in dict.fromkeys(parameters)]
    for p, _ in frozen:
        p.requires_grad_(False)
    return frozen


def unfreeze(frozen: Iterable[tuple[nn.Parameter, bool]]) -> None:
    """Let the parameters train again that did before."""
    for parameter, required in frozen:
        parameter.requires_grad_(required)
