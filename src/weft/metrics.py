"""Weighted means of what steps return: collected on the device, in float64, read once.

    means = Means()
    means.add({"train_loss": loss}, examples=64)      # no sync
    means.compute()                                   # {"train_loss": 0.123}; one sync
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Sums = dict[str, tuple[float, int]]  # by name: the sum over examples, and their number
FLUSH_AFTER = 256  # scalars that wait on the device before they are added up in one operation


class Means:
    """Means over examples of scalars by name.

    A name that is missing from some batches is averaged over those that had it. Values may be 0-d tensors on any
    device, larger tensors (their mean counts) or numbers; nothing is read back before `compute`.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, list[Tensor]] = {}
        self._weights: dict[str, list[int]] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._num_waiting = 0

    def __bool__(self) -> bool:
        return bool(self._waiting or self._sums)

    def add(self, values: Mapping[str, Any], examples: int) -> None:
        """Add one batch of `examples` rows. Tensors are detached here, so no graph outlives its step."""
        if not examples:  # an empty share of a batch: its means are nan
            return
        for name, value in values.items():
            if not isinstance(value, Tensor):
                value = torch.tensor(float(value), dtype=torch.float64)
            value = value.detach()
            if value.dim():
                value = value.float().mean() if not value.is_floating_point() else value.mean()
            if name not in self._waiting:
                self._waiting[name], self._weights[name] = [], []
            self._waiting[name].append(value)
            self._weights[name].append(examples)
        self._num_waiting += len(values)
        if self._num_waiting >= FLUSH_AFTER:
            self._flush()

    def _flush(self) -> None:
        for name, values in self._waiting.items():
            stacked = torch.stack([v.to(values[-1].device) for v in values]).to(_widest(values[-1].device))
            weights = torch.tensor(self._weights[name], dtype=stacked.dtype).to(stacked.device, non_blocking=True)
            # a plain sum keeps nan visible
            total = (stacked * weights).sum()
            self._sums[name] = self._sums[name].to(total.device) + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + sum(self._weights[name])
        self._waiting, self._weights, self._num_waiting = {}, {}, 0

    def compute(self, gather: Callable[[Sums], list[Sums]] = lambda own: [own]) -> dict[str, float]:
        """The means as floats, by name. `gather` collects the sums of all processes, each of which must call."""
        self._flush()
        names = list(self._sums)
        sums = torch.stack([self._sums[n].to(self._sums[names[0]].device) for n in names]) if names else torch.empty(0)
        own = {n: (s, self._counts[n]) for n, s in zip(names, sums.tolist(), strict=True)}  # .tolist() is the one sync
        told = gather(own)
        parts = {name: [t[name] for t in told if name in t] for name in dict.fromkeys(n for t in told for n in t)}
        return {name: sum(s for s, _ in part) / sum(n for _, n in part) for name, part in parts.items()}

    def clear(self) -> None:
        """Start anew."""
        self.__init__()

    def state_dict(self) -> dict[str, Any]:
        """What was collected so far. Waiting values are kept apart: adding them up earlier would change last bits."""
        return {
            "sums": {k: v.cpu() for k, v in self._sums.items()},
            "counts": dict(self._counts),
            "waiting": {k: torch.stack(v).cpu() for k, v in self._waiting.items()},
            "weights": {k: list(v) for k, v in self._weights.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` saved."""
        self._sums, self._counts = dict(state_dict["sums"]), dict(state_dict["counts"])
        self._waiting = {k: list(v.unbind()) for k, v in state_dict["waiting"].items()}
        self._weights = {k: list(v) for k, v in state_dict["weights"].items()}
        self._num_waiting = sum(len(v) for v in self._waiting.values())


def check_scalars(values: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first of `values` that is no number and no tensor of one entry."""
    for name, value in values.items():
        if not isinstance(value, int | float | Tensor) or (isinstance(value, Tensor) and value.numel() != 1):
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"log: {name!r} is {found}; expected a number or a scalar tensor.")


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def num_examples(batch: Any) -> int:
    """The first dimension of the first tensor found in `batch` (dict, list, tuple or tensor), 1 if there is none."""
    found = _first_tensor(batch)
    return 1 if found is None or found.dim() == 0 else found.shape[0]


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    for item in batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ():
        found = _first_tensor(item)
        if found is not None:
            return found
    return None
