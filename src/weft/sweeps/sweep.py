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

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weft import yamlfile
from weft.config import complaints
from weft.recipes.schema import ConfigError
from weft.sweeps.coordinator import _Coordinator
from weft.sweeps.settings import Space, SweepConfig, SweepResult, space_complaints
from weft.sweeps.worker import work_of


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
