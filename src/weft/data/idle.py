"""Options of `Data` that have no effect where splits yield batches by themselves. Loaded where one does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, RandomSampler

from weft.data.datasets import short


def refuse_idle(given: Mapping[str, Any], own: list[str], size: Any, drop_last: bool, shuffle: bool) -> None:
    """Raise ValueError for options that concern no split, since those that they are for yield batches by themselves.

    given: the splits that there are; own: the names of those that yield batches by themselves.
    """
    if isinstance(size, Mapping):
        idle = [split for split in own if size.get(split) is not None]
    else:
        known = {getattr(given[split], "batch_size", None) for split in own}
        idle = own if size is not None and len(own) == len(given) and known != {size} else []
    if idle:
        raise ValueError(_message("batch_size", size, idle[0], given[idle[0]]))
    if drop_last and "train" in own and not getattr(given["train"], "drop_last", False):
        raise ValueError(_message("drop_last", True, "train", given["train"]))
    if not shuffle and isinstance(getattr(given.get("train"), "sampler", None), RandomSampler):
        raise ValueError(_message("shuffle", False, "train", given["train"]))


def _message(name: str, value: Any, split: str, source: Any) -> str:
    if isinstance(source, DataLoader):
        line = f"Give {name} to the DataLoader, or its dataset in its place."
    else:
        columns = "{k: torch.stack([r[k] for r in rows]) for k in rows[0]}"
        if isinstance(source, list | tuple) and source and isinstance(source[0], list | tuple):
            columns = '{"x": torch.stack([r[0] for r in rows]), "y": torch.stack([r[1] for r in rows])}'
        line = f"If they are rows, make a dataset of them: weft.DictDataset({columns}). If not, leave {name} out."
    return (
        f"Data: {name}={value!r} has no effect: the {split} data is {short(source)}, which yields batches by itself: "
        f"each item is one. {line}"
    )
