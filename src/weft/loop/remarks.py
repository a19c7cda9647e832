"""What a fit says of its options before it trains, and of its metric when it is over: one line each, at most."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from weft.step.state import RunState


def tell_of_options(state: RunState, stops_itself: bool = False) -> None:
    """Warn once of the options that were given and have no effect in this fit, each with the reason.

    `stops_itself`: the problem has other ways than patience to end training.
    """
    if hasattr(state.problem, "own_output"):  # Supervised
        from weft.loop.mistakes import tell_of_one_batch

        tell_of_one_batch(state)
    if found := [f"{name} ({why})" for name, why in _without_effect(state, stops_itself)]:
        state.warn_once(f"No effect in this fit: {'; '.join(found)}.")


def _without_effect(state: RunState, stops_itself: bool) -> Iterator[tuple[str, str]]:
    config, given, data = state.config, state.trainer.options, state.feed.data
    is_patient = config.patience is not None or any(phase.patience for phase in state.training.phases)
    writes = state.kept.run_dir is not None or bool(config.fast_dev_run)
    logs = writes or given["loggers"] not in (None, False) or any(hasattr(hook, "loggers") for hook in state.hooks)
    resident = all(getattr(source, "resident", False) for source in state.feed.splits.values() if source is not None)
    no_patience = "nothing stops early: there is no patience"
    no_folder = "nothing is written: there is no root_dir, checkpoint or logger"
    table = (
        ("min_epochs", config.min_epochs and not (is_patient or stops_itself), no_patience),
        ("warmup", config.warmup and not is_patient, no_patience),
        ("min_delta", config.min_delta and not is_patient, no_patience),
        ("clip_algorithm", config.clip_algorithm != "norm" and config.clip is None, "nothing is clipped: clip=None"),
        ("validate_every", config.validate_every != 1 and not state.has("dev"), "there is no dev data"),
        ("num_workers", data.num_workers and resident, "the data are tensors, which are sliced without workers"),
        ("run_name", config.run_name is not None and not writes, no_folder),
        ("log_every", config.log_every and not logs, no_folder),
        ("timeout", config.timeout is not None and state.processes.world == 1, "there is one process"),
    )
    for name, is_idle, why in table:
        if is_idle:
            yield name, why


def tell_of_used_up(schedules: dict[str, Any], state: RunState) -> None:
    """Warn of schedules that have made all their steps in earlier fits of this problem."""
    for name, schedule in schedules.items():
        scheduler = schedule.scheduler
        kind, done = type(scheduler).__name__, getattr(scheduler, "last_epoch", 0)
        option, then = _LENGTHS.get(kind, ("", ""))
        if option and done >= getattr(scheduler, option):
            state.warn_once(
                f"Schedule {name!r} ({kind}, {option}={getattr(scheduler, option)}) is used up: it has made {done} "
                f"steps in earlier fits. {then} Make it long enough for all fits, or train on with a new Trainer."
            )


_LENGTHS = {
    "OneCycleLR": ("total_steps", "It raises at the next one."),
    "CosineAnnealingLR": ("T_max", "From here on the rate goes up again, as it came down."),
    "PolynomialLR": ("total_iters", "The rate stays at its end, 0."),
}
"""Schedules with an end: the attribute that says when, and what comes after it."""


def tell_of_no_best(state: RunState) -> None:
    """Warn if what was monitored was never a finite number: then there are no best weights."""
    monitor = state.epoch.monitor
    values = state.history.values.get(monitor or "", [])
    if monitor is not None and state.best.value is None and values and not any(map(math.isfinite, values)):
        state.warn_once(
            f"{monitor}, which is monitored, was not finite in any of {len(values)} epochs: there is no best epoch, "
            "and the problem holds the last weights."
        )


def tell_of_left_out(run: Any, path: Any) -> None:
    """Warn if a weights file cannot hold all that the run, if there was one, has trained."""
    if run is not None and (others := run.state.training.others.tensors):
        run.state.warn_once(
            f"save_weights: {path} lacks {', '.join(others)}, which only an optimizer holds: the problem does not "
            "register it. A checkpoint has it, and `result.last_others`."
        )
