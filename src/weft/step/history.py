"""How far a run is, what it measured, and the best weights it saw."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from weft.checkpoint.weights import Snapshot


@dataclass
class Progress:
    """How far a run is: plain numbers, all of them checkpointed."""

    epoch: int = 0
    """Epochs that are over; while one is open, its number."""
    step: int = 0
    """Optimizer updates done."""
    batch: int = 0
    """Batches of the open epoch that were used."""
    phase: int = 0
    phase_epoch: int = 0
    """Epochs of this phase that are over."""
    phase_ended: str = ""
    """Why this phase ended before its epochs were over; "": it did not."""
    refreshes: int = 0
    """How often the data was made anew."""
    data_epoch: int = 0
    """The epoch in which the data was made."""
    first_epoch: int = 0
    """The epoch at which this fit began, in whichever process that was."""
    first_step: int = 0
    last_epoch: int = 0
    """The epoch at which this fit ends."""
    last_step: int | None = None
    """The step at which this fit ends, None: no limit."""
    seconds: float = 0.0
    """Time spent training, in earlier fits and before a resume included (s)."""
    skipped: int = 0
    """Steps skipped in a row because a number was not finite."""
    skipped_total: int = 0
    evaluations: int = 0
    """How often closure optimizers evaluated the loss."""
    search_stop: str | None = None
    """Why the last step of LBFGS ended."""
    interrupted: bool = False
    """The last fit was interrupted; the next one does what was left of it."""
    fits: list[list[int]] = field(default_factory=list)
    """The fits before this one: the epoch at which each began, and how many it was to train."""

    def begin_fit(self, epochs: int, steps: int | None, goes_on: bool = False) -> None:
        """So many epochs and steps more (None: no limit); after an interruption, those that were left.

        What is left of a fit that `goes_on` in another process is counted with these numbers: more epochs extend it.
        """
        if self.interrupted and self.epoch < self.last_epoch:
            return
        if not goes_on:
            if self.last_epoch:
                self.fits.append([self.first_epoch, self.last_epoch - self.first_epoch])
            self.interrupted, self.phase_ended = False, ""
            self.phase = self.phase_epoch = 0
            self.first_epoch, self.first_step = self.epoch, self.step
        self.last_epoch = self.first_epoch + epochs
        self.last_step = None if steps is None else self.first_step + steps

    def skip(self) -> None:
        """One more step was left out, as a number was not finite."""
        self.skipped += 1
        self.skipped_total += 1

    def next_phase(self) -> None:
        """One phase is over, the next begins."""
        self.phase, self.phase_epoch, self.phase_ended = self.phase + 1, 0, ""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for each in fields(self):
            if each.name != "fits" or "fits" in state_dict:  # files of the first version lack it
                setattr(self, each.name, copy.deepcopy(state_dict[each.name]))

    @property
    def place(self) -> tuple[int, int, int]:
        """What tells two states of a run apart: step, epoch, and batch (0: the epoch is not open)."""
        return self.step, self.epoch, self.batch


class History:
    """One list of plain floats per name, one entry an epoch; nan where an epoch did not measure it."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.num_epochs = 0

    def append(self, metrics: Mapping[str, float]) -> None:
        """Close one more epoch."""
        for name in metrics:
            if name not in self.values:
                self.values[name] = [math.nan] * self.num_epochs
        for name, column in self.values.items():
            column.append(metrics.get(name, math.nan))
        self.num_epochs += 1

    def amend(self, metrics: Mapping[str, float]) -> None:
        """Add to the epoch that was closed last."""
        for name, value in metrics.items():
            self.values.setdefault(name, [math.nan] * self.num_epochs)[-1] = value

    def state_dict(self) -> dict[str, Any]:
        """Columns as float64 tensors: 10 of 5,000 epochs cost a save 1 ms, as lists 7 ms."""
        values = {k: torch.from_numpy(np.array(v, dtype=np.float64)) for k, v in self.values.items()}
        return {"values": values, "num_epochs": self.num_epochs}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.values = {k: v.tolist() for k, v in state_dict["values"].items()}
        self.num_epochs = state_dict["num_epochs"]


class Best:
    """The best value of the monitored metric and the weights that had it."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.value: float | None = None
        self.epoch: int | None = None
        self.weights: Snapshot | None = None
        self.others: dict[str, torch.Tensor] = {}
        """Of what an optimizer holds and the problem does not register."""

    @property
    def place(self) -> tuple[Any, ...]:
        """What tells two bests of a run apart: name, value and epoch."""
        return self.name, self.value, self.epoch

    def update(
        self, name: str, value: float | None, epoch: int, mode: str, problem: nn.Module, others: Any = None
    ) -> bool:
        """Keep this epoch's weights if `value` is better than every one before. NaN and infinities never are.

        `others`: what the optimizers train besides (`optimizers.Others`).
        """
        if name != self.name:  # another metric is monitored from here on: its values do not compare with the old
            self.name, self.value, self.epoch = name, None, None
        if value is None or not is_better(value, self.value, mode):
            return False
        self.value, self.epoch = value, epoch
        if self.weights is None:
            self.weights = Snapshot()
        self.weights.take(problem)
        self.others = others.state_dict() if others is not None else {}
        return True

    def restore(self, problem: nn.Module, others: Any) -> str | None:
        """Put the best weights back, if there are any. Why not, where the problem has changed its shape since."""
        if self.weights is not None:
            try:
                self.weights.restore(problem)
            except ValueError as misfit:
                from weft.step.explaining import no_more_fitting

                return no_more_fitting(self.epoch, misfit)
            others.load_state_dict(self.others)
        return None

    def state_dict(self, problem: nn.Module) -> dict[str, Any]:
        """The value and the weights that had it; these are None where `problem` holds them at this moment."""
        kept = None if self.weights is None else self.weights.state_dict()
        if kept is not None and _equal(kept, problem.state_dict()):
            kept = None
        saved = {"name": self.name, "value": self.value, "epoch": self.epoch, "weights": kept}
        return saved | ({"others": self.others} if self.others else {})

    def load_state_dict(self, state_dict: Mapping[str, Any], problem: nn.Module) -> None:
        """Go on from `state_dict`; `problem` already holds the weights that were saved with it."""
        self.name, self.value, self.epoch = state_dict["name"], state_dict["value"], state_dict["epoch"]
        self.weights, self.others = None, dict(state_dict.get("others", {}))
        if self.epoch is not None or state_dict["weights"] is not None:
            self.weights = Snapshot()
            if state_dict["weights"] is None:
                self.weights.take(problem)
            else:
                self.weights.load_state_dict(state_dict["weights"])


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if hasattr(x, "to_local"):  # in shards: other processes may hold others
            return False
        strided = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.layout is y.layout is torch.strided
        return strided and x.dtype is y.dtype and torch.equal(x, y)

    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def is_better(value: float, than: float | None, mode: str, by: float = 0.0) -> bool:
    """Whether `value` is finite and better than `than` by more than `by`; `than=None` is worse than anything."""
    if not math.isfinite(value):
        return False
    return than is None or (value < than - by if mode == "min" else value > than + by)
