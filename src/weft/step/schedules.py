"""Schedules: schedulers in a run, when they step, and with which metric. Loaded where one is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from weft.step.phase import Schedule
from weft.types import suggest


@dataclass
class Scheduled:
    """A scheduler in a run: the object, when it steps, and how often it was asked to."""

    scheduler: Any
    interval: str
    monitor: str | None
    frequency: int = 1
    asked: int = field(default=0)

    @property
    def wants_metric(self) -> bool:
        """Whether `scheduler.step` must be given a metric, as ReduceLROnPlateau's."""
        arguments = list(inspect.signature(self.scheduler.step).parameters.values())
        return bool(arguments) and arguments[0].default is inspect.Parameter.empty

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.asked = state_dict["asked"]
        self.scheduler.load_state_dict(dict(state_dict["scheduler"]))  # CyclicLR takes entries out

    def step(self, metrics: Mapping[str, float], default_monitor: str | None, complete: bool = True) -> None:
        """Step if it is this schedule's turn; one with a metric only after epochs that measured it.

        `complete`: the epoch was validated, or there is no dev set. Then a metric that is missing raises ValueError.
        """
        self.asked += 1
        if self.asked % self.frequency:
            return
        if not self.wants_metric:
            self.scheduler.step()
        elif (name := self.monitor or default_monitor or "") in metrics:
            self.scheduler.step(metrics[name])
        elif complete:
            raise ValueError(
                f"{type(self.scheduler).__name__} needs the metric {name!r}, which this epoch did not measure; "
                f"there are {sorted(metrics)}{suggest(name, metrics) or '.'}"
            )


def build_schedulers(given: Any, optimizers: Mapping[str, Optimizer]) -> dict[str, Scheduled]:
    """The schedulers by name of their optimizer, made of factories, instances or `Schedule`s of either."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        if len(optimizers) > 1 and not isinstance(getattr(given, "factory", given), LRScheduler):
            raise ValueError(
                f"With several optimizers {list(optimizers)}, give a dict of schedulers by the same names."
            )
        given = {next(iter(optimizers)): given}
    built = {}
    for name, item in given.items():
        if name not in optimizers:
            raise ValueError(
                f"There is a scheduler for {name!r}, but no such optimizer{suggest(name, optimizers) or '.'}"
            )
        schedule = item if isinstance(item, Schedule) else Schedule(item)
        scheduler = schedule.factory
        if not isinstance(scheduler, LRScheduler):
            if not callable(scheduler):
                raise TypeError(
                    f"scheduler {name!r} is {scheduler!r}; expected a scheduler or a function of the optimizer."
                )
            if isinstance(scheduler, type):
                from weft.words.calls import check_call

                check_call(f"scheduler {name!r}, the class {scheduler.__name__},", scheduler, ("optimizer",))
            scheduler = scheduler(optimizers[name])
        if not hasattr(scheduler, "step"):
            raise TypeError(
                f"The factory of scheduler {name!r} returned {type(scheduler).__name__}, which has no step()."
            )
        owner = getattr(scheduler, "optimizer", None)
        if owner is not None and all(owner is not o for o in optimizers.values()):
            raise ValueError(
                f"Scheduler {type(scheduler).__name__} belongs to another optimizer than the one that trains."
            )
        built[name] = Scheduled(scheduler, schedule.interval, schedule.monitor, schedule.frequency)
        kind, wants_metric = type(scheduler).__name__, built[name].wants_metric
        if wants_metric and schedule.interval == "step":
            raise ValueError(f"Scheduler {kind} follows a metric, which is known once an epoch: use interval='epoch'.")
        if schedule.monitor is not None and not wants_metric:
            raise ValueError(f"Scheduler {kind} takes no metric: monitor={schedule.monitor!r} would have no effect.")
    return built
