"""The curves of a run in the notebook, while it trains.

weft.Trainer(epochs=500, hooks=weft.hooks.LivePlot()).fit(problem, data)
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from weft.events import Hook
from weft.loop.cells import Output, in_notebook
from weft.records.charts import STYLE, Line, chart
from weft.records.repeats import SPLITS, repeated


class LivePlot(Hook):
    """The curves of the run in the cell of a notebook, redrawn while it trains.

    `names`: what to draw besides the losses: metrics ("dev_r2"), or quantities of all splits ("f"); none: each term
    that does not repeat the loss. `every`: seconds between two drawings (>= 0, else ValueError). Drawn in the first
    process, as one small picture in SVG; outside of a notebook nothing is drawn, and a warning says so. `clock` gives
    seconds.
    """

    def __init__(self, *names: str, every: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        if every < 0:
            raise ValueError(f"LivePlot: every={every}; expected seconds (>= 0).")
        self.names, self.every, self._clock = names, every, clock
        self._output: Output | None = None
        self._due = -math.inf

    def on_fit_start(self, trainer: Any) -> None:
        """Begin an output of this cell."""
        self._due = -math.inf
        self._output = Output() if trainer.run.is_global_zero and in_notebook() else None
        if not in_notebook():
            warnings.warn("LivePlot draws in notebooks only; result.plot() draws anywhere afterwards.", stacklevel=2)

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        """Draw if it is time to."""
        if self._output is not None and self._clock() >= self._due:
            self._draw(trainer.run.history.values, trainer.run.best.epoch)
            self._due = self._clock() + self.every

    def on_fit_end(self, trainer: Any, result: Any) -> None:
        """Draw all of it."""
        if self._output is not None:
            self._draw(result.history, result.best_epoch)
            self._output = None

    def _draw(self, history: Mapping[str, list[float]], best: int | None) -> None:
        assert self._output is not None
        self._output.show(text_html=page(history, best, self.names), text_plain="LivePlot")


def page(history: Mapping[str, list[float]], best: int | None = None, names: tuple[str, ...] = ()) -> str:
    """The charts of a history as HTML: the losses, and what `names` says. Raises ValueError for a name it lacks."""
    hidden = {} if names else repeated(history)
    plain = {name: dict(enumerate(values)) for name, values in history.items()}
    groups = {"loss": [f"{split}_loss" for split in SPLITS]}
    quantities = dict.fromkeys(n.split("_", 1)[1] for n in history if n.split("_", 1)[0] in SPLITS and "_" in n)
    for name in names or [q for q in quantities if q != "loss" and q not in hidden]:
        groups[name] = [name] if name in history else [f"{split}_{name}" for split in SPLITS]
    drawn = []
    for title, found in groups.items():
        lines = [Line(name.removesuffix(f"_{title}"), plain[name]) for name in found if name in plain]
        if title in names and not lines:
            raise ValueError(f"LivePlot: there is no metric {title!r}; there are {', '.join(history)}.")
        drawn += [chart(title, lines, "epoch", mark=best)] if lines else []
    return f'<style>{STYLE[STYLE.index(".charts") :]}</style><div class="charts">{"".join(drawn)}</div>'
