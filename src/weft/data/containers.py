"""What holds numbers besides tensors: arrays, columns of tables, datasets in files. Their numbers become a tensor.

What a container says beyond its numbers (which are missing, their unit, their category) is never dropped without a
word: where a tensor cannot hold it, TypeError says what it was and how to give the numbers alone.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SIGNED = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def as_tensor(value: Any) -> Tensor:
    """The numbers of a container as a tensor, which shares its memory where it can."""
    if not isinstance(value, Tensor | list | tuple):
        value = _array(value)
    tensor = value if isinstance(value, Tensor) else _shared(value)
    if tensor.is_nested:
        raise TypeError("it is a nested tensor, whose rows differ in length; pad them, and give a mask as another key.")
    if tensor.layout is not torch.strided:
        raise TypeError(f"it is a sparse tensor ({tensor.layout}); give .to_dense().")
    if tensor.dtype in _SIGNED:
        signed = tensor.to(_SIGNED[tensor.dtype])
        if tensor.dtype is torch.uint64 and bool((signed < 0).any()):
            raise TypeError("it holds integers above 2**63 - 1, which no tensor can compute with.")
        return signed
    return tensor


def _shared(value: Any) -> Tensor:
    with warnings.catch_warnings():
        # Arrays that may not be written to: batches are copies, so nothing writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(value)


def _array(value: Any) -> np.ndarray:
    """An array of plain numbers, or of what torch itself refuses with a clear word."""
    unit = getattr(value, "units", None) or getattr(value, "unit", None)
    if unit is not None and not callable(unit):
        raise TypeError(f"it has a unit, {unit}, which a tensor cannot hold; give its magnitude in the unit you mean.")
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise TypeError(
                f"it is a masked array with {np.ma.count_masked(value)} missing numbers; give .filled(0.0), and "
                "~np.ma.getmaskarray(...) as another key."
            )
        return value.data
    if hasattr(value, "dims") and hasattr(value, "coords"):
        raise TypeError(
            f"it has named dimensions {tuple(value.dims)} and coordinates, which a tensor cannot hold; give .values, "
            "with one row per example, and the coordinates under keys of their own."
        )
    if isinstance(value, np.ndarray):
        return _numbers(value, value.dtype)
    if hasattr(value, "to_numpy"):
        return _column(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _numbers(np.asarray(value), value.dtype)  # an HDF5 dataset is read at once, not row by row
    return value


def _column(value: Any) -> np.ndarray:
    """The numbers of a column or table of pandas, polars or their like."""
    dtypes = list(getattr(value, "dtypes", [])) if len(value.shape) == 2 else [value.dtype]
    for dtype in dtypes:
        if "categor" in str(dtype).lower() or "enum" in str(dtype).lower():
            raise TypeError(f"its numbers stand for categories ({dtype}); give .cat.codes, or one column per category.")
    missing = _missing(value, dtypes)
    if missing:
        raise TypeError(
            f"{missing} of its numbers are missing (dtype {', '.join(map(str, dict.fromkeys(dtypes)))}); leave these "
            "rows out (.dropna()), or fill them and give a mask as another key."
        )
    array = value.to_numpy()
    if any(stride < 0 for stride in array.strides):  # a column in reverse; no tensor can be
        array = array.copy()
    if array.dtype.kind == "O":  # nullable numbers without a missing one
        kinds: set[Any] = {getattr(dtype, "numpy_dtype", None) for dtype in dtypes}
        if None not in kinds and all(kind.kind in "biufc" for kind in kinds):
            array = value.to_numpy(dtype=np.result_type(*kinds))
    return _numbers(array, dtypes[0] if len(dtypes) == 1 else array.dtype)


def _missing(value: Any, dtypes: list[Any]) -> int:
    """How many numbers a column knows to be missing; a nan in a column of plain floats is a number, and stays one."""
    if hasattr(value, "null_count"):
        counts = value.null_count()
        return int(counts if isinstance(counts, int) else sum(counts.row(0)))
    if hasattr(value, "isna") and any(not isinstance(dtype, np.dtype) for dtype in dtypes):
        return int(np.asarray(value.isna()).sum())
    return 0


def _numbers(array: np.ndarray, dtype: Any) -> np.ndarray:
    if array.dtype.kind in "mM":
        raise TypeError(
            f"it holds times ({dtype}), whose unit a tensor cannot hold; give them as numbers in a unit of your "
            "choice, (t - t[0]) / np.timedelta64(1, 's') for seconds."
        )
    if array.dtype.kind not in "biufc":
        raise TypeError(f"it holds {dtype}; expected numbers. (Of text, give numbers that stand for it.)")
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        raise TypeError(f"its bytes are in the other order ({dtype}); give .astype({array.dtype.newbyteorder('=')!s}).")
    return array
