"""More for TensorBoard: figures made by a function, and histograms of the weights.

weft.Trainer(loggers="tensorboard", hooks=[
    weft.hooks.Figures({"rollouts": lambda trainer: draw(trainer.problem)}, every=10),
    weft.hooks.WeightHistograms(every=50, gradients=True),
])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from weft.events import Hook
from weft.loggers import Logging

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.optim import Optimizer


def _loggers_with(trainer: Any, method: str, who: str) -> list[Any]:
    """The loggers of this process that can do `method`. Raises ValueError if none of the run's can."""
    logging = [hook for hook in trainer.run.state.hooks if isinstance(hook, Logging)]
    able = [logger for hook in logging for logger in hook.loggers if hasattr(logger, method)]
    if not able:
        raise ValueError(f"{who} has nowhere to write: no logger has {method!r}. Add loggers='tensorboard'.")
    return able if trainer.run.is_global_zero else []


class Figures(Hook):
    """Logs what functions of the trainer draw, every `every` epochs and at the end of the last one.

    figures: by tag, functions that return a matplotlib Figure; they are called in the first process only, and are
    closed when logged. Raises ValueError without a logger that has `add_figure`, TypeError for what is no figure.
    """

    def __init__(self, figures: Mapping[str, Callable[[Any], Figure]], every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"Figures: every={every}; expected at least 1 epoch.")
        self.figures, self.every = dict(figures), every

    def on_fit_start(self, trainer: Any) -> None:
        self._loggers = _loggers_with(trainer, "add_figure", "Figures")

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        progress = trainer.run.progress
        if not self._loggers or ((progress.epoch + 1) % self.every and progress.epoch + 1 != progress.last_epoch):
            return
        from matplotlib import pyplot
        from matplotlib.figure import Figure

        for tag, draw in self.figures.items():
            figure = draw(trainer)
            if not isinstance(figure, Figure):
                raise TypeError(f"Figures: {tag!r} returned {type(figure).__name__}; expected a matplotlib Figure.")
            for logger in self._loggers:
                logger.add_figure(tag, figure, progress.step)
            pyplot.close(figure)


class WeightHistograms(Hook):
    """Logs the distribution of each parameter, every `every` epochs (>= 1, else ValueError).

    With `gradients` also of its last gradient.
    """

    def __init__(self, every: int = 1, gradients: bool = False) -> None:
        if every < 1:
            raise ValueError(f"WeightHistograms: every={every}; expected at least 1 epoch.")
        self.every, self.gradients = every, gradients
        self._last: dict[str, Any] = {}

    def on_fit_start(self, trainer: Any) -> None:
        self._loggers = _loggers_with(trainer, "add_histogram", "WeightHistograms")
        self._last = {}

    def on_before_optimizer_step(self, trainer: Any, optimizer: Optimizer) -> None:
        if self.gradients and self._loggers and (trainer.current_epoch + 1) % self.every == 0:
            grads = {name: p.grad for name, p in trainer.problem.named_parameters() if p.grad is not None}
            self._last |= grads  # the trainer drops its reference after the step, and makes new ones

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        if (trainer.current_epoch + 1) % self.every:
            return
        step = trainer.global_step
        for logger in self._loggers:
            for name, parameter in trainer.problem.named_parameters():
                logger.add_histogram(f"weights/{name}", parameter, step)
            for name, gradient in self._last.items():
                logger.add_histogram(f"gradients/{name}", gradient, step)
        self._last = {}
