"""What steps, hooks and updates find at hand on the trainer while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from weft.config import TrainerConfig
    from weft.loop.run import Run


class Tools:
    """The problem and the place in training to read; gradients, steps, scalars and the end to ask for."""

    run: Run | None
    config: TrainerConfig

    @property
    def running(self) -> Run:
        if self.run is None:
            raise RuntimeError("Nothing was trained yet: call fit (or start) first, or give problem=.")
        return self.run

    @property
    def problem(self) -> nn.Module:
        """The problem that is trained."""
        return self.running.problem

    @property
    def current_epoch(self) -> int:
        """The number of the epoch, from 0."""
        return self.run.progress.epoch if self.run is not None else 0

    @property
    def global_step(self) -> int:
        """Optimizer updates done so far."""
        return self.run.progress.step if self.run is not None else 0

    @property
    def train_metric(self) -> str:
        """The key of the training loss."""
        return self.config.train_metric

    @property
    def dev_metric(self) -> str:
        """The key of the dev loss."""
        return self.config.dev_metric

    @property
    def test_metric(self) -> str:
        """The key of the test loss."""
        return self.config.test_metric

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, or the first of several."""
        return next(iter(self.running.optimizers.values()))

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers by name ("default" where none was given)."""
        return self.running.optimizers

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Gradients of `loss`, added to those that are there."""
        self.running.backward(loss, **kwargs)

    def step(self, optimizer: Any = None) -> bool:
        """Clip, check and step an optimizer (itself, its name, or None for all); then clear their gradients."""
        return self.running.step(optimizer)

    def log(self, values: Mapping[str, Any] | str, value: Any = None) -> None:
        """Record scalars (a dict, or one name and its value): their epoch means go to history and loggers."""
        self.running.log({values: value} if isinstance(values, str) else values)

    def stop(self, reason: str = "stopped") -> None:
        """End training after the current step."""
        self.running.stop(reason)
