"""What is said when a fit is over, and when another goes on from it. Loaded where there is something to say."""

from __future__ import annotations

import math
from typing import Any

from weft.step.state import RunState


def tell_of_used_up(schedules: dict[str, Any], state: RunState) -> None:
    """Warn of schedules that earlier fits of this problem have used up, or that have come down to nothing."""
    for name, schedule in schedules.items():
        for scheduler in _in_force(schedule.scheduler):
            kind, done = type(scheduler).__name__, getattr(scheduler, "last_epoch", 0)
            option, then = _LENGTHS.get(kind, ("", ""))
            if option and done >= getattr(scheduler, option):
                used = f"({kind}, {option}={getattr(scheduler, option)}) is used up: it has made {done} steps"
            elif all(float(group.get("lr", 1.0)) <= 0.0 for group in state.training.optimizers[name].param_groups):
                used, then = f"({kind}) has come down to a rate of 0", "Nothing trains at that rate."
            else:
                continue
            state.warn_once(
                f"Schedule {name!r} {used} in earlier fits. {then} Make it long enough for all fits, or train on with "
                "a new Trainer."
            )
            break


def _in_force(scheduler: Any) -> list[Any]:
    """A scheduler, or those that one of several asks now: the last of a sequence, all of a chain."""
    inner = getattr(scheduler, "_schedulers", None)
    if not inner:
        return [scheduler]
    return [one for each in (inner[-1:] if hasattr(scheduler, "_milestones") else inner) for one in _in_force(each)]


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
