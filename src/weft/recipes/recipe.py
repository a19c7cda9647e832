"""From a config to what it describes: a trainer, a problem and its data, ready to fit.

    recipe = make(check(read("run.yaml")))       # or check({"problem": ..., "data": ..., "trainer": {...}})
    result = recipe.fit()

`check` raises one ConfigError with everything that is wrong. Options and files are looked at first; only if these are
right are the named modules imported and the arguments of what they hold compared with its parameters.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weft.recipes import arguments, class_paths, schema, signatures
from weft.recipes.dialects import translated
from weft.recipes.schema import STEPS, ConfigError, Named, named
from weft.yamlfile import load_file

PARTIAL = {"optimizer": 1, "scheduler": 1}
"""Sections whose function weft calls itself, with so many arguments of its own before the given ones."""
TOTALS = ("num_steps", "num_epochs")
"""Arguments of a scheduler that stand for the length of the run, known when it fits."""
_FILE = re.compile(r"^(?!/)(.+\.py):[A-Za-z_][\w.]*$")


@dataclass
class Source:
    """A config as a file says it, put into weft's own words."""

    config: dict[str, Any]
    wrong: list[str]
    """Keys of another dialect that ask for something weft does not do."""
    notes: list[str]
    """Keys of another dialect that change nothing."""


def read(path: str | Path) -> Source:
    """The config that a YAML file describes. Lightning's and physicsml's keys are understood.

    Relative paths of .py files and of weights are taken from the file's folder. Raises ConfigError for a file that
    cannot be read as a config at all; what else is wrong is in the result, to be told with the rest.
    """
    try:
        raw = load_file(path)
    except FileNotFoundError:
        raise ConfigError([f"there is no file {path}"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    if not isinstance(raw, dict):
        raise ConfigError([f"{path}: found {type(raw).__name__}, expected sections ({', '.join(schema.SECTIONS)})"])
    config, wrong = translated(raw)
    notes = config.pop("notes", [])
    return Source(rooted(config, Path(path).resolve().parent), wrong, notes)


def rooted(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`config` with relative paths of .py files and of weights taken from `folder`."""

    def visit(value: Any, key: str) -> Any:
        if isinstance(value, str) and key == "weights":
            return type(value)(folder / value)
        if isinstance(value, str) and (match := _FILE.match(value)):
            return type(value)(os.path.normpath(folder / match[1]) + value[match.end(1) :])
        if isinstance(value, Mapping):
            kept = ("init_args", "match", "batches", "freeze") if key != "phases" else ()
            path = {"path": "weights"} if key == "weights" else {}
            return {
                k: v if k in kept else visit(v, path.get(k, "") or ("" if key == "weights" else k))
                for k, v in value.items()
            }
        return [visit(item, "") for item in value] if isinstance(value, list) else value

    return {k: v if k in ("trainer", "batches") else visit(v, k) for k, v in config.items()}


@dataclass
class Checked:
    """A config without mistakes, and what its names stand for."""

    config: dict[str, Any]
    """Plain data: {class_path, init_args} throughout, ready for a file."""
    targets: dict[str, Any] = field(default_factory=dict)
    """What is named, by key ("problem", "hooks.0")."""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The arguments of each, as it takes them."""


def check(config: Mapping[str, Any] | Source, needed: Sequence[str] = ("problem",), imports: bool = True) -> Checked:
    """The config, with everything it names imported. Raises ConfigError with all that is wrong.

    `needed`: sections that must be there. With `imports=False` what is named is only looked at in its source, so that
    nothing of it runs; `targets` and `values` then stay empty.
    """
    known_wrong, config = (config.wrong, config.config) if isinstance(config, Source) else ([], config)
    config, found = schema.normal(rooted(config, Path.cwd()))
    wrong = [*known_wrong, *found]
    told_of_python = any(problem.startswith("objects: ") for problem in wrong)
    told = [problem.split("=")[0].split(":")[0].split(".")[0] for problem in wrong]
    wrong += [
        f"{n}: missing; give {schema.SECTIONS[n]}"
        for n in needed
        if not config.get(n) and n not in told and not told_of_python
    ]
    checked = Checked(config)
    in_order, told = not wrong, {problem.split("=")[0].split(":")[0] for problem in wrong}
    for thing in named(config):  # beside other mistakes only the source is looked at: nothing of it runs
        if thing.key not in told:
            (_import if imports and in_order else _look)(checked, thing, wrong)
    if wrong:
        raise ConfigError(wrong)
    return checked


def _import(checked: Checked, thing: Named, wrong: list[str]) -> None:
    name = thing.spec["class_path"]
    try:
        target = class_paths.load(name, thing.section)
    except AttributeError as error:
        at = f" ({where})" if (where := users_line(error)) else ""
        wrong.append(f"{thing.key}={name!r}: {error}{at}")
        return
    except Exception as error:  # noqa: BLE001 - whatever the user's module raises
        line = (
            f"{Path(error.filename or '?').name}, line {error.lineno}"
            if isinstance(error, SyntaxError)
            else users_line(error)
        )
        text = error.msg if isinstance(error, SyntaxError) else error
        wrong.append(
            f"{thing.key}={name!r}: importing it raised {type(error).__name__}: {text}{f' ({line})' if line else ''}"
        )
        return
    checked.targets[thing.key] = target
    given = thing.spec["init_args"]
    if thing.section in ("metrics", *STEPS):
        if not callable(target):
            wrong.append(f"{thing.key}={name!r}: found {type(target).__name__}, expected a function")
    elif _is_made(target):
        if given:
            wrong.append(f"{thing.key}.init_args: {name} is an object ({type(target).__name__}) and takes no arguments")
        if thing.section in PARTIAL:
            wrong.append(f"{thing.key}={name!r}: found {type(target).__name__}, expected a class or a function")
    else:
        takes = arguments.signature(target, PARTIAL.get(thing.section, 0))
        qualname = getattr(target, "__qualname__", str(target))
        checked.values[thing.key] = _arguments(thing, qualname, takes, wrong, arguments.made)


def _look(checked: Checked, thing: Named, wrong: list[str]) -> None:
    name = thing.spec["class_path"]
    try:
        takes = signatures.read(name, thing.section, PARTIAL.get(thing.section, 0))
    except (AttributeError, SyntaxError, ValueError, OSError) as error:
        wrong.append(f"{thing.key}={name!r}: {error}")
        return
    if thing.section not in ("metrics", *STEPS):
        _arguments(thing, class_paths.split(name, thing.section)[1], takes, wrong, arguments.looked_at)


def _arguments(
    thing: Named, name: str, takes: arguments.Signature, wrong: list[str], fit: Callable[[Any, Any], Any]
) -> dict[str, Any]:
    """The arguments of a named thing as it takes them; in the config they become plain data."""
    given = thing.spec["init_args"]
    totals = {k: str(v) for k, v in given.items() if v in TOTALS} if thing.section == "scheduler" else {}
    stand_ins = given | dict.fromkeys(totals, 1)
    values, plain = arguments.converted(thing.key, name, takes, stand_ins, wrong, fit)
    thing.spec["init_args"] = plain | {k: v for k, v in totals.items() if k in plain}
    return values | totals


def _is_made(target: Any) -> bool:
    """Whether a name stands for an object that is used as it is, rather than for what makes one."""
    return not (inspect.isclass(target) or inspect.isroutine(target) or isinstance(target, functools.partial))


def users_line(error: BaseException) -> str:
    """ "file.py, line 12" of the innermost line of the user's own code that an error came through, "" if none."""
    ours = [Path(__file__).parents[1], Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.suffix == ".py" and path.is_file() and not any(path.is_relative_to(folder) for folder in ours):
            return f"{path.name}, line {frame.lineno}"
    return ""


# ------------------------------------------------------------------------------------------------ making


@dataclass
class Recipe:
    """What a config describes: `recipe.trainer.fit(recipe.problem, **recipe.data)`."""

    config: dict[str, Any]
    trainer: Any
    problem: Any
    data: dict[str, Any]
    """The keyword arguments of `fit` that hold the data."""

    def fit(self, resume: str | None = None) -> Any:
        """Train and return the FitResult."""
        return self.trainer.fit(self.problem, **self.data, resume=resume)


def make(checked: Checked, hooks: Sequence[Any] = ()) -> Recipe:
    """The trainer, problem and data of a checked config; `hooks` listen besides its own.

    With `trainer.seed` random state is seeded before the problem is made, so that its first weights are reproducible.
    """
    import weft
    from weft.devices.seeding import seed_everything

    config = checked.config
    options = dict(config.get("trainer", {}))
    if options.get("seed") is not None:
        seed_everything(options["seed"])
    problem = _made(checked, "problem") if "problem" in checked.targets else None
    if "weights" in config and problem is not None:
        weft.load_weights(problem, **config["weights"])
    data = _data(checked, "data", config.get("batches", {}))
    for section in ("optimizer", "scheduler"):
        if section in config:
            options[section] = _several(checked, section, config[section])
    for name in ("strategy", "profiler"):
        if name in config:
            options[name] = _made(checked, name)
    for name in STEPS:
        if name in config:
            options[name] = checked.targets[name]
    if "metrics" in config:
        options["metrics"] = {name: checked.targets[f"metrics.{name}"] for name in config["metrics"]}
    if "loggers" in config:
        named_loggers = enumerate(config["loggers"])
        options["loggers"] = [v if isinstance(v, str) else _made(checked, f"loggers.{i}") for i, v in named_loggers]
    if "phases" in config:
        options["phases"] = [_phase(checked, i, phase) for i, phase in enumerate(config["phases"])]
    options["hooks"] = [*(_made(checked, f"hooks.{i}") for i in range(len(config.get("hooks", [])))), *hooks]
    trainer = weft.Trainer(**options)
    for schedule in _schedules(trainer):
        schedule.factory.trainer = trainer
    trainer.recipe = config  # written into the run's folder
    return Recipe(config, trainer, problem, data)


def _made(checked: Checked, key: str) -> Any:
    target = checked.targets[key]
    return target if _is_made(target) else target(**checked.values[key])


def _several(checked: Checked, section: str, spec: Mapping[str, Any]) -> Any:
    if "class_path" in spec:
        return _factory(checked, section, section, spec)
    return {name: _factory(checked, f"{section}.{name}", section, one) for name, one in spec.items()}


def _factory(checked: Checked, key: str, section: str, spec: Mapping[str, Any]) -> Any:
    """A function of the parameters, or a Schedule of a function of the optimizer."""
    import weft

    target, values = checked.targets[key], checked.values[key]
    if section == "optimizer":
        return functools.partial(_call, target, values)
    interval = spec.get("interval") or ("step" if "num_steps" in values.values() else "epoch")
    factory = SchedulerFactory(target, values)
    return weft.Schedule(factory, interval, monitor=spec.get("monitor"), frequency=spec.get("frequency", 1))


def _call(target: Callable[..., Any], values: Mapping[str, Any], first: Any) -> Any:
    return target(first, **values)


class SchedulerFactory:
    """Makes a scheduler for an optimizer; "num_steps" and "num_epochs" become the numbers of the phase in force."""

    def __init__(self, target: Callable[..., Any], values: Mapping[str, Any]) -> None:
        self.target, self.values = target, values
        self.trainer: Any = None

    def __call__(self, optimizer: Any) -> Any:
        values = {k: self._total(v) if isinstance(v, str) and v in TOTALS else v for k, v in self.values.items()}
        return self.target(optimizer, **values)

    def _total(self, name: str) -> int:
        run, config = self.trainer.run, self.trainer.config
        epochs = 1 if config.fast_dev_run else run.state.phase.epochs
        if name == "num_epochs":
            return epochs
        batches = run.state.num_batches("train")
        if batches is None:
            raise ValueError(
                f"{getattr(self.target, '__name__', self.target)}: {name!r} needs the number of training batches, "
                "which this data does not tell; give a number."
            )
        steps = epochs * -(-batches // config.accumulate)
        return steps if config.max_steps is None else min(steps, config.max_steps)


def _schedules(trainer: Any) -> list[Any]:
    given = [trainer.options["scheduler"], *(phase.scheduler for phase in trainer.phases)]
    listed = [s for g in given for s in (g.values() if isinstance(g, Mapping) else [g])]
    return [s for s in listed if s is not None]


def _phase(checked: Checked, number: int, spec: Mapping[str, Any]) -> Any:
    import weft

    options = {k: v for k, v in spec.items() if k in ("epochs", "freeze", "weights", "patience")}
    for name in ("optimizer", "scheduler"):
        if name in spec:
            options[name] = _factory(checked, f"phases.{number}.{name}", name, spec[name])
    if "data" in spec or "batches" in spec:
        key = f"phases.{number}.data" if "data" in spec else "data"
        batches = checked.config.get("batches", {}) | spec.get("batches", {})
        options["data"] = _data(checked, key, batches).get("data")
    return weft.Phase(**options)


def _data(checked: Checked, key: str, batches: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `fit`: a data setup function with its arguments and the config's way of batching."""
    if key not in checked.targets:
        return {}
    target = checked.targets[key]
    if inspect.isclass(target):  # a LightningDataModule, or a class of data
        made = _made(checked, key)
        if hasattr(made, "train_dataloader"):
            if batches:
                raise ConfigError(["batches: a LightningDataModule cuts its own batches; leave the section out"])
            return {"datamodule": made}
        return {"data": functools.partial(_setup, lambda: made, {}, batches)}
    if _is_made(target):
        return {"data": functools.partial(_setup, lambda: target, {}, batches)}
    setup = functools.partial(_setup, target, checked.values[key], batches)
    setup.__name__ = getattr(target, "__name__", key)  # type: ignore[attr-defined]  # for error messages
    return {"data": setup}


def _setup(target: Callable[..., Any], values: Mapping[str, Any], batches: Mapping[str, Any]) -> Any:
    """The data of a run, in batches as the config says."""
    from weft.data.data import as_data

    made = target(**values)
    data = as_data(lambda: made) if isinstance(made, tuple | list) else as_data(made)
    changed = {k: v for k, v in batches.items() if v is not None}
    return replace(data, **changed) if changed else data
