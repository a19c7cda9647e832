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
    several rows belongs to none of them, and is left out. Where another dimension is as long as the batch, that batch
    is computed once more with one row less, which tells them apart.
    """
    if getattr(state.source("predict"), "is_uneven", False):
        raise ValueError(
            "predict: the parts of the data have different numbers of batches, so rows of the smaller ones would come "
            "several times; predict each part by itself, or take each in one batch (batch_size=None)."
        )
    found: list[dict[str, Tensor | None]] = []
    told: set[str] = set()
    step, processes = in_precision(state.fabric, step), state.processes
    with (
        numerics(state.fabric, state.config.deterministic, state.problem),
        evaluating(state.problem),
        processes.gathered(state.problem),
    ):
        for batch in state.batches_of("predict"):
            values = step(batch) if num_examples(batch) or not processes.skips_empty else {}
            _check_tensors(values)
            unclear = {key for key, value in values.items() if _may_be_turned(value, batch)} - told
            if not processes.skips_empty:  # a step is everybody's
                unclear = set().union(*processes.gather(unclear))
            if unclear:
                _tell_apart(step, batch, values, unclear)
                told |= unclear
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


def _may_be_turned(value: Tensor, batch: Any) -> bool:
    """Whether a later dimension, of it or of what came with the batch, is as long as the first: where as many times or
    features as rows come first, shapes do not tell."""
    rows = value.shape[0] if value.dim() else 0
    if rows < 2 or rows not in _expected(batch):
        return False
    return rows in value.shape[1:] or any(rows in tensor.shape[1:] for _, tensor in outermost(batch))


def _tell_apart(step: Callable[[Any], Any], batch: Any, values: Mapping[str, Tensor], keys: set[str]) -> None:
    """Compute a batch of which shapes do not tell which dimension is that of the rows, again with one row less.

    ValueError for an output whose first dimension does not follow.
    """
    for key in sorted(keys):
        rows = values[key].shape[0]
        fewer = step(_cut(batch, rows))
        shape = tuple(fewer[key].shape)
        if rows > 1 and shape[:1] != (rows - 1,):
            raise _turned(key, shape, str(rows - 1))


def _cut(batch: Any, rows: int) -> Any:
    """A batch without the last row of the tensors that have so many."""
    if isinstance(batch, Tensor):
        return batch[:-1] if batch.dim() and len(batch) == rows else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, rows) for key, value in batch.items()}
    return type(batch)(_cut(value, rows) for value in batch) if isinstance(batch, list | tuple) else batch


def _expected(batch: Any) -> list[int]:
    """How many rows a batch has, or each of its parts."""
    parts = [part for part in batch.values() if isinstance(part, Mapping)] if isinstance(batch, Mapping) else []
    return [rows_in(part) for part in parts or [batch] if outermost(part)]


def _turned(key: str, shape: tuple[int, ...], rows: str) -> ValueError:
    return ValueError(
        f"predict: {key!r} has shape {shape} for a batch of {rows} rows; expected one row for each, along the first "
        "dimension. Put the rows first (.transpose(0, 1) where time comes first), leave it out of what is returned, or "
        "pass a predict_step."
    )


def _rows(key: str, value: Tensor, batch: Any) -> Tensor | None:
    """An output that has a row for each of the batch, or is the number that a single row gave; None: another number."""
    expected = _expected(batch)
    if not value.dim():
        return None if key.startswith("predict_") or (expected and 1 not in expected) else value
    if expected and value.shape[0] not in expected:
        raise _turned(key, tuple(value.shape), " or ".join(map(str, expected)))
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
