"""The options of a trainer and the arguments of its methods: which there are, and what they are made into."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from weft.config import TrainerConfig
from weft.data.data import Data
from weft.step.phase import Phase

STEPS = {"train": "training_step", "dev": "validation_step", "test": "test_step", "predict": "predict_step"}
OBJECTS: dict[str, Any] = dict.fromkeys(
    (
        "optimizer",
        "scheduler",
        "phases",
        "metrics",
        *STEPS.values(),
        *["hooks", "loggers", "plugins", "strategy", "profiler"],
    )
)
"""Options that may be objects; all others are fields of TrainerConfig."""
KNOWN = {*TrainerConfig.__dataclass_fields__, *OBJECTS}
FIXED = KNOWN - {*STEPS.values(), "hooks", "phases"}
"""Options that are read when the trainer is made: setting an attribute of their name changes nothing."""
OF_FIT = ("epochs", "resume", "renew")


def signature() -> inspect.Signature:
    """All options by name, with type and default, for `help` and for notebooks."""
    fields = {f.name: (f.default, f.type) for f in dataclasses.fields(TrainerConfig)}
    options = {**dict.fromkeys(OBJECTS, (None, "Any")), **fields}
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (default, annotation) in options.items()
    ]
    return inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *named])


def no_option(kind: type, names: list[str], options: Mapping[str, Any]) -> TypeError:
    """What to raise for options that a trainer does not have."""
    from weft.words.foreign import unknown_options

    return unknown_options(kind.__name__, [(name, options[name]) for name in names], KNOWN)


def check_problem(problem: Any) -> None:
    """Raise TypeError for what is no module."""
    if not isinstance(problem, nn.Module):
        from weft.loop.mistakes import no_problem

        raise no_problem(problem)


def asked(data: Any, dataloaders: Any, problem: nn.Module | None, datamodule: Any) -> tuple[nn.Module | None, Any]:
    """The problem and the data that an evaluation was asked for; either may be None."""
    if isinstance(data, nn.Module) and problem is None:
        problem, data = data, None
    given = [d for d in (data, dataloaders, datamodule) if d is not None]
    if len(given) > 1:
        raise TypeError("Give the data once: as `data` (of X and y the pair (X, y)), `dataloaders` or `datamodule`.")
    return problem, given[0] if given else None


def either(name: str, value: Any, other: str, alias: Any) -> Any:
    """The one of two arguments of the same meaning that was given."""
    if value is not None and alias is not None:
        raise TypeError(f"fit: {name} and {other} are the same; give one of them.")
    return value if alias is None else alias


def data_maker(
    run: Any,
    data: Any,
    dev: Any,
    *,
    datamodule: Any,
    train_dataloaders: Any,
    val_dataloaders: Any,
    setup_kwargs: dict[str, Any],
) -> Callable[[], Data]:
    """A function that makes the `Data` of the arguments of `fit`."""
    data = either("data", data, "train_dataloaders", train_dataloaders)
    refuse_own_names(data)
    dev = either("dev", dev, "val_dataloaders", val_dataloaders)
    return run.data_of_fit(data, dev, datamodule, setup_kwargs)


def check_epochs(epochs: Any, phases: list[Phase]) -> None:
    """Raise for an argument `epochs` of a fit that is no number of epochs, or contradicts the phases."""
    if epochs is None:
        return
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"fit: epochs={epochs!r}; expected a whole number of at least 0, or None.")
    if phases:
        raise ValueError(f"fit: epochs={epochs}, but the phases last {[p.epochs for p in phases]}.")


def objects_in(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that may be objects. Raises TypeError for a tensor or an array where one is to do something."""
    for name in OBJECTS:
        value = options.get(name)
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        if found := [v for v in (value, *inner) if hasattr(type(v), "__array__")]:
            kind = type(found[0])
            raise TypeError(
                f"{name}: {kind.__module__}.{kind.__name__} is data; see help(weft.Trainer) for what it takes."
            )
    return {**OBJECTS, **{name: value for name, value in options.items() if name in OBJECTS}}


def as_phases(phases: Any, plain: Mapping[str, Any]) -> list[Phase]:
    """The `phases` option as a list, checked against the plain options."""
    if not phases:
        return []
    if not isinstance(phases, list | tuple):
        raise TypeError(f"phases={phases!r}: expected a list of weft.Phase.")
    if wrong := [p for p in phases if not isinstance(p, Phase)]:
        raise TypeError(f"phases: {wrong[0]!r} is no weft.Phase.")
    if "epochs" in plain and plain["epochs"] != sum(p.epochs for p in phases):
        raise ValueError(f"epochs={plain['epochs']} contradicts the phases, which last {[p.epochs for p in phases]}.")
    return list(phases)


def as_metrics(given: Any) -> dict[str, Any]:
    """The `metrics` option: functions of (output, batch) by name, or metrics of all rows."""
    if given is None or given == {}:
        return {}
    from weft.step.measures import measures_of

    return measures_of(given)


def refuse_own_names(setup: Any) -> None:
    """Raise TypeError for a data setup function with a parameter that never reaches it: `fit` takes it itself."""
    if not callable(setup) or hasattr(setup, "__getitem__") or hasattr(setup, "__iter__"):
        return
    bound = setup.keywords if isinstance(setup, partial) else {}
    try:
        parameters = inspect.signature(setup).parameters
    except (TypeError, ValueError):  # of a function that does not say
        return
    if taken := [name for name in parameters if name in OF_FIT and name not in bound]:
        name = getattr(setup, "__name__", "setup")
        raise TypeError(
            f"fit: the data setup function {name!r} has a parameter {taken[0]!r}, which fit takes itself. Rename it, "
            f"or give it with functools.partial({name}, {taken[0]}=...)."
        )
