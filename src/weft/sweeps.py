"""Searches for good settings: many short runs, in parallel, with Optuna deciding what to try next.

    def train(trial):
        adam = lambda params: torch.optim.Adam(params, trial["lr"])
        trainer = weft.Trainer(epochs=50, optimizer=adam, hooks=trial.hook)
        return trainer.fit(make_problem(), data_setup, batch_size=trial["batch_size"])

    space = {"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "batch_size": [32, 64]}
    weft.sweep(train, space, trials=20, workers=3).best_params

Instead of a function, `run` may be a config (a dict or the path of a YAML file); the names of the space are then its
options ("optimizer.lr"). One process asks and tells; workers are processes of their own, each at the end of a pipe. A
worker that dies loses nothing but time: its trial is marked as failed, and its settings are tried again. A sweep that
was killed goes on where it was when it is started again under the same name.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from weft import yamlfile
from weft.config import check, complaints
from weft.schema import ConfigError
from weft.trials import Worker, work_of
from weft.types import suggest

Space = Mapping[str, Any]
MOST_RETRIES = 3  # of the settings of one trial whose worker died


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How a sweep searches."""

    trials: int | None = None
    """How many trials are to be completed, pruned ones included (>= 1); None: 20, or the whole grid."""
    workers: int = 1
    """How many trials run at the same time (>= 1)."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """Who proposes settings: "tpe" learns from the trials before, "random" does not, "grid" tries all."""
    pruner: Literal["median", "halving", "none"] = "none"
    """Who ends a bad trial at the end of an epoch: "median", "halving" (asynchronous successive halving), or nobody."""
    metric: str | None = None
    """The metric to optimise; None: the one that decides about best weights."""
    mode: Literal["min", "max"] = "min"
    """Whether smaller ("min") or larger ("max") is better."""
    seed: int | None = None
    """Seed of the sampler (>= 0); None: random."""
    name: str = "sweep"
    """The name of the sweep: its folder below root_dir, and its study in the database."""
    root_dir: str = "runs"
    """The folder that the sweep's own folder goes into."""
    storage: str | None = None
    """A database by URL (postgresql://..., mysql://...) for several machines; None: SQLite in the sweep's folder."""
    max_failures: int = 3
    """After more trials than this that raised an error, the sweep ends with the first one (>= 0)."""
    take_over: bool = False
    """Treat trials that run on other machines as lost, and try their settings again."""

    def __post_init__(self) -> None:
        check(self)


@dataclass
class SweepResult:
    """What a sweep found: the best settings, their value, and all trials."""

    best_params: dict[str, Any]
    best_value: float | None
    best_trial: int | None
    """The number of the best trial; its run is in the folder `trial-NNNN`."""
    trials: list[dict[str, Any]]
    """All trials in order: number, state ("complete", "pruned", "fail"), value, params, and what the run said."""
    folder: Path
    name: str
    storage: str

    def __repr__(self) -> str:
        counts = {state: sum(t["state"] == state for t in self.trials) for state in ("complete", "pruned", "fail")}
        said = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
        best = (
            f"; best {self.best_value:.6g} in trial {self.best_trial} with {self.best_params}"
            if self.best_value is not None
            else ""
        )
        return f"SweepResult({said}{best}; {self.folder})"

    def to_dataframe(self) -> Any:
        """The trials as a pandas DataFrame, one row each. Needs pandas."""
        import pandas

        return pandas.DataFrame([{**t, **t["params"]} for t in self.trials]).drop(columns="params")


def sweep(run: Callable[[Any], Any] | Mapping[str, Any] | str | Path, space: Space, **options: Any) -> SweepResult:
    """Try settings from `space` until so many trials are completed, and return what was found.

    `run`: a config, or a function of a trial (`trial["lr"]`, `trial.hook`, `trial.folder`, `trial.number`) that returns
    a FitResult or a number. `space`: by name, a list of choices or {low, high} with `log` or `step`; whole numbers if
    both ends are. `options` are the fields of `SweepConfig`. A trial whose numbers stop being finite counts as pruned.

    Raises ConfigError for a wrong space or option, RuntimeError if more than `max_failures` trials failed. Needs
    Optuna.
    """
    if wrong := complaints(SweepConfig, options) + space_complaints(space, options.get("sampler", "tpe")):
        raise ConfigError(wrong)
    config = SweepConfig(**options)
    folder = Path(config.root_dir) / config.name
    work = work_of(run, space, folder, config.metric)
    folder.mkdir(parents=True, exist_ok=True)
    coordinator = _Coordinator(config, space, folder.resolve(), work)
    try:
        coordinator.run()
    finally:
        coordinator.close()
    return coordinator.result()


def sweep_from_file(path: str | Path, options: Mapping[str, Any] | None = None) -> SweepResult:
    """The sweep that a YAML file describes: `run`, `space` and the options of `SweepConfig`; `options` go first."""
    try:
        said = yamlfile.load_file(path)
    except FileNotFoundError:
        raise ConfigError([f"there is no file {path}"]) from None
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    if not isinstance(said, dict) or "run" not in said or "space" not in said:
        raise ConfigError([f"{path}: expected `run` (a config, or its path), `space`, and options of the sweep"])
    run, space = said.pop("run"), said.pop("space")
    run = Path(path).parent / run if isinstance(run, str) else run
    said.setdefault("name", Path(path).stem)
    return sweep(run, space, **{**said, **(options or {})})


def space_complaints(space: Any, sampler: str) -> list[str]:
    """What is wrong with a search space, one line each."""
    if not isinstance(space, Mapping) or not space:
        return [f"space={space!r}: expected a dict of choices or ranges by name"]
    wrong = []
    for name, spec in space.items():
        if isinstance(spec, list | tuple):
            if not spec or not all(v is None or isinstance(v, bool | int | float | str) for v in spec):
                wrong.append(f"space.{name}={spec!r}: expected a list of numbers, texts, true, false or null")
            continue
        if not isinstance(spec, Mapping):
            wrong.append(f"space.{name}={spec!r}: expected a list of choices, or {{low, high}}")
            continue
        known = ("low", "high", "log", "step")
        wrong += [
            f"space.{name}.{k}={spec[k]!r}: there is no such key{suggest(str(k), known)}"
            for k in spec
            if k not in known
        ]
        low: Any = spec.get("low")
        high: Any = spec.get("high")
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in (low, high)) or low > high:
            wrong.append(f"space.{name}={dict(spec)!r}: expected numbers with low <= high")
        elif spec.get("log") and low <= 0:
            wrong.append(f"space.{name}.low={low!r}: must be greater than 0 with log: true")
        elif spec.get("log") and spec.get("step"):
            wrong.append(f"space.{name}: expected log or step, not both")
        elif sampler == "grid" and not spec.get("step"):
            wrong.append(f"space.{name}: a grid needs a list of choices, or a step")
    return wrong


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
            storage=self.storage, study_name=config.name, load_if_exists=True,
            direction="minimize" if config.mode == "min" else "maximize", pruner=_pruner(config.pruner),
        )  # fmt: skip
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
                "number": t.number, "state": t.state.name.lower(), "value": t.value, "params": dict(t.params),
                **{k: v for k, v in t.user_attrs.items() if k not in hidden},
            }
            for t in finished
        ]  # fmt: skip
        return SweepResult(
            dict(best.params) if best else {}, best.value if best else None, best.number if best else None,
            trials, self.folder, self.config.name, self.storage,
        )  # fmt: skip


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
