"""Datasets of tensors by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch stores them, and can index and add none of them


def wrong_name(name: str, split: str) -> str:
    """What to say to a dataset that was named for another split."""
    return f"A dataset named {name!r} was given as the {split} data. Name it {split!r}, or leave the name out."


def short(value: Any) -> str:
    """Type and beginning of a value, for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


class DictDataset(Dataset):
    """Tensors by key with equal first dimensions: one row is one example.

    `tensors` may hold tensors, arrays (also memory-mapped ones, which are not copied), columns of a table, datasets of
    an HDF5 file, or lists. Dtypes are kept (a list of floats gets torch's default), but for unsigned integers of more
    than 8 bits, which become signed ones that hold the same numbers. What cannot be kept (missing values, units,
    categories, masks, sparse layouts) is refused by name.
    `name` need not be given: the slot a dataset is put in (train, dev, test) names it; only an explicit other name
    is an error. Raises ValueError for unequal lengths or no rows, naming keys and lengths.
    """

    def __init__(self, tensors: Mapping[str, Any], name: str | None = None) -> None:
        if not isinstance(tensors, Mapping) or not tensors:
            raise TypeError(f"DictDataset needs a dict of tensors by key, got {short(tensors)}.")
        _check_labels(tensors)
        self.datadict: dict[str, Tensor] = {k: as_tensor_of(k, v) for k, v in tensors.items()}
        self.name = name
        lengths = {k: t.shape[0] for k, t in self.datadict.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"DictDataset: the tensors have unequal lengths {lengths}; each row is one example.")
        if not next(iter(lengths.values())):
            raise ValueError(f"DictDataset is empty: its tensors {list(lengths)} have no rows.")

    def __len__(self) -> int:
        return next(iter(self.datadict.values())).shape[0]

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return {k: t[index] for k, t in self.datadict.items()}

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k}: {tuple(t.shape)}" for k, t in self.datadict.items())
        return f"DictDataset({shapes})"


def _check_labels(columns: Mapping[str, Any]) -> None:
    """Raise ValueError where the rows of two columns of tables carry different labels: they do not belong together."""
    labelled = {key: c.index for key, c in columns.items() if hasattr(c, "index") and hasattr(c.index, "equals")}
    for key, labels in labelled.items():
        first = next(iter(labelled))
        if not labels.equals(labelled[first]):
            raise ValueError(
                f"DictDataset: the rows of {key!r} and {first!r} have different labels (their `index`), so they do not "
                "belong together in this order; align them, or give .to_numpy() where the order is right."
            )


def is_array(value: Any) -> bool:
    """Whether `value` holds numbers by position: a tensor, an array, a column or table, a dataset in a file."""
    if isinstance(value, Tensor | np.ndarray):
        return True
    if isinstance(value, Mapping | Dataset | DataLoader):
        return False
    return (
        hasattr(value, "__array__")
        or hasattr(value, "to_numpy")
        or (hasattr(value, "shape") and hasattr(value, "dtype"))
    )


def as_tensor_of(key: str, value: Any) -> Tensor:
    """`value` as a tensor that shares its memory where it can. TypeError / ValueError that name the key."""
    try:
        if (
            type(value) is Tensor
            and value.dtype not in _UNSIGNED
            and value.layout is torch.strided
            and not value.is_nested
        ):
            tensor = value
        else:
            from weft.data.containers import as_tensor

            tensor = as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"DictDataset: {key!r} cannot be made a tensor: {error}") from error
    if tensor.dim() == 0:
        raise ValueError(f"DictDataset: {key!r} is a single number; expected one row per example.")
    return tensor
