"""What was trained, and by what, as plain values: for the folder of a run, its report, comparisons and HParams."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim import Optimizer

from weft.data.data import SPLITS
from weft.step.state import RunState

PLAIN = (bool, int, float, str)
OF_TORCH = ("foreach", "fused", "capturable", "differentiable", "maximize", "initial_lr", "params")
"""How a step is carried out, and what schedulers add: no settings of the training."""


def made_of(state: RunState) -> dict[str, Any]:
    """Optimizers with their numbers, schedulers, number of parameters, rows, batch size and seed, as plain data."""
    training, data = state.training, state.feed.data
    optimizers = {name: described(optimizer) for name, optimizer in training.optimizers.items()}
    schedules = {name: f"{type(s.scheduler).__name__}, each {s.interval}" for name, s in training.schedules.items()}
    own = [p for o in training.optimizers.values() for group in o.param_groups for p in group["params"]]
    found: dict[str, Any] = {
        "optimizer": next(iter(optimizers.values())) if len(optimizers) == 1 else optimizers,
        "scheduler": next(iter(schedules.values())) if len(schedules) == 1 else schedules,
        "parameters": sum(p.numel() for p in {id(p): p for p in own}.values()),
        "rows": {split: rows for split in SPLITS if (rows := state.rows(split) if state.has(split) else None)},
        "batch_size": _plain(getattr(data, "batch_size", None)),
        "seed": state.feed.seed,
    }
    return {name: value for name, value in found.items() if value not in ({}, None)}


def described(optimizer: Optimizer) -> dict[str, Any]:
    """Class and numbers of an optimizer: its learning rates, and what is not as its class has it by default."""
    usual = _defaults(type(optimizer))
    found: dict[str, Any] = {"class": type(optimizer).__name__}
    known = usual or optimizer.param_groups[0]
    names = [name for name in optimizer.param_groups[0] if name in known and name not in OF_TORCH]
    for name in names:
        values = [_plain(_first(group, name)) for group in optimizer.param_groups]
        if name == "lr" or any(value != _plain(usual.get(name)) for value in values):
            found[name] = values[0] if all(value == values[0] for value in values) else values
    return {name: value for name, value in found.items() if value is not None}


def _first(group: dict[str, Any], name: str) -> Any:
    """What a number of a group was before its scheduler changed it."""
    return group.get("initial_lr", group.get(name)) if name == "lr" else group.get(name)


def _defaults(kind: type) -> dict[str, Any]:
    try:
        return {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    except (TypeError, ValueError):  # a class that does not say
        return {}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, PLAIN):
        return value
    return float(value) if getattr(value, "numel", lambda: 0)() == 1 else str(value)
