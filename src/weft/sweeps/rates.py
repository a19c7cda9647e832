"""The learning rate to begin with: one short run in which it grows from step to step.

    found = weft.find_lr(problem, data)
    found.suggestion, found.plot()
    weft.Trainer(optimizer=lambda params: torch.optim.Adam(params, lr=found.suggestion))

The learning-rate range test of L. Smith, arXiv:1506.01186: the loss falls fastest well below the rate at which it
begins to diverge.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weft.loop.trainer import Trainer
from weft.types import suggest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.9
"""Of the exponential mean of the losses, corrected for its start."""
DIVERGED = 4.0
"""The test ends where the smoothed loss is this many times its smallest value."""
NOT_HERE = ("epochs", "max_steps", "min_epochs", "max_time", "scheduler", "phases", "patience", "checkpoint")
"""Options that would end the test, change its rates, or write files."""


@dataclass(repr=False)
class LearningRates:
    """Losses by learning rate. `suggestion`: where they fall fastest; None if they never fall clearly."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None

    def __repr__(self) -> str:
        told = "none: the loss does not fall clearly" if self.suggestion is None else f"{self.suggestion:.2g}"
        return (
            f"LearningRates({len(self.rates)} steps from {self.rates[0]:.1g} to {self.rates[-1]:.1g}; suggests {told})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The losses over the learning rate on matplotlib axes, the suggestion marked."""
        from weft.plots.axes import new_axes

        ax = ax if ax is not None else new_axes()
        ax.plot(self.rates, self.losses, color="0.7", linewidth=0.8, label="loss of a step")
        ax.plot(self.rates, self.smoothed, color="C0", linewidth=1.6, label="smoothed")
        if self.suggestion is not None:
            ax.axvline(self.suggestion, color="C3", linestyle="-.", label=f"suggestion: {self.suggestion:.2g}")
        ax.set_xscale("log")
        if all(value > 0 for value in self.losses):
            ax.set_yscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
        ax.grid(True, alpha=0.3)
        ax.legend(fontsize="small")
        return ax


def find_lr(
    problem: nn.Module,
    data: Any = None,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    **options: Any,
) -> LearningRates:
    """Losses of up to `steps` optimizer steps while the learning rate grows from `low` to `high`, and a suggestion.

    `data`: what `fit` takes; `options`: those of the trainer. The rate of every parameter group is set. The test ends
    early where the loss diverges or is not finite. The problem's weights and buffers, and torch's random state on the
    CPU, are afterwards as they were. Raises ValueError for options that it cannot respect.
    """
    if not 0 < low < high or steps < 2:
        raise ValueError(
            f"find_lr: low={low}, high={high}, steps={steps}; expected 0 < low < high and 2 steps or more."
        )
    if taken := [name for name in options if name in NOT_HERE]:
        raise ValueError(f"find_lr: {taken[0]!r} has no place in a test of rates{suggest(taken[0], ('steps',))}.")
    options = {"progress": False, "epochs": steps, "max_steps": steps, "on_nonfinite": "stop", **options}
    before = {name: value.detach().clone() for name, value in problem.state_dict().items()}
    was_training, random = problem.training, torch.get_rng_state()
    try:
        rates, losses = _walk(
            Trainer(**options), problem, data, [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
        )
    finally:
        problem.load_state_dict(before)
        problem.train(was_training)
        torch.set_rng_state(random)
    smoothed = _smooth(losses)
    return LearningRates(rates, losses, smoothed, _steepest(rates, losses, smoothed.index(min(smoothed))))


def _walk(trainer: Trainer, problem: nn.Module, data: Any, rates: list[float]) -> tuple[list[float], list[float]]:
    """Train with one rate a step; the rates that were reached and the losses before each step."""
    used: list[float] = []
    losses: list[float] = []
    with trainer.start(problem, data) as run, contextlib.suppress(StopIteration):
        for _ in run.epochs():
            for batch in run.batches("train"):
                for optimizer in run.optimizers.values():
                    for group in optimizer.param_groups:
                        group["lr"] = rates[len(used)]
                loss = float(run.update(batch))
                if not math.isfinite(loss):
                    break
                used.append(rates[len(used)])
                losses.append(loss)
                smoothed = _smooth(losses)
                if len(used) == len(rates) or smoothed[-1] > DIVERGED * abs(min(smoothed)) + 1e-12:
                    break
            else:
                continue
            run.stop("rates tested")
            break
    if len(used) < 2:
        raise ValueError(f"find_lr: the loss is not finite at the rate {rates[len(used)]:.1g} already.")
    return used, losses


def _smooth(losses: list[float]) -> list[float]:
    mean, found = 0.0, []
    for i, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**i))
    return found


def _steepest(rates: list[float], losses: list[float], last: int) -> float | None:
    """The middle of the factor of 10 in which the losses up to `last` fall fastest; None where none falls clearly.

    The slope of each such window is the median of those of its pairs (Theil and Sen): losses of single batches scatter.
    """
    width = min(max(5, sum(rate < 10 * rates[0] for rate in rates)), last + 1)
    starts = range(last + 2 - width) if width > 1 else []
    slopes = [(_slope(losses[i : i + width]), i) for i in starts]
    slope, i = min(slopes, default=(0.0, 0))
    seen = losses[i : i + width]
    off = [loss - slope * j for j, loss in enumerate(seen)]
    scatter = statistics.median(abs(value - statistics.median(off)) for value in off) if seen else 0.0
    return rates[i + width // 2] if -slope * width > 2 * scatter else None


def _slope(values: list[float]) -> float:
    pairs = itertools.combinations(enumerate(values), 2)
    return statistics.median((later - sooner) / (j - i) for (i, sooner), (j, later) in pairs)
