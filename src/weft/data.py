"""Data: what trains, and in which batches. Tensors stay where they are used and are sliced; nothing is collated.

    def data_setup(nsim=5000):
        p = torch.rand(nsim, 2)
        train, dev = weft.DictDataset({"p": p[100:]}), weft.DictDataset({"p": p[:100]})
        return train, dev, None, 64                      # train, dev, test, batch size (None: one batch)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from weft.batches import Batches, LoaderBatches, loader_batches, short, wrong_name
from weft.prebatch import PLACES
from weft.types import check_count

SPLITS = ("train", "dev", "test", "predict")


class DictDataset(Dataset):
    """Tensors by key with equal first dimensions: one row is one example.

    `tensors` may hold tensors, numpy arrays or lists; dtypes are kept (a list of floats gets torch's default).
    `name` need not be given: the slot a dataset is put in (train, dev, test) names it; only an explicit other name
    is an error. Raises ValueError for unequal lengths or no rows, naming keys and lengths.
    """

    def __init__(self, tensors: Mapping[str, Any], name: str | None = None) -> None:
        if not isinstance(tensors, Mapping) or not tensors:
            raise TypeError(f"DictDataset needs a dict of tensors by key, got {short(tensors)}.")
        self.datadict: dict[str, Tensor] = {k: _as_tensor(k, v) for k, v in tensors.items()}
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


def _as_tensor(key: str, value: Any) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"DictDataset: {key!r} cannot be made a tensor: {error}") from error
    if tensor.dim() == 0:
        raise ValueError(f"DictDataset: {key!r} is a single number; expected one row per example.")
    return tensor


def windows(series: Any, length: int, stride: int = 1, name: str | None = None) -> DictDataset:
    """Time series cut into a DictDataset of (batch, time, features) with `length` time entries each.

    `series`: a dict of tensors (time, features) of equal duration, or a list of such dicts (several experiments).
    A window starts every `stride` entries; windows that would run over the end are left out.
    Raises ValueError if a series is shorter than `length`.
    """
    if length < 1 or stride < 1:
        raise ValueError(f"windows: length and stride must be at least 1, got length={length}, stride={stride}.")
    cut: dict[str, list[Tensor]] = {}
    for experiment in series if isinstance(series, Sequence) else [series]:
        tensors = {k: _as_tensor(k, v) for k, v in experiment.items()}
        durations = {k: t.shape[0] for k, t in tensors.items()}
        if len(set(durations.values())) > 1 or min(durations.values()) < length:
            raise ValueError(f"windows: the series last {durations} entries; expected equal, at least {length}.")
        for key, tensor in tensors.items():
            if tensor.dim() == 1:
                tensor = tensor[:, None]
            cut.setdefault(key, []).append(tensor.unfold(0, length, stride).movedim(-1, 1))  # (windows, time, ...)
    return DictDataset({k: torch.cat(v).contiguous() for k, v in cut.items()}, name)


@dataclass(frozen=True)


class Data:
    """The data of a run, by split, and how it is cut into batches.

    Each split is a `DictDataset` (or NeuroMANCER's), a dict of tensors, a dict of datasets of different sizes
    (`{"interior": ..., "boundary": ...}`: the batch is nested by these names, and the smaller ones start over until
    the largest is through), any map-style dataset, a `DataLoader`, or an iterable of batches, which pass unchanged.
    """

    train: Any
    dev: Any = None
    test: Any = None
    predict: Any = None
    batch_size: Any = None
    """Rows per batch and process (>= 1); None: all rows in one batch. A dict by split, by part of a split, or both."""
    shuffle: bool = True
    """Training rows in a new order each epoch, a function of (seed, epoch) alone."""
    drop_last: bool = False
    """Leave out a short last training batch."""
    num_workers: int | str = 0
    """Processes that read a dataset which is not made of tensors; "all": one per core."""
    pre_batch: str | None = None
    """Make the batches of a map-style dataset once: "in_memory" or "on_disk". Tensors stay in memory in any case."""
    refresh_every: int | None = None
    """Call the data setup function again every n epochs (resampled collocation points)."""
    inputs_require_grad: tuple[str, ...] | list[str] = ()
    """Keys that derivatives are taken with respect to; their batches require grad in every split."""

    def __post_init__(self) -> None:
        if all(getattr(self, split) is None for split in SPLITS):
            raise ValueError("Data: there is no training data (train=None), and nothing to evaluate.")
        for size in _numbers(self.batch_size):
            check_count("Data", "batch_size", size, optional=True)
        check_count("Data", "refresh_every", self.refresh_every, optional=True)
        if self.num_workers != "all":
            check_count("Data", "num_workers", self.num_workers, least=0)
        if self.pre_batch not in (None, *PLACES):
            raise ValueError(f"Data: pre_batch={self.pre_batch!r}; expected one of {PLACES}, or None.")
        for name in ("shuffle", "drop_last"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Data: {name}={getattr(self, name)!r}; expected True or False.")
        if isinstance(self.inputs_require_grad, str):
            raise TypeError(f"Data: inputs_require_grad={self.inputs_require_grad!r}; expected a list of keys.")

    def size_of_batch(self, split: str, part: str | None = None) -> int | None:
        """The batch size of a split, or of one part of it."""
        size = self.batch_size
        for name in (split, part):
            if isinstance(size, Mapping) and name is not None and name in size:
                size = size[name]
        if isinstance(size, Mapping):
            if part is None and split in ("test", "predict"):
                return None  # a dict that does not name these splits: they go through in one batch
            raise ValueError(f"Data: batch_size={self.batch_size!r} has no entry for {part or split!r}.")
        return size


def _numbers(size: Any) -> list[Any]:
    if isinstance(size, Mapping):
        return [n for v in size.values() for n in _numbers(v)]
    return [] if size is None else [size]


def as_data(data: Any, dev: Any = None, setup_kwargs: Mapping[str, Any] | None = None) -> Data:
    """`Data` made of whatever `fit` was given: a setup function, a Data, a 4-tuple, a dataset, a loader, batches."""
    kwargs = dict(setup_kwargs or {})
    if callable(data) and not isinstance(data, Dataset | DataLoader):
        if dev is not None:
            raise TypeError("fit: a data setup function returns its own dev set; `dev` cannot be given as well.")
        return _from_setup(data(**kwargs), getattr(data, "__name__", "data_setup"))
    if kwargs:
        raise TypeError(f"fit: unknown arguments {sorted(kwargs)}; only a data setup function takes further arguments.")
    if data is None:
        raise TypeError("fit: no data given. Pass a data setup function, weft.Data, a dataset or a loader.")
    if isinstance(data, Data):
        return data if dev is None else replace(data, dev=dev)
    if isinstance(data, tuple) and len(data) == 4 and (data[3] is None or isinstance(data[3], int | Mapping)):
        if dev is not None:
            raise TypeError("fit: the tuple (train, dev, test, batch_size) holds a dev set; `dev` was given as well.")
        return Data(*data[:3], batch_size=data[3])
    return Data(data, dev)


def evaluation_data(split: str, data: Any, setup_kwargs: Mapping[str, Any], batch_size: Any = None) -> Data:
    """`Data` to evaluate one split with: of a setup function or a Data that split; anything else is that split itself.

    `batch_size` (that of the last fit) cuts a dataset; None: all rows in one batch.
    """
    if isinstance(data, Data) or setup_kwargs or (callable(data) and not isinstance(data, Dataset | DataLoader)):
        data = as_data(data, None, setup_kwargs)
        if getattr(data, split) is None:
            raise ValueError(f"{split}: these data have no {split} split.")
        return replace(data, **{other: None for other in SPLITS if other != split})
    if isinstance(batch_size, Mapping) and split not in batch_size:
        batch_size = None
    return Data(**{"train": None, split: data, "batch_size": batch_size})


def _from_setup(returned: Any, name: str) -> Data:
    if isinstance(returned, Data):
        return returned
    if not isinstance(returned, tuple | list) or len(returned) != 4:
        raise TypeError(
            f"Data setup function {name!r} returned {short(returned)}; "
            "expected (train, dev, test, batch_size) or a weft.Data."
        )
    train, dev, test, batch_size = returned
    return Data(train, dev, test, batch_size=batch_size)


def batches_of(
    data: Data, split: str, *, seed: int, device: Any = "cpu", dtype: torch.dtype | None = None,
    to_device: Callable[[Any], Any] = lambda batch: batch, rank: int = 0, world: int = 1,
) -> Batches | LoaderBatches | None:  # fmt: skip
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
            moved, sizes, split=split, nested=nested, shuffle=training and data.shuffle,
            drop_last=training and data.drop_last, seed=seed, require_grad=data.inputs_require_grad, rank=rank, world=world,
        )  # fmt: skip
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
        nested = isinstance(source, Mapping) and not any(isinstance(v, Tensor | np.ndarray | list) for v in source.values())
        for part, dataset in source.items() if nested else [(None, source)]:
            for key, tensor in (_tensors(dataset, split, part) or {}).items() if dataset is not None else ():
                if tensor.is_floating_point() or tensor.is_complex():
                    finite = torch.isfinite(tensor.detach()).flatten(1).all(1) if tensor.dim() > 1 else tensor.isfinite()
                    if bad := int((~finite).sum()):
                        where = f"{split} data" + (f", part {part!r}" if part else "")
                        message = f"{where}: {key!r} has NaN or Inf in {bad} of {len(finite)} rows."
                        if strict:
                            raise ValueError(message)
                        warnings.warn(message + " (strict_data=True makes this an error.)", stacklevel=3)
