"""What a fit leaves behind: numbers, curves and the last weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from torch import Tensor

    from weft.step.state import RunState


@dataclass(repr=False)
class FitResult:
    """The outcome of a fit.

    `epochs` and `steps` count those of the whole run, and `stop_reason` says why it ended ("epochs", "patience",
    "max_time", ...). `history` holds one list of floats per metric, one entry an epoch (nan where it was not
    validated). `best_epoch` counts from 0; `best_metric` and `best_epoch` are None where nothing was monitored
    (`monitor`). `last_weights` is the state dict at the end, before the best weights were put back; `last_others` what
    only an optimizer held. `seconds` is the time spent in fits of this problem. `seed` and `run_dir`: of the run, None
    without. Of closure optimizers: `evaluations` of the loss, and `search_stop`. `profile`: what a profiler found.
    """

    epochs: int
    steps: int
    best_metric: float | None
    best_epoch: int | None
    stop_reason: str
    history: dict[str, list[float]]
    last_weights: dict[str, Tensor] = field(default_factory=dict)
    last_others: dict[str, Tensor] = field(default_factory=dict)
    """What only an optimizer held, at the end; with the buffers of its modules. Empty where the problem registers all.
    """
    seconds: float = 0.0
    seed: int | None = None
    run_dir: Path | None = None
    monitor: str | None = None
    """The name of the metric that decided about best weights, None: nothing did."""
    evaluations: int = 0
    """How often a closure optimizer (LBFGS) evaluated the loss, in all its steps."""
    search_stop: str | None = None
    """Which option of LBFGS ended its last step ("max_iter", "tolerance_grad", ...)."""
    profile: Any = None
    """What the profiler found: its text by `str`, its numbers by `to_dict()`; a profiler of your own, itself."""

    def __repr__(self) -> str:
        best = ""
        if self.monitor and self.best_metric is not None:  # None where no value was finite
            best = f"best {self.monitor}={self.best_metric:.6g} at epoch {self.best_epoch}, "
        return (
            f"FitResult({self.epochs} epochs, {self.steps} steps, {best}"
            f"stopped by {self.stop_reason!r}, {self.seconds:.1f} s{', see .profile' * (self.profile is not None)})"
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """The history as a pandas DataFrame, one row an epoch. Needs pandas."""
        import pandas

        return pandas.DataFrame(self.history).rename_axis("epoch")

    def plot(self, ax: Axes | None = None, label: str | None = None) -> Axes:
        """The loss curves on `ax` (None: new axes), the best epoch marked. `label`: the run's name among several."""
        from weft import plots

        return plots.curves(self, ax, label)

    def _repr_html_(self) -> str:
        from weft.records.tables import of_result

        return of_result(self)

    def save(self, run_dir: Path) -> None:
        """Write everything but weights and history to `run_dir/result.json`; `load_result` reads it back."""
        plain = {
            k: v
            for k, v in vars(self).items()
            if k not in ("history", "last_weights", "last_others", "run_dir", "profile")
        }
        from weft.checkpoint.archive import put

        put(run_dir / "result.json", json.dumps(plain, indent=1).encode())


def result_of(state: RunState, last_weights: dict[str, Tensor], last_others: dict[str, Tensor]) -> FitResult:
    """The result of a run as it stands."""
    progress, best = state.progress, state.best
    return FitResult(
        epochs=progress.epoch,
        steps=progress.step,
        best_metric=best.value,
        best_epoch=best.epoch,
        stop_reason=state.control.stop_reason or "epochs",
        history={name: list(column) for name, column in state.history.values.items()},
        last_weights=last_weights,
        last_others=last_others,
        seconds=progress.seconds,
        seed=state.feed.seed,
        run_dir=state.kept.run_dir,
        monitor=best.name,
        evaluations=progress.evaluations,
        search_stop=progress.search_stop,
    )
