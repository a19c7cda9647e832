"""What to say to what cannot be meant. Loaded when it has happened."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from weft.data.data import Data
from weft.data.rows import SUPERVISED
from weft.step.state import RunState

MANY_ROWS = 10_000
"""Above these, whoever gives (X, y) without a batch size is told that there is one batch."""


def no_problem(problem: Any) -> TypeError:
    """What to raise for what is no problem: a class, a function, data (the net was forgotten)."""
    if isinstance(problem, type):
        found = f"the class {problem.__name__}; give an object of it, {problem.__name__}(...)"
    elif (of := getattr(problem, "shape", None)) is not None or isinstance(problem, Data | Mapping | tuple | list):
        shape = "" if of is None else f" of shape {tuple(of)}"
        found = f"{type(problem).__name__}{shape}, which is data; it comes second: {SUPERVISED}"
    else:
        found = f"{type(problem).__name__} {getattr(problem, '__name__', repr(problem))[:60]}"
    return TypeError(f"fit: the problem is {found}; expected a torch.nn.Module first.")


def tell_of_the_mode(metric: str) -> None:
    """Warn of a monitored metric whose name says that more is better, where nobody said which is."""
    if re.search(r"(^|_)(acc|accuracy|r2|r2_score|auc|auroc|f1|f1_score|precision|recall|dice)$", metric.lower()):
        warnings.warn(
            f"monitor_metric={metric!r} is monitored with monitor_mode='min': the weights with the smallest are kept "
            "as the best. Give monitor_mode='max' (or 'min', if that is meant).",
            stacklevel=4,
        )


def tell_of_one_batch(state: RunState) -> None:
    """Warn in a first fit of (X, y) of many rows without a batch size: all of them are one batch."""
    rows, is_new = state.rows("train") or 0, state.control.is_new
    if rows > MANY_ROWS and is_new and state.feed.data.batch_size is None and state.num_batches("train") == 1:
        state.warn_once(
            f"The whole training set, {rows} rows, is one batch, and an epoch one update. weft.Data((X, y), "
            f"batch_size=64) cuts it; batch_size={rows} says that this is meant."
        )
