"""Cross-validation: the same training several times, each time validated on rows that it was not trained on.

found = weft.cross_validate(make_problem, {"x": X, "y": Y}, folds=5, epochs=100)
print(found)                  # dev_loss 0.021 +- 0.003 (5 folds)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.data.data import Data, as_data
from weft.data.datasets import DictDataset
from weft.loop.result import FitResult
from weft.loop.trainer import Trainer

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


@dataclass(repr=False)
class CrossValidation:
    """The results of all folds, and the best value of the monitored metric in each (`scores`)."""

    results: list[FitResult]
    problems: list[nn.Module]
    """The trained problem of each fold, with its best weights."""
    rows: list[list[int]]
    """The rows that each fold was validated on."""

    @property
    def scores(self) -> list[float]:
        """The best value of the monitored metric in each fold; nan where none was finite."""
        return [math.nan if r.best_metric is None else r.best_metric for r in self.results]

    @property
    def mean(self) -> float:
        """The mean of the scores."""
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float:
        """The standard deviation of the scores (of a sample: divided by folds - 1)."""
        return statistics.stdev(self.scores)

    def __repr__(self) -> str:
        return (
            f"CrossValidation({self.results[0].monitor} {self.mean:.4g} +- {self.std:.2g}, {len(self.results)} folds)"
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a fold: its score, best epoch, epochs and the reason for its end. Needs pandas."""
        import pandas

        rows = [
            {"score": score, "best_epoch": r.best_epoch, "epochs": r.epochs, "stop_reason": r.stop_reason}
            for score, r in zip(self.scores, self.results, strict=True)
        ]
        return pandas.DataFrame(rows).rename_axis("fold")

    def plot(self, ax: Axes | None = None) -> Axes:
        """The monitored metric of each fold over the epochs on matplotlib axes."""
        from weft import plots

        name = str(self.results[0].monitor)
        curves = {f"fold {i}": dict(enumerate(r.history[name])) for i, r in enumerate(self.results)}
        return plots.series(curves, ax, ylabel=name)


def cross_validate(
    make_problem: Callable[[], nn.Module], data: Any, *, folds: int = 5, seed: int = 0, **options: Any
) -> CrossValidation:
    """Train `folds` new problems, each validated on one share of the rows and trained on the others.

    `make_problem`: called for each fold, so that none begins with another's weights. `data`: a dict of tensors, a
    `DictDataset`, or a `weft.Data` whose train split is divided (its batch size and other options hold). Rows are dealt
    out at random by `seed`; each is in exactly one dev set. `options`: those of `weft.Trainer`; with `run_name="a"` the
    folds are `a/fold-0`, ...
    """
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"cross_validate: folds={folds!r}; expected a whole number of at least 2.")
    if isinstance(make_problem, nn.Module):
        raise TypeError("cross_validate: make_problem is a module; give a function that makes a new one for each fold.")
    given = as_data(data)
    tensors, num_rows = _tensors(given)
    if num_rows < folds:
        raise ValueError(f"cross_validate: {num_rows} rows cannot be divided into {folds} folds.")
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    found = CrossValidation([], [], [])
    for number, dev in enumerate(order.tensor_split(folds)):
        train = torch.cat([share for i, share in enumerate(order.tensor_split(folds)) if i != number])
        split = replace(given, train=_rows(tensors, train.sort()[0]), dev=_rows(tensors, dev.sort()[0]))
        name = options.get("run_name")
        own = {} if name is None else {"run_name": f"{name}/fold-{number}"}
        problem = make_problem()
        found.results.append(Trainer(**{**options, **own}).fit(problem, split))
        found.problems.append(problem)
        found.rows.append(sorted(dev.tolist()))
    return found


def _tensors(data: Data) -> tuple[dict[str, Any], int]:
    """The columns of the training data and their common number of rows."""
    if data.dev is not None:
        raise ValueError("cross_validate: the data has a dev set; each fold makes its own from the training rows.")
    columns = getattr(data.train, "datadict", getattr(data.train, "tensors", data.train))
    if not isinstance(columns, Mapping) or not all(hasattr(v, "shape") and len(v.shape) for v in columns.values()):
        raise TypeError(
            f"cross_validate: the training data is {type(data.train).__name__}; expected tensors by key, whose rows "
            "can be dealt out."
        )
    (rows, *others) = dict.fromkeys(len(v) for v in columns.values())
    if others:
        raise ValueError(f"cross_validate: the columns have {rows} and {others[0]} rows; expected as many in each.")
    return dict(columns), rows


def _rows(columns: Mapping[str, Any], index: Tensor) -> DictDataset:
    return DictDataset({key: torch.as_tensor(value)[index] for key, value in columns.items()})
