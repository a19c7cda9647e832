"""The stages of a run: which optimizers, schedules, term weights and frozen parts are in force."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from weft.compile.choosing import compile_update
from weft.data.data import Data, as_data
from weft.problem.reading import set_term_weights
from weft.step.manual import make_update
from weft.step.optimizers import build_optimizers, build_schedulers, submodule

if TYPE_CHECKING:
    from weft.loop.run import Run

Frozen = list[tuple[nn.Parameter, bool]]
"""Parameters that do not train in a phase, and whether they did before."""


def begin_phases(run: Run, resumed: bool) -> None:
    """Begin the phase that this run starts in; a resumed one goes through those before it, up to its own."""
    if resumed:
        for number in range(run.progress.phase + 1):
            run.progress.phase = number
            begin_phase(run)
    else:
        begin_phase(run, anew=not run.continues or not run.optimizers)


def num_epochs(run: Run) -> int:
    """The epochs of all phases together; with `fast_dev_run` at most one."""
    planned = sum(phase.epochs for phase in run.trainer.phases) or run.config.epochs
    return min(1, planned) if run.config.fast_dev_run else planned


def data_of_phase(run: Run) -> Data | None:
    """The data of the phase in force, or of the last one before that brought its own; None: those of the fit."""
    given = [phase.data for phase in run.phases[: run.progress.phase + 1] if phase.data is not None]
    return as_data(given[-1]) if given else None


def in_phase(run: Run) -> bool:
    """Whether a phase is in force for one more epoch; where one is over the next begins. False after the last.

    Its data is there too, made anew if it is time to (`refresh_every`).
    """
    progress = run.progress
    if progress.phase_ended or (progress.phase_epoch >= run.phase.epochs and len(run.phases) > 1):
        if progress.phase + 1 == len(run.phases):
            return False
        progress.phase, progress.phase_epoch, progress.phase_ended = progress.phase + 1, 0, ""
        if run.phase.data is not None:
            run.renew_data()
        begin_phase(run)
    if run.data.refresh_every and progress.epoch - progress.data_epoch >= run.data.refresh_every:
        run.renew_data()
    return True


def begin_phase(run: Run, anew: bool = True) -> None:
    """Put the phase of `run.progress` in force. Without `anew` a run goes on in it: optimizers and weights are there."""
    phase = run.phase
    unfreeze(run.frozen)
    if anew:
        if phase.weights:
            set_term_weights(run.problem, dict(phase.weights))
        if phase.setup is not None:
            phase.setup(run.trainer)
        _make_optimizers(run)
    run.frozen = freeze(run.problem, phase.freeze)
    run.own_steps, run.plain_update, run.forwards = {}, None, {}
    run.update = compile_update(run, make_update(run))


def _make_optimizers(run: Run) -> None:
    """The optimizers and schedules of the phase. Those of the one before go on where it names none.

    A second fit goes on with the optimizers it has, unless a later phase has replaced those of the first.
    """
    phase, options, is_first = run.phase, run.trainer.options, run.progress.phase == 0
    replaced = any(p.optimizer is not None or p.scheduler is not None for p in run.phases[1:])
    if is_first and run.optimizers and not replaced:
        return
    if is_first or phase.optimizer is not None:
        given = phase.optimizer if phase.optimizer is not None else run.trainer.configure_optimizers()
        # before anything is frozen: what trains in a later phase must be in the optimizer
        run.optimizers, run.schedules = build_optimizers(given, run.problem), {}
        run.processes.arrange(run.optimizers)
    # read after configure_optimizers, which may have set it
    scheduler = options["scheduler"] if phase.scheduler is None and is_first else phase.scheduler
    if scheduler is not None:
        run.schedules = build_schedulers(scheduler, run.optimizers)


def freeze(problem: nn.Module, names: Iterable[str]) -> Frozen:
    """Stop the training of the named nodes or submodules; `unfreeze` puts it back."""
    parameters = [p for name in names for p in submodule(problem, name).parameters()]
    frozen = [(p, p.requires_grad) for p in dict.fromkeys(parameters)]
    for p, _ in frozen:
        p.requires_grad_(False)
    return frozen


def unfreeze(frozen: Frozen) -> None:
    """Let the parameters train again that did before."""
    for parameter, required in frozen:
        parameter.requires_grad_(required)

