"""Where the numbers of a run go: `metrics.csv`, TensorBoard, and any Lightning logger as it is.

    weft.Trainer(loggers="csv")
    weft.Trainer(loggers=["csv", "tensorboard", lightning.pytorch.loggers.WandbLogger()])

A logger is any object with `log_metrics(metrics, step)`, `log_hyperparams(params)`, `save()` and `finalize(status)`.
It may have `rewind(step, epoch, in_epoch)`, called when a run goes on from a checkpoint, and `log_final(metrics,
step)`. A `rewind` that drops the values of `step` itself returns True, and gets them again.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from weft.config import TrainerConfig
from weft.events import Hook
from weft.loggers.csv import CSVLogger, Row, read_history, read_rows
from weft.records import lease
from weft.records.made import made_of
from weft.types import suggest

__all__ = [
    "CSVLogger",
    "Logger",
    "Logging",
    "Row",
    "hyperparameters",
    "learning_rates",
    "make_loggers",
    "read_history",
    "read_rows",
]

METHODS = ("log_metrics", "log_hyperparams", "save", "finalize")
MAKERS: dict[str, Callable[[Path], Logger]] = {
    "csv": lambda folder: CSVLogger(folder / "metrics.csv"),
    "tensorboard": lambda folder: _tensorboard(folder),
}


class Logger(Protocol):
    """What a logger must have: the methods of Lightning's."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Record plain numbers at an optimizer step; `metrics` holds `"epoch"`."""
        ...

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Record the settings of the run: plain values by dotted name."""
        ...

    def save(self) -> None:
        """Bring what was logged to the disk."""
        ...

    def finalize(self, status: str) -> None:
        """End: "success", "failed" or "aborted"."""
        ...


def make_loggers(spec: Any, run_dir: Path | str | None) -> list[Any]:
    """The `loggers` option as a list of loggers.

    `spec`: None or False (none), True ("csv"), a name ("csv", "tensorboard"), a logger, or a list of names and loggers.
    Named ones write into `run_dir`; nothing is created before something is logged.
    Raises ValueError for an unknown name, TypeError for an object that is no logger.
    """
    if spec is None or spec is False:
        return []
    entries = spec if isinstance(spec, list | tuple) else ["csv" if spec is True else spec]
    return [_make_logger(entry, run_dir) for entry in entries]


def _make_logger(entry: Any, run_dir: Path | str | None) -> Any:
    if isinstance(entry, str):
        if entry not in MAKERS:
            names = ", ".join(repr(name) for name in MAKERS)
            raise ValueError(f"loggers has {entry!r}{suggest(entry, MAKERS) or '.'} Known names: {names}.")
        if run_dir is None:
            raise ValueError(f"loggers={entry!r} needs a folder to write to, but the run has none.")
        return MAKERS[entry](Path(run_dir))
    missing = [name for name in METHODS if not callable(getattr(entry, name, None))]
    if isinstance(entry, type) or missing:
        found = f"the class {entry.__name__}" if isinstance(entry, type) else repr(entry)
        raise TypeError(
            f"loggers has {found}; expected a name ({', '.join(MAKERS)}) or an object with {', '.join(METHODS)}"
            + (f" (missing: {', '.join(missing)})." if missing else "; make an instance of it.")
        )
    return entry


def learning_rates(optimizers: Mapping[str, Any]) -> dict[str, float]:
    """The learning rates by name: `lr`, with several optimizers `lr/<name>`, with several groups followed by `/<i>`."""
    rates = {}
    for name, optimizer in optimizers.items():
        base = "lr" if len(optimizers) == 1 else f"lr/{name}"
        groups = optimizer.param_groups
        for i, group in enumerate(groups):
            if "lr" in group:  # a line search has none
                rates[base if len(groups) == 1 else f"{base}/{i}"] = float(group["lr"])
    return rates


NO_SETTINGS = ("root_dir", "run_name", "log_every", "progress", "loggers", "profiler", "resume", "timeout")
"""Options that say where and how visibly a run trains."""


def hyperparameters(trainer: Any) -> dict[str, Any]:
    """The settings of a run as plain values by dotted name: what differs from the defaults, and what is trained.

    Functions and objects among the options stand there by their names; each optimizer by its class and numbers.
    """
    usual = dataclasses.asdict(TrainerConfig())
    settings = _flat({k: v for k, v in dataclasses.asdict(trainer.config).items() if v != usual[k]})
    settings |= {name: _name_of(value) for name, value in trainer.options.items() if value is not None}
    settings = {name: value for name, value in settings.items() if name not in NO_SETTINGS}
    optimizers, made = trainer.run.optimizers, made_of(trainer.run.state)
    for name, optimizer in optimizers.items():
        settings["optimizer" if len(optimizers) == 1 else f"optimizer/{name}"] = type(optimizer).__name__
    numbers = {k: v for k, v in _flat(made).items() if not k.endswith((".class", ".lr"))}
    return settings | numbers | learning_rates(optimizers) | _flat(trainer.run.settings)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str | None) else str(value)
    return flat


def _name_of(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(map(str, value))
    if isinstance(value, list | tuple):
        return ", ".join(_name_of(item) for item in value)
    return value if isinstance(value, str) else getattr(value, "__qualname__", type(value).__qualname__)


class Logging(Hook):
    """Writes to `loggers`, in the first process only: each epoch's metrics, learning rates, speed and time.

    With `log_every=n`, also the means of the steps since the last time, every n steps. Each time the loggers are saved,
    so that a killed run has on disk what it logged before its last checkpoint. `clock` gives seconds.
    """

    def __init__(
        self, loggers: list[Any], log_every: int | None = None, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.loggers = loggers
        self.log_every = log_every
        self._clock = clock
        self._active: list[Any] = []
        self._status = "success"
        self._started = self._last_time = 0.0
        self._last_step = 0

    def on_fit_start(self, trainer: Any) -> None:
        """Record the settings; drop what was logged after the step that the run goes on from."""
        run = trainer.run
        self._active = self.loggers if run.is_global_zero else []
        self._status = "success"
        self._started = self._last_time = self._clock()
        self._last_step = run.progress.step
        settings = hyperparameters(trainer)
        for logger in self._active:
            if run.progress.step > 0 and hasattr(logger, "rewind"):
                has_dropped = logger.rewind(run.progress.step, run.progress.epoch, run.progress.batch > 0)
                again = run.state.kept.notes.get("step values", {})
                if has_dropped and again.get("step") == run.progress.step:
                    logger.log_metrics({**again["values"], "epoch": run.progress.epoch}, step=run.progress.step)
            if hasattr(logger, "log_problem"):
                logger.log_problem(trainer.problem)
            try:
                logger.log_hyperparams(settings)
            except NotImplementedError:  # lightning.fabric.loggers.CSVLogger, 2.6
                warnings.warn(f"{type(logger).__name__} does not record hyperparameters.", stacklevel=2)

    def on_epoch_start(self, trainer: Any) -> None:
        """Note the learning rates that the epoch is trained with; at its end the schedulers have changed them."""
        trainer.run.state.kept.notes["lr"] = learning_rates(trainer.run.optimizers)

    def on_step_end(self, trainer: Any, batch: Any, loss: Any) -> None:
        """Every `log_every` steps: the means since the last time. All processes take part in the means."""
        if self.log_every is not None and trainer.run.progress.step % self.log_every == 0:
            values = trainer.run.step_metrics()
            trainer.run.state.kept.notes["step values"] = {"step": trainer.run.progress.step, "values": dict(values)}
            self._log(trainer, values)

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        """Write the epoch's metrics with learning rates, speed, seconds waiting for data, and since the fit began."""
        now, step = self._clock(), trainer.run.progress.step
        passed = now - self._last_time
        speed = {"steps_per_second": (step - self._last_step) / passed} if passed > 0 else {}
        self._last_time, self._last_step = now, step
        speed |= trainer.run.state.epoch.throughput.report(trainer.run.state.processes.gather)
        rates = trainer.run.state.kept.notes.get("lr", {})
        added = {name: value for name, value in {**rates, **speed}.items() if name not in metrics}
        self._log(trainer, {**added, "seconds": now - self._started, **metrics})

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        """Remember how the run ended."""
        self._status = "aborted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"

    def on_fit_end(self, trainer: Any, result: Any) -> None:
        """Write the best value and close the loggers."""
        if getattr(result, "stop_reason", None) == "interrupted":
            self._status = "aborted"
        best = getattr(result, "best_metric", None)
        for logger in self._active:
            if best is not None and math.isfinite(best) and hasattr(logger, "log_final"):
                logger.log_final({"best_metric": best}, trainer.run.progress.step)
            logger.finalize(self._status)

    def _log(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        if self._active and trainer.run.run_dir is not None:
            lease.check(trainer.run.run_dir)
        for logger in self._active:
            # each gets its own dict: some of Lightning's loggers add to it
            logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=trainer.run.progress.step)
            logger.save()


def _tensorboard(folder: Path) -> Any:
    from weft.loggers.tensorboard import TensorBoardLogger

    return TensorBoardLogger(folder)
