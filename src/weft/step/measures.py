"""Metrics besides what a step returns: functions of keys, averaged; and those that are no means, of all rows at once.

    Trainer(metrics={
        "mae": lambda u, y: (u - y).abs().mean(),              # a mean: of each batch, weighted by its examples
        "r2": weft.whole(lambda u, y: r2_score(y, u)),         # of all rows, concatenated
        "auroc": (torchmetrics.AUROC("binary"), ["p", "y"]),   # update, compute, reset; the keys that update gets
    })

Arguments' names are the keys that are read, from the problem's output or the batch; (metric, keys) names others.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from weft.problem.pairs import PairWatch, has_rows, refuse_pairs
from weft.problem.scores import whole
from weft.problem.terms import argument_keys, explain, with_parts

Measure = Callable[[Any, Any], Any]
"""(What a step returned, batch) -> a number."""
Gather = Callable[[Any], list[Any]]


def measures_of(given: Any) -> dict[str, Any]:
    """The `metrics` option: by name a `Measure`, or a metric of all rows (`Rows`, `Updated`)."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"metrics={given!r}: expected a dict of functions by name. (The usual ones by name alone: "
            'weft.Supervised(net, loss_fn, metrics=["accuracy"]).)'
        )
    return {name: _measure(name, metric) for name, metric in given.items()}


def _measure(name: str, given: Any) -> Any:
    what, keys = f"metrics[{name!r}]", None
    if isinstance(given, tuple) and len(given) == 2:
        given, keys = given
        if isinstance(keys, str) or not isinstance(keys, Sequence) or not all(isinstance(k, str) for k in keys):
            raise TypeError(f"{what}: the keys are {keys!r}; expected a list of names, one for each argument.")
    if isinstance(given, type):
        raise TypeError(f"{what} is the class {given.__name__}; give an instance, {given.__name__}(...).")
    if isinstance(given, whole):
        return Rows(Keys(name, given.fn, keys), given.fn)
    if all(callable(getattr(given, method, None)) for method in ("update", "compute", "reset")):
        updated: Any = given
        return Updated(Keys(name, updated.update, keys), updated)
    if not callable(given):
        raise TypeError(
            f"{what} is {given!r}; expected a function of keys, weft.whole(function), or an object with update, "
            "compute and reset."
        )
    read = Keys(name, given, keys)
    return lambda out, batch: read.given_to(given, read(out, batch))


class Keys:
    """The values that a metric reads from what a step returned, or from the batch."""

    def __init__(self, name: str, fn: Callable[..., Any], keys: Sequence[str] | None) -> None:
        self.name, self.keys = name, list(keys) if keys is not None else argument_keys(fn, f"metrics[{name!r}]")
        self._shapes_seen = False

    def __call__(self, out: Any, batch: Any) -> list[Any]:
        inputs, out = with_parts(batch) if isinstance(batch, Mapping) else {}, out if isinstance(out, Mapping) else {}
        values, prefix = [], f"{inputs.get('name', '')}_"
        for key in self.keys:
            found = next((d[k] for d in (out, inputs) for k in (key, prefix + key) if k in d), None)
            if found is None:
                raise KeyError(
                    f"Metric {self.name!r} reads {key!r}, which is neither in the output {list(out)} nor in the batch. "
                    f"Return it from your step beside the loss (`trainer.problem(batch)` does), or name what it is to "
                    f"read: metrics={{{self.name!r}: (metric, [keys])}}."
                )
            values.append(found)
        return values

    def called(self, fn: Callable[..., Any], found: Sequence[Any]) -> Any:
        """What `fn` makes of the values; what it raises has a note that names the metric, and what it read."""
        try:
            return fn(*found)
        except Exception as error:
            explain(error, f"metric {self.name!r}", self.keys, dict(zip(self.keys, found, strict=False)))
            if "requires grad. Use tensor.detach()" in str(error):
                error.add_note(f"metrics={{{self.name!r}: weft.whole(fn)}} gives it all rows, without their graph")
            raise

    def given_to(self, fn: Callable[..., Any], found: Sequence[Any]) -> Any:
        """What `fn` makes of the values; says so once where it pairs every row with every other."""
        if self._shapes_seen or not has_rows(read := dict(zip(self.keys, found, strict=False))):
            return self.called(fn, found)
        with PairWatch(read) as watch:
            value = self.called(fn, found)
        refuse_pairs(f"Metric {self.name!r}", value, read, watch)
        self._shapes_seen = True
        if watch.found is not None:
            warnings.warn(f"Metric {self.name!r} computes with {watch.found}", stacklevel=2)
        return value


class Rows:
    """What `whole` makes of a function: it keeps the rows of a pass over a split."""

    of_all_rows = True

    def __init__(self, inputs: Keys, fn: Callable[..., Any]) -> None:
        self.keys, self.fn = inputs, fn
        self.kept: list[tuple[Any, ...]] = []

    def fresh(self) -> Rows:
        """The same metric, which has seen nothing."""
        return Rows(self.keys, self.fn)

    def inputs(self, out: Any, batch: Any) -> tuple[Any, ...]:
        """What it reads of one batch, without its graph."""
        return tuple(map(_detached, self.keys(out, batch)))

    def update(self, inputs: tuple[Any, ...]) -> None:
        """Add a batch."""
        self.kept.append(inputs)

    def reset(self) -> None:
        """Forget all batches."""
        self.kept = []

    def compute(self, name: str, gather: Gather) -> dict[str, float]:
        """The metric of all rows that any process has seen, by `name`; nothing if there were none."""
        kept = [batch for batches in zip_longest(*gather(self.kept)) for batch in batches if batch is not None]
        columns = [_column(values) for values in zip(*kept, strict=True)]
        return _numbers(name, self.keys.given_to(self.fn, columns)) if kept else {}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [list(batch) for batch in self.kept]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.kept = [tuple(batch) for batch in state_dict["rows"]]


class Updated:
    """A metric with `update`, `compute` and `reset`, a copy of its own for each split.

    torchmetrics gathers over processes by itself. Of another kind each process keeps what it was updated with, so that
    it can be updated with what the others have; where it is saved in the middle of an epoch likewise.
    """

    of_all_rows = True

    def __init__(self, inputs: Keys, metric: Any) -> None:
        self.keys = inputs
        self.metric: Any = metric
        self.gathers = hasattr(metric, "sync") and hasattr(metric, "metric_state")
        self.rows = Rows(inputs, metric.compute)
        self.count = 0

    def fresh(self) -> Updated:
        """A copy, which has seen nothing."""
        metric = copy.deepcopy(self.metric)
        metric.reset()
        return Updated(self.keys, metric)

    def inputs(self, out: Any, batch: Any) -> tuple[Any, ...]:
        """What `update` gets of one batch, without its graph."""
        return self.rows.inputs(out, batch)

    def update(self, inputs: tuple[Any, ...]) -> None:
        """Add a batch."""
        if isinstance(self.metric, nn.Module):
            device = next((v.device for v in inputs if isinstance(v, Tensor)), None)
            if device is not None and self.metric.device != device:
                self.metric.to(device)
        update: Any = self.metric.update
        with torch.no_grad():
            self.keys.called(update, inputs)
        self.count += 1
        if not self.gathers:
            self.rows.update(inputs)

    def reset(self) -> None:
        """Forget all batches."""
        self.metric.reset()
        self.rows.reset()
        self.count = 0

    def compute(self, name: str, gather: Gather) -> dict[str, float]:
        """What `compute` returns, over all processes, by `name`; nothing if no process has seen a batch."""
        told = gather(self.count if self.gathers else self.rows.kept)
        if not any(told):
            return {}
        if len(told) > 1 and not self.gathers:
            self.metric.reset()
            for batch in (b for batches in zip_longest(*told) for b in batches if b is not None):
                self.metric.update(*batch)
        return _numbers(name, self.metric.compute())

    def state_dict(self) -> dict[str, Any]:
        if not self.gathers:
            return self.rows.state_dict()
        return {"count": self.count, "metric": {k: _copied(v) for k, v in self.metric.metric_state.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.reset()
        if not self.gathers:
            for batch in state_dict["rows"]:
                self.update(tuple(batch))
            return
        self.count = state_dict["count"]
        for key, value in state_dict["metric"].items():
            setattr(self.metric, key, _copied(value))
        self.metric._update_count = self.count  # else compute() warns that nothing was updated


def _detached(value: Any) -> Any:
    if isinstance(value, Mapping):  # a part of nested data
        return {key: _detached(item) for key, item in value.items()}
    return value.detach().clone() if isinstance(value, Tensor) else value


def _column(values: Sequence[Any]) -> Any:
    """All rows of one key."""
    if all(isinstance(v, Mapping) for v in values):
        return {key: _column([v[key] for v in values]) for key in values[0]}
    if not all(isinstance(v, Tensor) for v in values):
        return list(values)
    if any(v.dim() == 0 for v in values):
        return torch.stack([v.reshape(()) for v in values])
    return torch.cat(list(values))


def _numbers(name: str, value: Any) -> dict[str, float]:
    """What a metric computed, as floats by name; a dict gives one for each of its keys."""
    if isinstance(value, Mapping):
        return {k: v for key, part in value.items() for k, v in _numbers(f"{name}_{key}", part).items()}
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Metric {name!r} is of shape {tuple(value.shape)}; expected a number, or a dict of numbers.")
    return {name: float(value)}


def _copied(value: Any) -> Any:
    return [v.detach().clone() for v in value] if isinstance(value, list) else value.detach().clone()
