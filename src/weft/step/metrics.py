"""Weighted means of what steps return: collected on the device, in float64, read once.

means = Means()
means.add({"train_loss": loss}, examples=64)      # no sync
means.compute()                                   # {"train_loss": 0.123}; one sync
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Sums = dict[str, tuple[float, float]]  # by name: the sum over examples, and their number (or the sum of their weights)
DENOMINATOR = "/"
"""Among scalars: what everything that a step returned is a mean over; followed by a name, what that one is."""
ALL_ROWS = "//"
"""Among scalars: what metrics of all rows read, by their names."""
FLUSH_AFTER = 32  # batches that wait on the device before they are added up in one operation


class Vector(NamedTuple):
    """Scalars by name as one tensor, detached, and what metrics of all rows read."""

    names: tuple[str, ...]
    values: Tensor  # (names,)
    rows: Mapping[str, Any] = {}

    def items(self) -> Iterator[tuple[str, Any]]:
        """Names and scalars, as of a dict."""
        yield from zip(self.names, self.values.unbind(), strict=True)
        if self.rows:
            yield ALL_ROWS, self.rows


class Means:
    """Means over examples of scalars by name; a step's denominators (`DENOMINATOR`) count in the place of its examples.

    `whole`: metrics by name that are no means; they get what stands under `ALL_ROWS`.
    A name that is missing from some batches is averaged over those that had it. Values may be 0-d tensors on any
    device, larger tensors (their mean counts) or numbers; nothing is read back before `compute`.
    """

    def __init__(self, whole: Mapping[str, Any] | None = None) -> None:
        self.whole = dict(whole or {})
        self._waiting: dict[tuple[str, ...], tuple[list[Tensor], list[int]]] = {}  # by names: their values, examples
        self._num_waiting = 0
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}  # by names: sums over examples, their number

    def __bool__(self) -> bool:
        return bool(self._waiting or self._sums)

    def add(self, values: Mapping[str, Any] | Vector, examples: int) -> None:
        """Add one batch of `examples` rows. Tensors are detached here, so no graph outlives its step."""
        if not values or not examples:  # the mean over no rows is nan
            return
        if isinstance(values, Vector):
            names, row, whole = values
        else:
            values = dict(values)
            whole = values.pop(ALL_ROWS, {})
            names, row = tuple(values), _row(values.values())
        for name, inputs in whole.items():
            self.whole[name].update(inputs)
        rows, weights = self._waiting.setdefault(names, ([], []))
        rows.append(row)
        weights.append(examples)
        self._num_waiting += 1
        if self._num_waiting >= FLUSH_AFTER:
            self._flush()

    def _flush(self) -> None:
        for names, (rows, examples) in self._waiting.items():
            if len(rows) == 1 and not _denominators(names):
                total, count = rows[0].to(_widest(rows[0].device)) * examples[0], examples[0]
            else:
                stacked = _stack(rows)
                stacked = stacked.to(_widest(stacked.device))
                weights = torch.tensor(examples, dtype=stacked.dtype).to(stacked.device, non_blocking=True)[:, None]
                if _denominators(names):
                    weights = _weights(names, stacked, weights)
                    stacked = torch.where(weights == 0, 0, stacked)  # the mean over nothing is nan
                total, count = (stacked * weights).sum(0), sum(examples)  # a plain sum keeps nan visible
            if names in self._sums:
                before, earlier = self._sums[names]
                total, count = before.to(total.device) + total, earlier + count
            self._sums[names] = total, count
        self._waiting, self._num_waiting = {}, 0

    def totals(self) -> Sums:
        """The sum over examples and their number by name. This reads the device, once for batches of equal names."""
        self._flush()
        found: Sums = {}
        for names, (sums, count) in self._sums.items():
            values, by = dict(zip(names, sums.tolist(), strict=True)), _denominators(names)
            for name, value in values.items():
                if not name.startswith(DENOMINATOR):
                    if name in by:  # tensors are looked at here: this reads the device anyway
                        refused_below_zero(by[name].strip(DENOMINATOR) or "num_examples", values[by[name]])
                    earlier, number = found.get(name, (0.0, 0))
                    found[name] = earlier + value, number + (values[by[name]] if name in by else count)
        return found

    def compute(self, gather: Callable[[Sums], list[Sums]] = lambda own: [own]) -> dict[str, float]:
        """The means as floats, by name. `gather` collects the sums of all processes, each of which must call."""
        told = gather(self.totals())
        parts = {name: [t[name] for t in told if name in t] for name in dict.fromkeys(n for t in told for n in t)}
        means = {name: _mean(sum(s for s, _ in part), sum(n for _, n in part)) for name, part in parts.items()}
        for name, metric in self.whole.items():
            means |= metric.compute(name, gather)
        return means

    def clear(self) -> None:
        """Start anew."""
        self.__init__(self.whole)
        for metric in self.whole.values():
            metric.reset()

    def state_dict(self) -> dict[str, Any]:
        """What was collected so far. Waiting values are kept apart: adding them up earlier would change last bits."""
        whole = {"whole": {name: metric.state_dict() for name, metric in self.whole.items()}} if self.whole else {}
        return whole | {
            "sums": [
                {"names": list(names), "sums": sums.cpu(), "examples": count}
                for names, (sums, count) in self._sums.items()
            ],
            "waiting": [
                {"names": list(names), "values": _stack(rows).cpu(), "examples": list(examples)}
                for names, (rows, examples) in self._waiting.items()
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` saved."""
        self._sums = {tuple(s["names"]): (s["sums"], s["examples"]) for s in state_dict["sums"]}
        self._waiting = {
            tuple(w["names"]): (list(w["values"].unbind()), list(w["examples"])) for w in state_dict["waiting"]
        }
        self._num_waiting = sum(len(examples) for _, examples in self._waiting.values())
        for name, saved in state_dict.get("whole", {}).items():
            if name in self.whole:
                self.whole[name].load_state_dict(saved)


def whole_metrics(metrics: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Of the metrics of a trainer those that are no means, anew for `split`, by their names in the history."""
    return {named(n, split): m.fresh() for n, m in metrics.items() if getattr(m, "of_all_rows", False)}


def named(key: str, split: str) -> str:
    """The name in the history of what `split` has under `key`. Raises TypeError for one that is no text."""
    try:
        return key if key.startswith(f"{split}_") else f"{split}_{key}"
    except (AttributeError, TypeError):
        raise TypeError(
            f"A {split} step returned a number under the key {str(key)[:60]!r} ({type(key).__name__}); "
            "what is reported has a name, which is text."
        ) from None


def is_scalar(value: Any) -> bool:
    """Whether something that a step returned is a number to report."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex()
    return isinstance(value, int | float) and not isinstance(value, bool)


def add_denominators(scalars: dict[str, Any], out: Mapping[str, Any], split: str, of_terms: bool = False) -> None:
    """Add the denominators that a step returned: of everything, "num_examples", and of one scalar, "{name}_weight".

    `of_terms`: of a problem with terms, whose other outputs, and terms called so, are none.
    """
    if "num_examples" in out:
        scalars[DENOMINATOR] = _count("num_examples", out["num_examples"])
    for key in out:
        if not isinstance(key, str) or key[-7:] != "_weight" or (name := named(key[:-7], split)) not in scalars:
            continue
        if not of_terms or (key not in scalars and key == f"{name}_weight"):
            scalars[DENOMINATOR + name] = _count(key, out[key])


def _count(key: str, value: Any) -> Any:
    """A denominator as one number: that of all rows, where each has its own."""
    if isinstance(value, Tensor):
        return value.detach().sum() if value.dim() else value.detach()
    if isinstance(value, int | float):
        return refused_below_zero(key, value)
    raise TypeError(f"The step returned {key!r} as {type(value).__name__} {value!r}; expected a number or a tensor.")


def refused_below_zero(key: str, value: Any) -> Any:
    """A denominator that is known to be one. Raises ValueError."""
    if not value >= 0:
        raise ValueError(
            f"The step returned {key!r}, what its numbers count for, as {value:g}; expected a number >= 0."
        )
    return value


def has_count(scalars: Mapping[str, Any] | Vector) -> bool:
    """Whether a step returned what it is a mean over."""
    return DENOMINATOR in (scalars.names if isinstance(scalars, Vector) else scalars)


def counted(scalars: Mapping[str, Any] | Vector, rows: int) -> Any:
    """What a step's result counts for: the denominator it returned, else `rows`. On a GPU it may be a tensor."""
    if not has_count(scalars):
        return rows
    count = dict(scalars.items())[DENOMINATOR]
    return float(count) if not isinstance(count, Tensor) or count.device.type == "cpu" else count.detach()


def _denominators(names: Sequence[str]) -> dict[str, str]:
    """By name of a scalar, the name of its denominator, where it has one."""
    if not any(name.startswith(DENOMINATOR) for name in names):
        return {}
    found = {}
    for name in names:
        if not name.startswith(DENOMINATOR):
            own = DENOMINATOR + name
            if own in names or DENOMINATOR in names:
                found[name] = own if own in names else DENOMINATOR
    return found


def _weights(names: Sequence[str], values: Tensor, examples: Tensor) -> Tensor:
    """What each of `values`, (batches, names), is multiplied with in a sum over batches; denominators are added up."""
    at, by = {name: i for i, name in enumerate(names)}, _denominators(names)
    one = torch.ones_like(examples)
    columns = [
        values[:, at[by[name]], None] if name in by else one if name.startswith(DENOMINATOR) else examples
        for name in names
    ]
    return torch.cat(columns, 1)


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan


def _row(values: Iterable[Any]) -> Tensor:
    """Scalars as one detached tensor: one operation for all, and nothing of their graphs is kept."""
    return _stack([_scalar(value) for value in values]).detach()


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=torch.float64)
    if not value.is_floating_point():
        value = value.to(_widest(value.device))
    return value.mean() if value.dim() else value


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one, in the widest of their dtypes; on the device of the first that is not on the CPU."""
    try:
        return torch.stack(tensors)  # pyright: ignore[reportArgumentType]: any sequence will do
    except RuntimeError:  # on several devices
        device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
        return torch.stack([t.to(device, _widest(device), non_blocking=True) for t in tensors])


def check_scalars(values: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first of `values` that is no number and no tensor of one entry."""
    for name, value in values.items():
        if not isinstance(value, int | float | Tensor) or (isinstance(value, Tensor) and value.numel() != 1):
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"log: {name!r} is {found}; expected a number or a scalar tensor.")


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
