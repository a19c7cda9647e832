"""The coordinator of a sweep's workers."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from weft.recipes.schema import ConfigError
from weft.sweeps.settings import Space, SweepConfig, SweepResult
from weft.sweeps.worker import Worker

MOST_RETRIES = 3  # of the settings of one trial whose worker died


# ------------------------------------------------------------------------------------------------ the coordinator


@dataclass
class _Running:
    """A trial in progress."""

    trial: Any
    params: dict[str, Any]
    retries: int = 0
    reports: int = 0


@dataclass
class _Coordinator:
    """Asks for settings, hands them to workers, and tells how they did. The only one that touches the study."""

    config: SweepConfig
    space: Space
    folder: Path
    work: bytes
    workers: list[Worker] = field(default_factory=list)
    running: dict[Worker, _Running] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        import optuna

        config = self.config
        self.optuna, self.State = optuna, optuna.trial.TrialState
        self._verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = config.storage or f"sqlite:///{self.folder / 'sweep.db'}"
        self.study = optuna.create_study(
            storage=self.storage,
            study_name=config.name,
            load_if_exists=True,
            direction="minimize" if config.mode == "min" else "maximize",
            pruner=_pruner(config.pruner),
        )
        self._check_space()
        self.me = f"{platform.node()}:{os.getpid()}"
        seed = None if config.seed is None else config.seed + len(self.study.get_trials(deepcopy=False))
        samplers = optuna.samplers  # a resumed sweep must not propose its first settings again: the seed moves on
        if config.sampler == "tpe":
            self.study.sampler = samplers.TPESampler(seed=seed, constant_liar=config.workers > 1)
        else:
            self.study.sampler = samplers.RandomSampler(seed)
        self._take_up_lost_trials()
        self.num_trials = config.trials or 20
        if config.sampler == "grid":
            self._enqueue_grid()

    def _check_space(self) -> None:
        """A study that searched another space is another sweep."""
        ours = json.loads(json.dumps({k: list(v) if isinstance(v, tuple) else v for k, v in self.space.items()}))
        theirs = self.study.user_attrs.get("space")
        if theirs is not None and theirs != ours:
            told = f"this sweep is there already, with the space {theirs}; choose another name"
            raise ConfigError([f"name={self.config.name!r}: {told}"])
        self.study.set_user_attr("space", ours)

    def _take_up_lost_trials(self) -> None:
        """Trials whose coordinator is gone: failed, and their settings tried again."""
        host = platform.node()
        for frozen in self.study.get_trials(deepcopy=False, states=(self.State.RUNNING,)):
            owner = str(frozen.user_attrs.get("coordinator", "")).rpartition(":")
            is_lost = owner[0] == host and (owner[2] == str(os.getpid()) or not _is_alive(int(owner[2])))
            if is_lost or self.config.take_over or not owner[2]:
                self.study.tell(frozen.number, state=self.State.FAIL)
                self._enqueue(frozen.params, frozen.user_attrs.get("retries", 0))

    def _enqueue(self, params: Mapping[str, Any], retries: int) -> None:
        if set(params) == set(self.space):  # one that was lost before all was asked for has nothing to repeat
            self.study.enqueue_trial(dict(params), user_attrs={"retries": retries})

    def _enqueue_grid(self) -> None:
        values = [_grid_values(spec) for spec in self.space.values()]
        points = [dict(zip(self.space, point, strict=True)) for point in product(*values)]
        states = (self.State.COMPLETE, self.State.PRUNED, self.State.RUNNING, self.State.WAITING)
        there = [
            f.params or f.system_attrs.get("fixed_params") for f in self.study.get_trials(deepcopy=False, states=states)
        ]
        for point in points:
            if point not in there:
                self.study.enqueue_trial(point)
        self.num_trials = min(self.config.trials or len(points), len(points))

    def run(self) -> None:
        """Until so many trials are completed or pruned."""
        while True:
            self._start_trials()
            if not self.running:
                return
            for connection in wait([worker.connection for worker in self.running]):
                worker = next(w for w in self.running if w.connection is connection)
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    self._lost(worker)
                else:
                    self._heard(worker, message)
            if len(self.failures) > self.config.max_failures:
                raise RuntimeError(f"{len(self.failures)} trials failed; the first said:\n{self.failures[0]}")

    def _start_trials(self) -> None:
        while len(self.running) < self.config.workers:
            done = self.study.get_trials(
                deepcopy=False, states=(self.State.COMPLETE, self.State.PRUNED, self.State.RUNNING)
            )
            if len(done) >= self.num_trials:  # those in progress count: exactly so many are completed
                return
            trial = self.study.ask()
            trial.set_user_attr("coordinator", self.me)
            params = {name: _suggested(trial, name, spec) for name, spec in self.space.items()}
            worker = next((w for w in self.workers if w not in self.running), None) or self._new_worker()
            self.running[worker] = _Running(trial, params, trial.user_attrs.get("retries", 0))
            try:
                worker.connection.send((trial.number, params))
            except OSError:
                self._lost(worker)

    def _new_worker(self) -> Worker:
        taken = {w.number for w in self.workers}
        number = next(i for i in range(len(taken) + 1) if i not in taken)
        worker = Worker(number, self.config.workers, self.folder, self.work)
        self.workers.append(worker)
        return worker

    def _heard(self, worker: Worker, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        running = self.running[worker]
        trial = running.trial
        if kind == "epoch":
            epoch, value = rest
            trial.report(value, epoch)
            running.reports += 1
            try:
                worker.connection.send(self.config.pruner != "none" and trial.should_prune())
            except OSError:
                self._lost(worker)
            return
        del self.running[worker]
        value, notes = rest
        for name, note in notes.items():
            trial.set_user_attr(name, note)
        if kind == "failed":
            self.failures.append(notes["error"])
            self.study.tell(trial, state=self.State.FAIL)
        elif kind in ("pruned", "diverged"):
            self.study.tell(trial, state=self.State.PRUNED)
        else:
            self.study.tell(trial, value)
        self._say(kind, trial.number, value, running)

    def _say(self, kind: str, number: int, value: float | None, running: _Running) -> None:
        shown = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in running.params.items())
        what = f"{value:.6g}" if value is not None else kind
        print(
            f"trial {number}: {what}  {shown}" + ("  (pruned)" if kind == "pruned" else ""), file=sys.stderr, flush=True
        )
        if kind == "done" and self.config.pruner != "none" and not running.reports:
            print(
                f"trial {number} reported no epochs, so nothing can be pruned; give its trainer hooks=trial.hook",
                file=sys.stderr,
            )

    def _lost(self, worker: Worker) -> None:
        """The worker died: its trial failed, and its settings are tried again (a few times)."""
        running = self.running.pop(worker)
        self.workers.remove(worker)
        log = worker.close()
        self.study.tell(running.trial, state=self.State.FAIL)
        if running.retries < MOST_RETRIES:
            self._enqueue(running.params, running.retries + 1)
        else:
            self.failures.append(
                f"the worker of trial {running.trial.number} died again and again; the end of its log:\n{log}"
            )

    def close(self) -> None:
        """End all workers. What they were at is marked as failed and tried again by the next call."""
        for worker, running in self.running.items():
            worker.close()
            self.study.tell(running.trial, state=self.State.FAIL)
            self._enqueue(running.params, running.retries)
        for worker in self.workers:
            worker.close()
        self.optuna.logging.set_verbosity(self._verbosity)

    def result(self) -> SweepResult:
        """What was found so far."""
        finished = [t for t in self.study.get_trials(deepcopy=False) if t.state.is_finished()]
        complete = [t for t in finished if t.state == self.State.COMPLETE]
        sign = 1 if self.config.mode == "min" else -1
        best = min(complete, key=lambda t: sign * (t.value or 0.0), default=None)
        hidden = ("coordinator", "retries")
        trials = [
            {
                "number": t.number,
                "state": t.state.name.lower(),
                "value": t.value,
                "params": dict(t.params),
                **{k: v for k, v in t.user_attrs.items() if k not in hidden},
            }
            for t in finished
        ]
        return SweepResult(
            dict(best.params) if best else {},
            best.value if best else None,
            best.number if best else None,
            trials,
            self.folder,
            self.config.name,
            self.storage,
            self.config.mode,
        )


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


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
