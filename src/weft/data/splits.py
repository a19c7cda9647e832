"""The batches of a split: from tensors, which stay where they are used, or from a loader or several datasets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from weft.data.batches import CHUNK_BYTES, Batches
from weft.data.data import SPLITS, Data
from weft.data.datasets import DictDataset, is_array, wrong_name
from weft.types import WRITTEN_KEYS

if TYPE_CHECKING:
    from weft.data.loaders import LoaderBatches

Parts = dict[str, dict[str, Tensor]]
"""The tensors of a split by part and key; a split that is one dataset has one part, ""."""


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
    if source is None or hasattr(source, "resident"):  # an integration's own batches are taken as they are
        return source
    parts = tensors_of(source, split)
    if parts is None:
        from weft.data.loaders import loader_batches

        return loader_batches(
            data, source, split, seed=seed, device=device, to_device=to_device, rank=rank, world=world
        )
    sizes = {name: data.size_of_batch(split, name or None) for name in parts}
    _check_keys(data, split, parts)
    _check_some_batch(data, split, parts, sizes)
    training = split == "train"
    return Batches(
        {name: placed(tensors, device, dtype) for name, tensors in parts.items()},
        sizes,
        split=split,
        nested=_is_nested(source),
        shuffle=training and data.shuffle,
        drop_last=training and data.drop_last,
        seed=seed,
        require_grad=data.inputs_require_grad,
        rank=rank,
        world=world,
    )


def tensors_of(source: Any, split: str) -> Parts | None:
    """The tensors of a split that is made of them; None for a loader, an iterable, or any other dataset.

    Raises TypeError for a dict of parts of which one is not made of tensors.
    """
    if isinstance(source, Mapping) and not source:
        return None
    if not _is_nested(source):
        tensors = _tensors(source, split)
        return None if tensors is None else {"": tensors}
    found = {name: _tensors(part, split, name) for name, part in source.items()}
    if missing := [name for name, tensors in found.items() if tensors is None]:
        raise TypeError(f"The {split} data is a dict, and its parts {missing} are no tensor datasets.")
    return {name: tensors for name, tensors in found.items() if tensors is not None}


def placed(tensors: Mapping[str, Tensor], device: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors on `device`, floating ones in `dtype` if one is given; what is right already is not copied."""
    moved = {}
    for key, tensor in tensors.items():
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        if tensor.dtype != wanted or tensor.device != torch.device(device):
            tensor = tensor.to(device, wanted).requires_grad_(tensor.requires_grad)
        moved[key] = tensor
    return moved


def _is_nested(source: Any) -> bool:
    """Whether a split is a dict of datasets, rather than of tensors."""
    return isinstance(source, Mapping) and not any(is_array(v) or isinstance(v, list | tuple) for v in source.values())


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


def _check_keys(data: Data, split: str, parts: Parts) -> None:
    """Raise ValueError for a column or part that weft would write over, and for inputs that are not there."""
    for part, tensors in parts.items():
        if taken := [key for key in (part, *tensors) if key in WRITTEN_KEYS]:
            raise ValueError(
                f"The {split} data has {taken[0]!r}, a key of each batch that weft writes itself "
                f"({', '.join(WRITTEN_KEYS)}); rename it, for example to {f'row_{taken[0]}'!r}."
            )
    keys = {key for tensors in parts.values() for key in tensors}
    keys |= {f"{part}.{key}" for part, tensors in parts.items() if part for key in tensors}
    if unknown := [key for key in data.inputs_require_grad if key not in keys]:
        raise ValueError(f"Data: inputs_require_grad names {unknown}, the {split} data has {sorted(keys)}.")


def _check_some_batch(data: Data, split: str, parts: Parts, sizes: Mapping[str, int | None]) -> None:
    """Raise ValueError where `drop_last` would leave out all there is."""
    rows = {name: len(next(iter(tensors.values()))) for name, tensors in parts.items()}
    if split == "train" and data.drop_last and all((sizes[name] or 1) > rows[name] for name in parts):
        raise ValueError("Data: drop_last=True leaves no training batch: the batch size is larger than the data.")


# ---- numbers that are not finite -------------------------------------------------------------------------------------


def check_finite(data: Data, strict: bool) -> None:
    """Warn, or with `strict` raise ValueError, about NaN and Inf in tensor datasets: which key, how many rows."""
    for split in SPLITS:
        for part, key, tensor in _columns(getattr(data, split), split):
            if bad := num_not_finite(tensor):
                where = f"{split} data" + (f", part {part!r}" if part else "")
                message = f"{where}: {key!r} has NaN or Inf in {bad} of {len(tensor)} rows."
                if strict:
                    raise ValueError(message)
                warnings.warn(message + " (strict_data=True makes this an error.)", stacklevel=3)


def _columns(source: Any, split: str) -> Iterator[tuple[str, str, Tensor]]:
    parts = source.items() if _is_nested(source) else [("", source)]
    for part, dataset in parts if source is not None else ():
        for key, tensor in (_tensors(dataset, split, part or None) or {}).items():
            yield part, key, tensor


def num_not_finite(tensor: Tensor) -> int:
    """How many rows hold a number that is not finite.

    A finite sum proves that there is none, without memory of its own. Where it is not (it may have overflowed), the
    rows are looked at, a few MiB at a time.
    """
    tensor = tensor.detach()
    if not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.sum().isfinite()):
        return 0
    rows = max(1, CHUNK_BYTES // max(1, tensor.element_size() * tensor[0].numel()))
    return sum(int((~chunk.isfinite()).flatten(1).any(1).sum()) for chunk in tensor[:, None].split(rows))
