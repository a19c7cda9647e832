"""What an evaluation was given, as `Data`. Loaded where something is evaluated that no fit has had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, Dataset

from weft.data.data import SPLITS, Data, as_data, makes_batches, read_rows
from weft.data.datasets import is_array


def of_x(data: Any) -> Any:
    """X alone, an array or a list of rows of numbers, under its key; other data as they are."""
    from weft.data.rows import are_numbers

    return {"x": data} if is_array(data) or are_numbers(data) else data


def evaluation_data(split: str, data: Any, setup_kwargs: Mapping[str, Any], batch_size: Any = None) -> Data:
    """`Data` to evaluate one split with: of a setup function or a Data that split; anything else is that split itself.

    `batch_size` (that of the last fit) cuts a dataset; None: all rows in one batch.
    """
    if isinstance(data, Data) or setup_kwargs or (callable(data) and not isinstance(data, Dataset | DataLoader)):
        data = as_data(data, None, setup_kwargs)
        if getattr(data, split) is None:
            raise ValueError(f"{split}: these data have no {split} split.")
        size = None if makes_batches(getattr(data, split)) else data.batch_size  # it may be that of another split
        return replace(data, **{other: None for other in SPLITS if other != split}, batch_size=size)
    data = read_rows(split, data)
    if makes_batches(data) or (isinstance(batch_size, Mapping) and split not in batch_size):
        batch_size = None
    return Data(**{"train": None, split: data, "batch_size": batch_size})
