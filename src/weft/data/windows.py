"""Windows of time series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.data.datasets import DictDataset, as_tensor_of


def windows(series: Any, length: int, stride: int = 1, name: str | None = None) -> DictDataset:
    """Time series cut into a DictDataset of (batch, time, features) with `length` time entries each.

    `series`: a dict of tensors (time, features) of equal duration, or a list of such dicts (several experiments).
    A window starts every `stride` entries; windows that would run over the end are left out. `name`: of the dataset.
    Raises ValueError if a series is shorter than `length`.
    """
    if length < 1 or stride < 1:
        raise ValueError(f"windows: length and stride must be at least 1, got length={length}, stride={stride}.")
    cut: dict[str, list[Tensor]] = {}
    for experiment in series if isinstance(series, Sequence) else [series]:
        if not isinstance(experiment, Mapping):
            raise TypeError(
                f'windows: got {type(experiment).__name__}; give series by key: windows({{"x": series}}, ...).'
            )
        tensors = {k: as_tensor_of(k, v) for k, v in experiment.items()}
        durations = {k: t.shape[0] for k, t in tensors.items()}
        if len(set(durations.values())) > 1 or min(durations.values()) < length:
            raise ValueError(f"windows: the series last {durations} entries; expected equal, at least {length}.")
        for key, tensor in tensors.items():
            if tensor.dim() == 1:
                tensor = tensor[:, None]
            cut.setdefault(key, []).append(tensor.unfold(0, length, stride).movedim(-1, 1))  # (windows, time, ...)
    return DictDataset({k: torch.cat(v).contiguous() for k, v in cut.items()}, name)
