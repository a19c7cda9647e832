"""Searches for good settings: many short runs, in parallel, with Optuna deciding what to try next.

    def train(trial):
        adam = lambda params: torch.optim.Adam(params, trial["lr"])
        trainer = weft.Trainer(epochs=50, optimizer=adam, hooks=trial.hook)
        return trainer.fit(make_problem(), data_setup, batch_size=trial["batch_size"])

    space = {"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "batch_size": [32, 64]}
    weft.sweep(train, space, trials=20, workers=3).best_params

Instead of a function, `run` may be a config (a dict or the path of a YAML file); the names of the space are then its
options ("optimizer.lr"). Workers are processes of their own, here or as jobs of SLURM, that share nothing but the
sweep's folder: each takes a trial, runs it, and takes the next. A worker that dies loses nothing but time: its trial is
gone on with by another one. So is a sweep that was killed, when it is started again under the same name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weft import yamlfile
from weft.config import complaints
from weft.recipes.schema import ConfigError
from weft.sweeps.local import run_here
from weft.sweeps.settings import Space, SweepConfig, space_complaints
from weft.sweeps.study import Study
from weft.sweeps.worker import WORK, ConfigRun, work_of


def sweep(run: Callable[[Any], Any] | Mapping[str, Any] | str | Path, space: Space, **options: Any) -> Any:
    """Try settings from `space` until so many trials are completed, and return what was found.

    `run`: a config, or a function of a trial (`trial["lr"]`, `trial.hook`, `trial.folder`, `trial.number`) that returns
    a FitResult or a number. `space`: by name, a list of choices or {low, high} with `log` or `step`; whole numbers if
    both ends are. `options` are the fields of `SweepConfig`. A trial whose numbers stop being finite counts as pruned.

    With `on="slurm"` the workers are `workers` jobs, and what comes back at once is a handle: `result()` waits
    for what was found, `state`, `log()` and `cancel()` are as for `weft.submit`. More workers may join a sweep that is
    under way, by another call from anywhere that sees the folder.

    Raises ConfigError for a wrong space or option, RuntimeError if more than `max_failures` trials failed. Needs
    Optuna.
    """
    if wrong := complaints(SweepConfig, options) + space_complaints(space, options.get("sampler", "tpe")):
        raise ConfigError(wrong)
    config = SweepConfig(**options)
    folder = (Path(config.root_dir) / config.name).resolve()
    function, metric = work_of(run, space, config.metric, keeps=config.on == "slurm")
    if config.on == "slurm" and isinstance(function, ConfigRun):
        from weft.slurm.freezing import in_copy

        function.config = in_copy(function.config, "", folder.parent)  # workers stand in a copy of this folder
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(config, space, folder)
    study.begin()
    _keep_work((function, config, dict(space), metric), folder)
    for number, owner in study.held():
        print(f"trial {number} is run by {owner}; take_over=True treats it as lost.", file=sys.stderr)
    if config.on == "slurm":
        from weft.slurm.sweeping import submit_workers

        return submit_workers(study)
    run_here(study)
    result = study.result()
    result.save()
    return result


def _keep_work(work: tuple[Any, ...], folder: Path) -> None:
    """What workers do, in a file that is this user's alone: it is code."""
    import cloudpickle

    new = folder / f"{WORK}.{os.getpid()}"
    with open(new, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        cloudpickle.dump(work, file)
    new.replace(folder / WORK)


def sweep_from_file(path: str | Path, options: Mapping[str, Any] | None = None) -> Any:
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
