"""The study that the workers of a sweep share, through a file or a database: there is nobody else to ask.

Each worker takes a trial, runs it, tells how it went, and takes the next. It holds a lease for its trial: one that
died, or left because its job goes back into the queue, leaves a trial that is running for nobody, and whoever finds
it takes it over, with its number and its folder, where its run can be gone on with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from weft.recipes.schema import ConfigError
from weft.records import lease
from weft.sweeps.settings import Space, SweepConfig, SweepResult

MOST_RETRIES = 3  # of a trial whose worker died
STALE_SECONDS = 15  # after which the lock of the journal is that of a process which died while it wrote
HIDDEN = ("retries", "coordinator")  # notes on a trial that are no result


@dataclass
class Taken:
    """A trial in progress: Optuna's own, and its settings by name."""

    trial: Any
    params: dict[str, Any]


class Study:
    """One sweep's trials. Any number of processes may hold one on the same folder."""

    def __init__(self, config: SweepConfig, space: Space, folder: Path) -> None:
        import optuna

        self.config, self.space, self.folder = config, space, folder
        self.optuna, self.State = optuna, optuna.trial.TrialState
        self.storage = config.storage or str(_file_in(folder))
        with self.quiet():
            self.study = optuna.create_study(
                storage=_opened(self.storage),
                study_name=config.name,
                load_if_exists=True,
                direction="minimize" if config.mode == "min" else "maximize",
                pruner=_pruner(config.pruner),
            )
        points = len(list(self._grid())) if config.sampler == "grid" else 0
        self.num_trials = min(config.trials or points, points) if points else config.trials or 20

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within: Optuna says nothing below a warning."""
        import warnings

        before = self.optuna.logging.get_verbosity()
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
                yield
        finally:
            self.optuna.logging.set_verbosity(before)

    def begin(self) -> None:
        """Once for each call of `sweep`, before any worker: check the space, and put a grid's points into the queue.

        Raises ConfigError if this sweep searched another space before.
        """
        ours = json.loads(json.dumps({k: list(v) if isinstance(v, tuple) else v for k, v in self.space.items()}))
        theirs = self.study.user_attrs.get("space")
        if theirs is not None and theirs != ours:
            told = f"this sweep is there already, with the space {theirs}; choose another name"
            raise ConfigError([f"name={self.config.name!r}: {told}"])
        self.study.set_user_attr("space", ours)
        self.study.set_user_attr("failed_before", len(self._failed()))
        if self.config.sampler == "grid":
            self._enqueue_grid()

    def _grid(self) -> Iterator[dict[str, Any]]:
        values = [_grid_values(spec) for spec in self.space.values()]
        return (dict(zip(self.space, point, strict=True)) for point in product(*values))

    def _enqueue_grid(self) -> None:
        there = [t.params or t.system_attrs.get("fixed_params") for t in self.trials() if t.state != self.State.FAIL]
        for point in self._grid():
            if point not in there:
                self.study.enqueue_trial(point)

    def trials(self, *states: Any) -> list[Any]:
        """Those in one of `states`; all if none is named."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def take(self) -> Taken | None:
        """The next trial for this process: one that is running for nobody, or a new one. None if there is none left."""
        with self.quiet():
            for frozen in self.trials(self.State.RUNNING):
                if (taken := self._take_over(frozen)) is not None:
                    return taken
            while not self._enough(self.trials()) and not self.too_many_failures():
                trial = self.study.ask()
                if self._enough(t for t in self.trials() if t.number < trial.number):  # another one was quicker
                    trial.set_user_attr("superfluous", True)
                    self.study.tell(trial, state=self.State.FAIL)
                    return None
                if self._hold(trial.number):  # else another one took it over at once
                    return self._taken(trial)
        return None

    def _enough(self, trials: Iterable[Any]) -> bool:
        counted = (self.State.COMPLETE, self.State.PRUNED, self.State.RUNNING)
        return sum(t.state in counted for t in trials) >= self.num_trials

    def _take_over(self, frozen: Any) -> Taken | None:
        place = self._lease(frozen.number)
        if lease.owner(place) is not None and not self.config.take_over:
            return None
        retries = frozen.user_attrs.get("retries", 0) + (not lease.was_given_back(place))
        if not self._hold(frozen.number):
            return None
        trial = self.optuna.trial.Trial(self.study, frozen._trial_id)
        if self.study._storage.get_trial(frozen._trial_id).state != self.State.RUNNING:  # it was over in the meantime
            lease.release(place)
            return None
        trial.set_user_attr("retries", retries)
        if retries <= MOST_RETRIES:
            return self._taken(trial)
        told = f"the worker of trial {frozen.number} died again and again"
        self.tell(Taken(trial, {}), "failed", None, {"error": told})
        return None

    def _taken(self, trial: Any) -> Taken:
        self._choose_sampler(trial.number)
        return Taken(trial, {name: _suggested(trial, name, spec) for name, spec in self.space.items()})

    def _lease(self, number: int) -> Path:
        return self.folder / "owners" / f"trial-{number:04d}"

    def _hold(self, number: int) -> bool:
        """Make this process the one that runs the trial; False if another one does."""
        try:
            lease.acquire(self._lease(number))
        except lease.RunInUseError:
            return False
        return True

    def _choose_sampler(self, number: int) -> None:
        """A sampler for one trial. Its seed is the trial's, so that no worker proposes what another one did."""
        seed = None if self.config.seed is None else self.config.seed + number
        samplers = self.optuna.samplers
        if self.config.sampler == "tpe":
            self.study.sampler = samplers.TPESampler(seed=seed, constant_liar=self.config.workers > 1)
        else:
            self.study.sampler = samplers.RandomSampler(seed)

    def held(self) -> list[tuple[int, str]]:
        """Trials that other processes run: (number, who)."""
        owners = [(t.number, lease.owner(self._lease(t.number))) for t in self.trials(self.State.RUNNING)]
        return [(number, owner) for number, owner in owners if owner is not None]

    def tell(self, taken: Taken, kind: str, value: float | None, notes: Mapping[str, Any]) -> None:
        """How a trial ended: "done" with its value, "pruned", "diverged" or "failed"."""
        for name, note in notes.items():
            taken.trial.set_user_attr(name, note)
        if kind == "done":
            self.study.tell(taken.trial, value)
        else:
            self.study.tell(taken.trial, state=self.State.FAIL if kind == "failed" else self.State.PRUNED)
        lease.release(self._lease(taken.trial.number))

    def errors(self) -> list[str]:
        """What the trials that failed since the last call of `sweep` said."""
        return self._failed()[self.study.user_attrs.get("failed_before", 0) :]

    def _failed(self) -> list[str]:
        return [str(t.user_attrs["error"]) for t in self.trials(self.State.FAIL) if "error" in t.user_attrs]

    def too_many_failures(self) -> bool:
        """Whether more trials failed than may."""
        return len(self.errors()) > self.config.max_failures

    def result(self) -> SweepResult:
        """What was found so far."""
        finished = [t for t in self.trials() if t.state.is_finished() and "superfluous" not in t.user_attrs]
        complete = [t for t in finished if t.state == self.State.COMPLETE]
        sign = 1 if self.config.mode == "min" else -1
        best = min(complete, key=lambda t: sign * (t.value or 0.0), default=None)
        trials = [
            {
                "number": t.number,
                "state": t.state.name.lower(),
                "value": t.value,
                "params": dict(t.params),
                **{k: v for k, v in t.user_attrs.items() if k not in HIDDEN},
            }
            for t in finished
        ]
        found = (dict(best.params), best.value, best.number) if best else ({}, None, None)
        return SweepResult(*found, trials, self.folder, self.config.name, self.storage, self.config.mode)


# ------------------------------------------------------------------------------------------------ Optuna's words


def _file_in(folder: Path) -> Path:
    """The journal in the sweep's folder; a sweep that was begun with a database goes on with it."""
    database = folder / "sweep.db"
    return database if database.exists() else folder / "sweep.journal"


def _opened(storage: str) -> Any:
    """Optuna's storage: a journal for a path, so that a folder shared by machines needs no server."""
    if "://" in storage:
        return storage
    if storage.endswith(".db"):
        return f"sqlite:///{storage}"
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    return JournalStorage(JournalFileBackend(storage, JournalFileSymlinkLock(storage, grace_period=STALE_SECONDS)))


def _suggested(trial: Any, name: str, spec: Any) -> Any:
    if isinstance(spec, list | tuple):
        return trial.suggest_categorical(name, list(spec))
    low, high, step, log = spec["low"], spec["high"], spec.get("step"), bool(spec.get("log"))
    if all(isinstance(v, int) for v in (low, high, step or 1)):
        return trial.suggest_int(name, low, high, step=step or 1, log=log)
    return trial.suggest_float(name, low, high, step=step, log=log)


def _grid_values(spec: Any) -> list[Any]:
    if isinstance(spec, list | tuple):
        return list(spec)
    count = math.floor((spec["high"] - spec["low"]) / spec["step"] + 1e-9) + 1
    return [spec["low"] + i * spec["step"] for i in range(count)]


def _pruner(name: str) -> Any:
    import optuna

    return {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2),
        "halving": optuna.pruners.SuccessiveHalvingPruner,
        "none": optuna.pruners.NopPruner,
    }[name]()
