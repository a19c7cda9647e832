"""Prediction: one row for each row of the data, in its order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.data.batches import num_examples, outermost, rows_in
from weft.devices.precision import in_precision, numerics
from weft.step.evaluation import evaluating

if TYPE_CHECKING:
    from weft.step.state import RunState


def predict(state: RunState, step: Callable[[Any], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `step` returns for each batch of the predict set, concatenated in order on the CPU, by key.

    One row for each row of the data; ValueError names what has another number. What is one number for a batch of
    several rows belongs to none of them, and is left out.
    """
    if getattr(state.source("predict"), "is_uneven", False):
        raise ValueError(
            "predict: the parts of the data have different numbers of batches, so rows of the smaller ones would come "
            "several times; predict each part by itself, or take each in one batch (batch_size=None)."
        )
    found: list[dict[str, Tensor | None]] = []
    step, processes = in_precision(state.fabric, step), state.processes
    with (
        numerics(state.fabric, state.config.deterministic, state.problem),
        evaluating(state.problem),
        processes.gathered(state.problem),
    ):
        for batch in state.batches_of("predict"):
            values = step(batch) if num_examples(batch) or not processes.skips_empty else {}
            _check_tensors(values)
            found.append({key: _rows(key, value.detach().cpu(), batch) for key, value in values.items()})
    if processes.repeats:
        found = [{} for _ in found]
    # of each batch first the rows of process 0, then those of process 1, ...: their order in the data
    parts = [part for batch in zip(*processes.gather(found), strict=True) for part in batch if part]
    joined = {key: _joined(key, parts) for key in dict.fromkeys(key for part in parts for key in part)}
    return {key: value for key, value in joined.items() if value is not None}


def _check_tensors(values: Any) -> None:
    """Raise TypeError for predictions that are no dict of tensors."""
    if isinstance(values, Mapping) and all(isinstance(value, Tensor) for value in values.values()):
        return
    found: Any = {k: type(v).__name__ for k, v in values.items()} if isinstance(values, Mapping) else ""
    found = found or f"{type(values).__name__} of shape {tuple(getattr(values, 'shape', ()))}"
    raise TypeError(f'predict: the predict_step returned {found}; expected a dict of tensors by key: {{"y": ...}}.')


def _rows(key: str, value: Tensor, batch: Any) -> Tensor | None:
    """An output that has a row for each of the batch, or is the number that a single row gave; None: another number."""
    parts = [part for part in batch.values() if isinstance(part, Mapping)] if isinstance(batch, Mapping) else []
    expected = [rows_in(part) for part in parts or [batch] if outermost(part)]
    if not value.dim():
        return None if key.startswith("predict_") or (expected and 1 not in expected) else value
    if expected and value.shape[0] not in expected:
        raise ValueError(
            f"predict: {key!r} has shape {tuple(value.shape)} for a batch of {' or '.join(map(str, expected))} rows; "
            "expected one row for each, along the first dimension. Put the rows first (.transpose(0, 1) where time "
            "comes first), leave it out of what is returned, or pass a predict_step."
        )
    return value


def _joined(key: str, parts: list[dict[str, Tensor | None]]) -> Tensor | None:
    """The rows of all batches; None for what is a number of a batch. A row that lost its dimension gets it back."""
    given = [part.get(key) for part in parts]
    rows = [value for value in given if value is not None]
    shapes = {tuple(value.shape[1:]) for value in rows if value.dim()}
    if not shapes and len(rows) < len(given):
        return None
    if len(shapes) == 1 and len(rows) == len(given) and (shapes == {()} or all(value.dim() for value in rows)):
        return torch.cat([value.reshape(-1, *value.shape[1:]) for value in rows])
    if not shapes:
        what = "is one number for one row, of which nobody can tell whether it is the row or belongs to all"
    else:
        missing = f", and {len(given) - len(rows)} batches gave no rows" if len(rows) < len(given) else ""
        what = f"has {'rows' if len(shapes) == 1 else 'rows of different'} shape {sorted(shapes)}{missing}"
    raise ValueError(
        f"predict: {key!r} {what}; expected one row of one shape for each row of the data. Is it squeezed "
        "(.squeeze(-1) leaves the rows alone)? Or pass a predict_step."
    )
