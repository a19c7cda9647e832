"""What holds rows and has no keys of its own is given some: pairs (X, y), tables, files of arrays.

Loaded where one is met.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from weft.data.datasets import DictDataset, is_array, short

SUPERVISED = "fit(weft.Supervised(net, loss_fn), (X, y))"
_OF_MATLAB = ("__header__", "__version__", "__globals__")


def read(split: str, source: Any) -> Any:
    """`source` as tensors by key where it is (X, y), a table, or a mapping of arrays; anything else as it is.

    X and y are arrays of any kind with one row per example. The columns of a table become keys, each of shape
    (rows, 1). TypeError for what has rows and no keys, with the line to write.
    """
    if isinstance(source, tuple) and source and all(is_array(rows) or are_numbers(rows) for rows in source):
        if len(source) == 2:
            return pair(*source)
        raise TypeError(
            f"The {split} data is a tuple of {len(source)} arrays; expected two, (X, y). "
            + (
                "Of a split: weft.Data((X_train, y_train), dev=(X_dev, y_dev))."
                if len(source) == 4
                else 'Give further ones their keys: weft.DictDataset({"x": X, "y": y, "w": w}), and a weft.Problem.'
            )
        )
    if isinstance(source, Mapping) and not isinstance(source, Dataset):
        return _mapping(source)
    if hasattr(source, "columns") and hasattr(source, "to_numpy"):
        table: Any = source
        return DictDataset({str(name): table[[name]] for name in table.columns})
    if is_array(source) or isinstance(source, str | bytes | bytearray | memoryview):
        raise lone(split, source)
    return source


def are_numbers(rows: Any) -> bool:
    """Whether these are lists of numbers: rows as Python writes them."""
    is_list = isinstance(rows, list)
    while isinstance(rows, list) and rows:
        rows = rows[0]
    return is_list and isinstance(rows, int | float)


def pair(x: Any, y: Any) -> DictDataset:
    """The rows of X and y under the keys "x" and "y"."""
    return DictDataset({"x": x, "y": y})


def _mapping(source: Mapping[str, Any]) -> Any:
    """The arrays of a file by name, each read once; what MATLAB writes besides is left out."""
    if isinstance(source, dict) and not any(name in source for name in _OF_MATLAB):
        return source
    found = {name: source[name] for name in source if name not in _OF_MATLAB}
    return found if any(isinstance(value, Mapping) for value in found.values()) else DictDataset(found)


def lone(split: str, source: Any) -> TypeError:
    """What to say to a tensor, an array or a text in the place of data."""
    shape = getattr(source, "shape", None)
    found = f"a {type(source).__name__} of shape {tuple(shape)}" if shape is not None else short(source)
    if isinstance(source, str | bytes):
        way = 'Load it first: numpy.load("data.npz"), pandas.read_csv("data.csv"), h5py.File("data.h5")'
    else:
        way = f'Give it with what it is compared with, {SUPERVISED}, or give each column its key, {{"x": X, "y": y}}'
    return TypeError(f"The {split} data is {found}; its rows have no keys and are not taken for batches. {way}.")
