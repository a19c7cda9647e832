"""The options of a trainer and the arguments of its methods: which there are, and what they are made into."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
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


def signature() -> inspect.Signature:
    """All options by name, with type and default, for `help` and for notebooks."""
    fields = {f.name: (f.default, f.type) for f in dataclasses.fields(TrainerConfig)}
    options = {**dict.fromkeys(OBJECTS, (None, "Any")), **fields}
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (default, annotation) in options.items()
    ]
    return inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *named])


def asked(data: Any, dataloaders: Any, problem: nn.Module | None, datamodule: Any) -> tuple[nn.Module | None, Any]:
    """The problem and the data that an evaluation was asked for; either may be None."""
    if isinstance(data, nn.Module) and problem is None:
        problem, data = data, None
    given = [d for d in (data, dataloaders, datamodule) if d is not None]
    if len(given) > 1:
        raise TypeError("Give the data once: as `data`, `dataloaders` or `datamodule`.")
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
    dev = either("dev", dev, "val_dataloaders", val_dataloaders)
    return run.data_of_fit(data, dev, datamodule, setup_kwargs)


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
