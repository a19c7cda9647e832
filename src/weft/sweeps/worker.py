"""One trial of a sweep, and the process that runs one after the other: python -m weft.sweeps.worker FOLDER.

A worker is started by a command line of its own, not by importing the caller's script again, so a sweep needs no
`if __name__ == "__main__"` and works in a notebook. All it shares with the others is the sweep's folder.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.events import Hook
from weft.recipes.schema import ConfigError, with_option

if TYPE_CHECKING:
    from weft.sweeps.settings import SweepConfig
    from weft.sweeps.study import Study, Taken

WORK = "work.pkl"
_PARENT = "WEFT_SWEEP_PARENT"


class Worker:
    """A process on this machine that runs trials until none is left. It ends when the process that started it does."""

    def __init__(self, number: int, num_workers: int, folder: Path) -> None:
        self.number, self.log_path = number, folder / f"worker-{number}.log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}  # the job is its parent's
        environment |= {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path), _PARENT: str(os.getpid())}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_workers)))
        if gpus := _gpus():
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "weft.sweeps.worker", str(folder)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for its parent, which ends its workers
            )

    def log(self) -> str:
        """The end of what it printed."""
        return self.log_path.read_bytes()[-2000:].decode(errors="replace") if self.log_path.exists() else ""


def _gpus() -> list[str]:
    """The GPUs to share between workers, as CUDA names them; [] where there is no choice."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [v for v in visible.split(",") if v]
    else:
        import torch

        names = [str(i) for i in range(torch.cuda.device_count())]
    return names if len(names) > 1 else []


def work_of(run: Any, space: Mapping[str, Any], metric: str | None, keeps: bool) -> tuple[Any, str | None]:
    """What every worker does: the function that makes a trial of `run`, and the metric that is told.

    `keeps`: a config's trials write checkpoints, unless it says how.

    A config is checked here with the first settings of the space, before any worker starts. Raises ConfigError.
    """
    if callable(run):
        return run, metric
    from weft.recipes import recipe
    from weft.recipes.schema import normal

    source = recipe.Source(dict(run), [], []) if isinstance(run, Mapping) else recipe.read(run)
    config: Any = recipe.rooted(source.config, Path.cwd())
    wrong = list(source.wrong)
    for name, spec in space.items():
        try:
            config = with_option(config, name, _as_text(spec[0] if isinstance(spec, list | tuple) else spec["low"]))
        except ConfigError as error:
            wrong += [problem.replace("--", "space.", 1) for problem in error.problems]
    checked = recipe.check(recipe.Source(config, wrong, []), needed=("problem", "data"))
    trainer = checked.config.get("trainer", {})
    for name in ("devices", "num_nodes"):
        if trainer.get(name, 1) not in (1, "1", "auto"):
            raise ConfigError(
                [f"trainer.{name}={trainer[name]!r}: a trial runs in one process on one device; use workers"]
            )
    if metric is None and trainer.get("monitor_metric"):
        metric = trainer["monitor_metric"]
    plain, _ = normal(config)
    return ConfigRun(plain, keeps), metric


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class ConfigRun:
    """Runs a config with a trial's settings."""

    def __init__(self, config: Mapping[str, Any], keeps: bool) -> None:
        self.config, self.keeps = config, keeps

    def __call__(self, trial: Trial) -> Any:
        """The FitResult of the config with the trial's settings, in the trial's folder."""
        from weft.recipes import recipe

        config: Any = self.config
        for name, value in trial.params.items():
            config = with_option(config, name, _as_text(value))
        own = {"root_dir": str(trial.folder.parent), "run_name": trial.folder.name, "progress": False, "devices": 1}
        default = {"checkpoint": True} if self.keeps else {}
        config = {**config, "trainer": {**default, **config.get("trainer", {}), **own, "resume": "auto"}}
        made = recipe.make(recipe.check(config, needed=("problem", "data")), hooks=[trial.hook])
        return made.fit()


class Trial:
    """One trial: its number, its settings (`trial["lr"]`), a folder for its files, and a hook for its trainer.

    `weft.Trainer(**trial.options, ...)` writes checkpoints into the folder, so that a trial which is interrupted goes
    on where it was.
    """

    def __init__(self, number: int, params: Mapping[str, Any], folder: Path, hook: EpochReport) -> None:
        self.number, self.params, self.folder, self.hook = number, dict(params), folder, hook

    @property
    def options(self) -> dict[str, Any]:
        """For the trainer: the folder, checkpoints, resume="auto", and the hook."""
        place = {"root_dir": str(self.folder.parent), "run_name": self.folder.name}
        return {**place, "checkpoint": True, "resume": "auto", "hooks": [self.hook], "progress": False}

    def __getitem__(self, name: str) -> Any:
        return self.params[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("suggest_"):
            raise AttributeError(
                f"Trial has no {name!r}: the ranges stand in the space of the sweep, weft.sweep(run, "
                '{"lr": {"low": 1e-4, "high": 0.1, "log": True}}), and the function reads trial["lr"].'
            )
        raise AttributeError(f"Trial has no attribute {name!r}; there are number, params, options, folder, hook.")

    def __repr__(self) -> str:
        return f"Trial({self.number}, {self.params})"


class EpochReport(Hook):
    """Reports the metric after each epoch to the study; stops training if that says so."""

    def __init__(self, trial: Any, metric: str | None, prunes: bool) -> None:
        self.trial, self.metric, self.prunes = trial, metric, prunes
        self.values: list[float] = []
        self._told = set(trial.storage.get_trial(trial._trial_id).intermediate_values)  # before an interruption

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        """Report, and stop with the reason "pruned" if the trial is not worth going on."""
        name = self.metric or trainer.run.state.epoch.monitor
        value = metrics.get(name, math.nan)
        if not math.isfinite(value):
            return
        self.values.append(value)
        if trainer.current_epoch not in self._told:
            self.trial.report(value, trainer.current_epoch)
        if self.prunes and self.trial.should_prune():
            trainer.stop("pruned")


def main(folder: Path) -> None:
    """The life of a worker: take a trial, run it, tell, until none is left."""
    import cloudpickle

    from weft.sweeps.study import Study

    if parent := os.environ.pop(_PARENT, ""):
        threading.Thread(target=_end_after, args=(int(parent),), daemon=True).start()
    run, config, space, metric = cloudpickle.loads((folder / WORK).read_bytes())
    study = Study(config, space, folder)
    note = _noting(config, folder)
    note("started")
    while (taken := study.take()) is not None:
        _run(study, taken, run, metric)
    if not study.trials(study.State.RUNNING, study.State.WAITING):
        study.result().save()
        note("failed" if study.too_many_failures() else "finished")


def _noting(config: SweepConfig, folder: Path) -> Callable[[str], None]:
    """What writes down how the sweep goes where its workers are jobs, which are to leave in time."""
    if config.on != "slurm":
        return lambda event: None
    from weft.slurm import events
    from weft.slurm.leaving import leave_in_time

    leave_in_time(config.grace)
    return partial(events.note, folder)


def _run(study: Study, taken: Taken, run: Any, metric: str | None) -> None:
    number = taken.trial.number
    prunes = study.config.pruner != "none"
    with study.quiet():
        hook = EpochReport(study.optuna.trial.Trial(study.study, taken.trial._trial_id), metric, prunes)
        kind, value, notes = _outcome(run, Trial(number, taken.params, study.folder / f"trial-{number:04d}", hook))
        study.tell(taken, kind, value, notes)
    shown = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in taken.params.items())
    what = f"{value:.6g}" if value is not None else kind
    print(f"trial {number}: {what}  {shown}" + ("  (pruned)" if kind == "pruned" else ""), flush=True)
    if kind == "done" and prunes and not hook.values:
        print(f"trial {number} reported no epochs, so nothing can be pruned; give its trainer hooks=trial.hook")


def _end_after(parent: int) -> None:
    """End this process when the one that started it is gone: a fit saves its state first."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def _outcome(run: Any, trial: Trial) -> tuple[str, float | None, dict[str, Any]]:
    """How a trial ended: ("done" | "pruned" | "diverged" | "failed", value, notes for the study)."""
    try:
        result = run(trial)
    except FloatingPointError as error:
        return "diverged", None, {"stopped": str(error)}
    except Exception:  # noqa: BLE001 - whatever the user's run raises is told to the study
        return "failed", None, {"error": traceback.format_exc(limit=-8)}
    notes: dict[str, Any] = {}
    value = result
    if hasattr(result, "best_metric"):
        notes = {
            "stopped": result.stop_reason,
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "seconds": result.seconds,
        }
        notes |= {"run": str(result.run_dir)} if result.run_dir is not None else {}
        value = _best_of(result, trial.hook.metric)
        if result.stop_reason in ("pruned", "nonfinite"):
            return "pruned" if result.stop_reason == "pruned" else "diverged", value, notes
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        told = f"The run of {trial} gave {value!r}; expected a FitResult with a monitored metric, or a number."
        return "failed", None, {"error": told}
    return ("done" if math.isfinite(value) else "diverged"), float(value), notes


def _best_of(result: Any, metric: str | None) -> float | None:
    if metric is None or metric == result.monitor:
        return result.best_metric
    values = [v for v in result.history.get(metric, []) if math.isfinite(v)]
    return values[-1] if values else None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
