"""What a fit leaves behind: numbers, curves and the last weights."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, field, fields
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

    `history` holds one list of floats per metric, one entry an epoch (nan where it was not validated). `best_epoch`
    counts from 0; `best_metric` and `best_epoch` are None where nothing was monitored. `last_weights` is the state
    dict at the end, before the best weights were put back. `seconds` is the time spent in fits of this problem.
    """

    epochs: int
    steps: int
    best_metric: float | None
    best_epoch: int | None
    stop_reason: str
    history: dict[str, list[float]]
    last_weights: dict[str, Tensor] = field(default_factory=dict)
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
            f"stopped by {self.stop_reason!r}, {self.seconds:.1f} s)"
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """The history as a pandas DataFrame, one row an epoch. Needs pandas."""
        import pandas

        return pandas.DataFrame(self.history).rename_axis("epoch")

    def plot(self, ax: Axes | None = None) -> Axes:
        """The loss curves on matplotlib axes, the best epoch marked."""
        from weft import plots

        return plots.curves(self, ax)

    def _repr_html_(self) -> str:
        rows = [("epochs", self.epochs), ("steps", self.steps), ("stopped by", self.stop_reason)]
        rows += [("seconds", f"{self.seconds:.2f}"), ("seed", self.seed), ("run folder", self.run_dir or "-")]
        if self.best_metric is not None:
            rows.insert(2, (f"best {self.monitor}", f"{self.best_metric:.6g} (epoch {self.best_epoch})"))
        if self.search_stop is not None:
            rows.append(("line searches", f"{self.evaluations} evaluations, the last ended by {self.search_stop}"))
        cells = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows)
        last = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{values[-1]:.6g}</td></tr>"
            for name, values in sorted(self.history.items())
            if values
        )
        return f"<table>{cells}</table><table><tr><th>metric</th><th>last epoch</th></tr>{last}</table>"

    def save(self, run_dir: Path) -> None:
        """Write everything but weights and history to `run_dir/result.json`; `load_result` reads it back."""
        plain = {k: v for k, v in vars(self).items() if k not in ("history", "last_weights", "run_dir", "profile")}
        from weft.checkpoint.archive import put

        put(run_dir / "result.json", json.dumps(plain, indent=1).encode())


def result_of(state: RunState, last_weights: dict[str, Tensor]) -> FitResult:
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
        seconds=progress.seconds,
        seed=state.feed.seed,
        run_dir=state.kept.run_dir,
        monitor=best.name,
        evaluations=progress.evaluations,
        search_stop=progress.search_stop,
    )


def load_result(run_dir: str | Path) -> FitResult:
    """The FitResult of a finished run, read from its folder (history from metrics.csv; `last_weights` from `last`).

    Raises FileNotFoundError naming what is missing, and ValueError naming a file that no run writes.
    """
    from weft.checkpoint import folder as checkpoints
    from weft.loggers.csv import read_history
    from weft.records.foreign import RESULT, read_json

    folder = Path(run_dir)
    if not (folder / "result.json").is_file():
        raise FileNotFoundError(f"{folder} holds no result.json: no run finished there.")
    plain = read_json(folder / "result.json", RESULT)
    known = {f.name for f in fields(FitResult)} - {"history", "last_weights", "run_dir", "profile"}
    if wrong := {"epochs", "steps", "best_metric", "best_epoch", "stop_reason"} - set(plain) or set(plain) - known:
        raise ValueError(
            f"{folder / 'result.json'} is no result of a run: it lacks, or should not have, {min(wrong)!r}."
        )
    if not 0 <= plain["epochs"] <= 10**7:
        raise ValueError(f"{folder / 'result.json'}: epochs is {plain['epochs']}; expected at most ten million.")
    history = read_history(folder / "metrics.csv", plain["epochs"])
    last: dict[str, Any] = {}
    if (folder / "checkpoints" / "last").is_file():
        last = dict(checkpoints.load(folder / "checkpoints", "last")[0]["problem"])
    return FitResult(**plain, history=history, last_weights=last, run_dir=folder)
