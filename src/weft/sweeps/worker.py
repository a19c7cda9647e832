"""One trial of a sweep, and the process it runs in: a python of its own at the end of a pipe.

The worker is started by its own command line, not by importing the caller's script again, so a sweep needs no
`if __name__ == "__main__"` and works in a notebook.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from weft.events import Hook
from weft.recipes.schema import ConfigError, with_option

_CODE = "import sys; from weft.sweeps.worker import serve; serve(int(sys.argv[1]))"


class Worker:
    """A process that runs one trial after the other. It leaves when the pipe is closed."""

    def __init__(self, number: int, num_workers: int, folder: Path, work: bytes) -> None:
        self.number, self.log_path = number, folder / f"worker-{number}.log"
        self.connection, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_workers)))
        if gpus := _gpus():
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CODE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the coordinator, which ends its workers
            )
        theirs.close()
        with contextlib.suppress(OSError):  # one that died at once is found when its trial is asked for
            self.connection.send_bytes(work)

    def close(self) -> str:
        """End the process and return the end of what it printed."""
        self.connection.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
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


def work_of(run: Any, space: Mapping[str, Any], folder: Path, metric: str | None) -> bytes:
    """What every worker is sent: the function that makes a trial of `run`, pickled.

    A config is checked here with the first settings of the space, before any worker starts. Raises ConfigError.
    """
    import cloudpickle

    if callable(run):
        return cloudpickle.dumps((run, str(folder.resolve()), metric))
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
    return cloudpickle.dumps((ConfigRun(plain), str(folder.resolve()), metric))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class ConfigRun:
    """Runs a config with a trial's settings."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def __call__(self, trial: Trial) -> Any:
        """The FitResult of the config with the trial's settings, in the trial's folder."""
        from weft.recipes import recipe

        config: Any = self.config
        for name, value in trial.params.items():
            config = with_option(config, name, _as_text(value))
        own = {"root_dir": str(trial.folder.parent), "run_name": trial.folder.name, "progress": False, "devices": 1}
        config = {**config, "trainer": {**config.get("trainer", {}), **own}}
        made = recipe.make(recipe.check(config, needed=("problem", "data")), hooks=[trial.hook])
        return made.fit()


class Trial:
    """One trial: its number, its settings (`trial["lr"]`), a folder for its files, and a hook for its trainer."""

    def __init__(self, number: int, params: Mapping[str, Any], folder: Path, hook: EpochReport) -> None:
        self.number, self.params, self.folder, self.hook = number, dict(params), folder, hook

    def __getitem__(self, name: str) -> Any:
        return self.params[name]

    def __repr__(self) -> str:
        return f"Trial({self.number}, {self.params})"


class EpochReport(Hook):
    """Tells the coordinator the metric after each epoch; stops training if it says so."""

    def __init__(self, connection: Connection, metric: str | None) -> None:
        self.connection, self.metric = connection, metric
        self.values: list[float] = []

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        """Report, and stop with the reason "pruned" if the trial is not worth going on."""
        name = self.metric or trainer.run.state.epoch.monitor
        value = metrics.get(name, math.nan)
        if not math.isfinite(value):
            return
        self.values.append(value)
        self.connection.send(("epoch", trainer.current_epoch, value))
        if self.connection.recv():
            trainer.stop("pruned")


def serve(descriptor: int) -> None:
    """The life of a worker: run what comes through the pipe until it is closed."""
    import cloudpickle

    connection = Connection(descriptor)
    try:
        run, folder, metric = cloudpickle.loads(connection.recv_bytes())
        while True:
            number, params = connection.recv()
            hook = EpochReport(connection, metric)
            trial = Trial(number, params, Path(folder) / f"trial-{number:04d}", hook)
            connection.send(_outcome(run, trial))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the coordinator has what it wanted, or is gone


def _outcome(run: Any, trial: Trial) -> tuple[str, float | None, dict[str, Any]]:
    """How a trial ended: ("done" | "pruned" | "diverged" | "failed", value, notes for the study)."""
    try:
        result = run(trial)
    except FloatingPointError as error:
        return "diverged", None, {"stopped": str(error)}
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception:  # noqa: BLE001 - whatever the user's run raises is told to the coordinator
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
