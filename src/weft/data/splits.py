"""The batches of a split: from a dataset, a loader, or several of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from weft.data.batches import Batches
from weft.data.data import SPLITS, Data
from weft.data.datasets import DictDataset, wrong_name
from weft.data.loaders import LoaderBatches, loader_batches


def batches_of(
    data: Data,
    split: str,
    *,
    seed: int,
    device: Any = "cpu",
    dtype: torch.dtype | None = None,
    to_device: Callable[[Any], Any] = lambda batch: batch,
    rank: int = 0,
    world: int = 1,
) -> Batches | LoaderBatches | None:
    """The batches of one split of `data`, None if there is no such split.

    Tensors are moved to `device` once; floating ones are cast to `dtype` if one is given (64-true).
    Raises ValueError for an empty split or a dataset that was explicitly named for another one.
    """
    source = getattr(data, split)
    if source is None:
        return None
    if hasattr(source, "resident"):  # an integration's own batches, as they are
        return source
    training = split == "train"
    if isinstance(source, Mapping) and not any(isinstance(v, Tensor | np.ndarray | list) for v in source.values()):
        parts, nested = {name: _tensors(part, split, name) for name, part in source.items()}, True
        if missing := [n for n, t in parts.items() if t is None]:
            raise TypeError(f"The {split} data is a dict, and its parts {missing} are no tensor datasets.")
    else:
        parts, nested = {"": _tensors(source, split)}, False
    if parts and all(t is not None for t in parts.values()):
        moved = {
            name: {
                k: t.to(device, dtype if dtype and t.is_floating_point() else None).requires_grad_(t.requires_grad)
                if (dtype and t.is_floating_point() and t.dtype != dtype) or t.device != torch.device(device)
                else t
                for k, t in tensors.items()
            }
            for name, tensors in parts.items()
            if tensors is not None
        }
        sizes = {name: data.size_of_batch(split, name or None) for name in moved}
        keys = {k for t in moved.values() for k in t}
        if unknown := [k for k in data.inputs_require_grad if k not in keys]:
            raise ValueError(f"Data: inputs_require_grad names {unknown}, the {split} data has {sorted(keys)}.")
        if training and data.drop_last and all((sizes[n] or 1) > len(next(iter(t.values()))) for n, t in moved.items()):
            raise ValueError("Data: drop_last=True leaves no training batch: the batch size is larger than the data.")
        return Batches(
            moved,
            sizes,
            split=split,
            nested=nested,
            shuffle=training and data.shuffle,
            drop_last=training and data.drop_last,
            seed=seed,
            require_grad=data.inputs_require_grad,
            rank=rank,
            world=world,
        )
    return loader_batches(data, source, split, seed=seed, device=device, to_device=to_device, rank=rank, world=world)


def _tensors(source: Any, split: str, part: str | None = None) -> dict[str, Tensor] | None:
    """The tensors of a dataset that is made of tensors by key (ours, NeuroMANCER's, a dict), else None."""
    if isinstance(source, Mapping):
        source = DictDataset(source)
    tensors = getattr(source, "datadict", None)
    if not isinstance(tensors, Mapping) or isinstance(source, DataLoader):
        return None
    name = getattr(source, "name", None)
    if name is not None and name not in (split, part) and not (split == "predict" and name in SPLITS):
        raise ValueError(wrong_name(name, split))
    if not isinstance(source, DictDataset):
        tensors = DictDataset(tensors).datadict
    return dict(tensors)


def check_finite(data: Data, strict: bool) -> None:
    """Warn, or with `strict` raise ValueError, about NaN and Inf in tensor datasets: which key, how many rows."""
    for split in SPLITS:
        source = getattr(data, split)
        nested = isinstance(source, Mapping) and not any(
            isinstance(v, Tensor | np.ndarray | list) for v in source.values()
        )
        for part, dataset in source.items() if nested else [(None, source)]:
            for key, tensor in (_tensors(dataset, split, part) or {}).items() if dataset is not None else ():
                if tensor.is_floating_point() or tensor.is_complex():
                    finite = (
                        torch.isfinite(tensor.detach()).flatten(1).all(1) if tensor.dim() > 1 else tensor.isfinite()
                    )
                    if bad := int((~finite).sum()):
                        where = f"{split} data" + (f", part {part!r}" if part else "")
                        message = f"{where}: {key!r} has NaN or Inf in {bad} of {len(finite)} rows."
                        if strict:
                            raise ValueError(message)
                        warnings.warn(message + " (strict_data=True makes this an error.)", stacklevel=3)
