"""Which curves say nothing that the loss does not say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

SPLITS = ("train", "dev", "test")
SUMS = ("objective_loss", "penalty_loss")


def repeated(*histories: Mapping[str, Iterable[float]]) -> dict[str, str]:
    """Quantities (names without their split) that need no picture of their own, each with the reason in words.

    Those equal to the loss in every epoch of every split, sums of a single term, and penalties that are 0 throughout.
    `histories`: values by name, of one run or several; what one of them has to say is shown.
    """
    found: dict[str, str] = {}
    told = set[str]()
    for history in histories:
        for split in SPLITS:
            loss = history.get(f"{split}_loss")
            for name, values in history.items():
                quantity = name.removeprefix(f"{split}_")
                if loss is None or quantity == name or quantity == "loss":
                    continue
                if reason := _reason(quantity, _array(values), _array(loss)) or _sum_of_one(quantity, split, history):
                    found[quantity] = reason
                else:
                    told.add(quantity)
    return {quantity: reason for quantity, reason in found.items() if quantity not in told}


def without_repeats(names: Iterable[str], hidden: Mapping[str, str]) -> list[str]:
    """The names whose quantity is not hidden."""
    return [name for name in names if not any(name == f"{split}_{q}" for q in hidden for split in SPLITS)]


def in_words(hidden: Mapping[str, str]) -> str:
    """ "f, objective_loss: the same as the loss; penalty_loss: 0 throughout", "" if nothing is hidden."""
    by_reason: dict[str, list[str]] = {}
    for quantity, reason in hidden.items():
        by_reason.setdefault(reason, []).append(quantity)
    return "; ".join(f"{', '.join(quantities)}: {reason}" for reason, quantities in by_reason.items())


def _array(values: Iterable[float]) -> np.ndarray:
    return np.asarray(list(values.values() if isinstance(values, Mapping) else values), dtype=float)


def _reason(quantity: str, values: np.ndarray, loss: np.ndarray) -> str:
    if values.shape == loss.shape and np.array_equal(values, loss, equal_nan=True):
        return "the same as the loss"
    if quantity == "penalty_loss" and not values[np.isfinite(values)].any() and not np.isinf(values).any():
        return "0 throughout"
    return ""


def _sum_of_one(quantity: str, split: str, history: Mapping[str, Iterable[float]]) -> str:
    """Why a sum of terms says nothing: it is that of a single one."""
    if quantity not in SUMS:
        return ""
    values = _array(history[f"{split}_{quantity}"])
    for name, others in history.items():
        term = name.removeprefix(f"{split}_")
        if term != name and term not in (*SUMS, "loss") and np.array_equal(_array(others), values, equal_nan=True):
            return f"the same as {term}"
    return ""
