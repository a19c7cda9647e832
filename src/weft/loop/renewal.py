"""The options as they are now instead of the checkpoint's: `fit(..., resume=..., renew=("optimizer", "scheduler"))`."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from weft.step.schedules import Scheduled, build_schedulers

if TYPE_CHECKING:
    from weft.step.state import RunState

KINDS = ("optimizer", "scheduler")


def checked(renew: Any, resume: Any) -> tuple[str, ...]:
    """The `renew` argument of a fit as a tuple. Raises ValueError for what it cannot name, and without `resume`."""
    names = (renew,) if isinstance(renew, str) else tuple(renew or ())
    if wrong := [name for name in names if name not in KINDS]:
        raise ValueError(f"fit: renew={renew!r} names {wrong[0]!r}; expected some of {KINDS}.")
    if names and resume is None:
        raise ValueError(f"fit: renew={renew!r} says what wins over a checkpoint; give resume as well.")
    return names


class Renewal:
    """What is new about optimizers and schedules, taken before a checkpoint is put back, and put in force after it.

    An optimizer keeps what it has gathered (moments) and gets the options of its groups as they are now. A scheduler is
    made anew and stepped to where it would be.
    """

    def __init__(self, state: RunState, renew: tuple[str, ...]) -> None:
        self.of_optimizers, self.of_schedulers = "optimizer" in renew, "scheduler" in renew
        self.options = {name: _options(o) for name, o in state.training.optimizers.items()}
        schedulers = [s.scheduler for s in state.training.schedules.values()] if self.of_schedulers else []
        self.fresh = {id(scheduler): Fresh(scheduler) for scheduler in schedulers}

    def apply(self, state: RunState, saved: Mapping[str, Any]) -> None:
        """Put the new side in force."""
        if self.of_optimizers:
            for name, optimizer in state.training.optimizers.items():
                schedule = None if self.of_schedulers else state.training.schedules.get(name)
                _set_options(optimizer, self.options[name], schedule)
        if self.of_schedulers:
            _make_schedules(state, saved, self.fresh)


class Fresh:
    """A scheduler as it was given, before a checkpoint is put back: so one that is an object begins anew."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.optimizer = scheduler, getattr(scheduler, "optimizer", None)
        self.state = copy.deepcopy(scheduler.state_dict()) if hasattr(scheduler, "state_dict") else {}
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        self.groups = [{k: v for k, v in g.items() if k != "params"} for g in groups]

    def put_back(self) -> None:
        """As before the first step, from the rates that the optimizer's groups have now (where it does not bring its
        own). TypeError for one that had stepped already."""
        if self.optimizer is None or self.state.get("last_epoch", 0) > 0:
            why = "has no `optimizer`" if self.optimizer is None else "has stepped before"
            raise TypeError(
                f"fit: renew='scheduler' makes the scheduler anew, and this {type(self.scheduler).__name__} {why}; "
                "give it as a function of the optimizer."
            )
        self.scheduler.load_state_dict(copy.deepcopy(self.state))
        bases = getattr(self.scheduler, "base_lrs", None)
        for number, (group, then) in enumerate(zip(self.optimizer.param_groups, self.groups, strict=True)):
            if "max_lr" in then or hasattr(self.scheduler, "max_lrs"):  # the whole cycle is its own
                rate = then["lr"]
                group.update({k: v for k, v in then.items() if k in _OF_CYCLES or k not in group})
            else:
                now = float(group["lr"])
                factor = float(then["lr"]) / float(then["initial_lr"]) if then.get("initial_lr") else 1.0
                rate, group["initial_lr"] = now * factor, now
                if bases is not None:
                    bases[number] = now
            _set_rate(group, rate)


_OF_CYCLES = ("initial_lr", "max_lr", "min_lr", "momentum", "betas", "base_momentum", "max_momentum")
"""What OneCycleLR and CyclicLR write into the groups of an optimizer."""


def rebase(scheduler: Any) -> None:
    """Have a scheduler go on as far as it is, from the rates that its optimizer's groups begin with now."""
    bases: Any = getattr(scheduler, "base_lrs", None)
    last: Any = getattr(scheduler, "_last_lr", None)
    for number, group in enumerate(scheduler.optimizer.param_groups if bases and last else []):
        new, before = float(group.get("initial_lr", group["lr"])), float(bases[number])
        _set_rate(group, new * float(last[number]) / before if before else new)
        bases[number] = new


def begin_at_base(optimizer: Optimizer) -> None:
    """Give the groups of an optimizer the rates that they began with, as if no scheduler had stepped."""
    optimizer._opt_called = True  # type: ignore[attr-defined]  # else torch warns of steps before the first update
    for group in optimizer.param_groups:
        if "initial_lr" in group:
            _set_rate(group, group.pop("initial_lr"))


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each group, with the learning rate that schedules start from."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [{**group, "lr": group.get("initial_lr", group["lr"])} if "lr" in group else group for group in groups]


def _set_options(optimizer: Optimizer, options: list[dict[str, Any]], schedule: Scheduled | None) -> None:
    """The learning rate too; where a schedule goes on, in the same proportion to the rate it starts from as before."""
    for number, (group, new) in enumerate(zip(optimizer.param_groups, options, strict=True)):
        if "lr" not in new:  # a line search has no rate
            group.update(new)
            continue
        before = group.get("initial_lr")
        factor = float(group["lr"]) / float(before) if schedule is not None and before else 1.0
        group.update({k: v for k, v in new.items() if k not in ("lr", "initial_lr")})
        _set_rate(group, new["lr"] * factor)
        if schedule is not None or "initial_lr" in group:
            group["initial_lr"] = new["lr"]
        if schedule is not None and (base := getattr(schedule.scheduler, "base_lrs", None)) is not None:
            base[number] = new["lr"]


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = float(rate)


def _make_schedules(state: RunState, saved: Mapping[str, Any], fresh: Mapping[int, Fresh]) -> None:
    """The schedules of the options, each as far as one is that was there from the beginning."""
    given, training = _scheduler_in_force(state), state.training
    for optimizer in training.optimizers.values():
        begin_at_base(optimizer)
    training.step_by(build_schedulers(given, training.optimizers))
    for name, schedule in training.schedules.items():
        if id(schedule.scheduler) in fresh:  # it was given as an object, which is still the one
            fresh[id(schedule.scheduler)].put_back()
        count = _steps_done(state, name, schedule, saved)
        if schedule.wants_metric:
            column = state.history.values.get(schedule.monitor or state.best.name or "", [])
            for value in column[max(0, len(column) - count) :]:
                if not math.isnan(value):  # as it is where an epoch was not validated
                    schedule.step({"": value}, "")
            schedule.asked = count
        else:
            for _ in range(count):
                schedule.step({}, None)


def _steps_done(state: RunState, name: str, schedule: Scheduled, saved: Mapping[str, Any]) -> int:
    """How often the schedule would have been asked to step: as often as the one in the checkpoint, if it was alike."""
    if name in saved["schedules"] and f" each {schedule.interval}" in saved["fixed"]["schedulers"]:
        return saved["schedules"][name]["asked"]
    progress = state.progress
    if schedule.interval == "step":
        return progress.step
    return progress.epoch if len(state.training.phases) == 1 else progress.phase_epoch


def _scheduler_in_force(state: RunState) -> Any:
    """The `scheduler` of the phase in force, or of the one before that it goes on from."""
    given = None
    for number, phase in enumerate(state.training.phases[: state.progress.phase + 1]):
        own = state.trainer.options["scheduler"] if phase.scheduler is None and number == 0 else phase.scheduler
        given = own if own is not None or phase.optimizer is not None else given
    return given
