"""What a DataLoader without workers collates row by row, gathered at once: the same batches in the same order.

A dataset of tensors gives its rows one by one, and the loader stacks them: 3 us a row. To take all rows of a batch by
their numbers gives the same tensors in microseconds. The loader itself goes on as ever: its samplers draw what they
draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset
from torch.utils.data._utils.collate import default_collate
from torch.utils.data._utils.fetch import _MapDatasetFetcher  # pyright: ignore[reportPrivateUsage]

_OF_TENSORS_BY_KEY = ("weft.data.datasets.DictDataset", "neuromancer.dataset.DictDataset")


def gathering(batches: Iterator[Any]) -> Iterator[Any]:
    """`batches`, what `iter` of a DataLoader gave, gathered at once where the rows are those of plain tensors."""
    fetcher = getattr(batches, "_dataset_fetcher", None)
    if type(fetcher) is _MapDatasetFetcher and fetcher.auto_collation and _columns(fetcher) is not None:
        batches._dataset_fetcher = _Gathering(fetcher)  # type: ignore[attr-defined]
    return batches


class _Gathering:
    """In the place of the loader's own fetcher, which it asks wherever anything is out of the ordinary."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def fetch(self, rows: Sequence[Any]) -> Any:
        """The batch of these rows."""
        found, dataset = _columns(self.stock), self.stock.dataset
        if found is None or not all(type(i) is int for i in rows):
            return self.stock.fetch(rows)
        while type(dataset) is Subset:
            rows, dataset = [dataset.indices[i] for i in rows], dataset.dataset
        try:
            at = torch.tensor(rows, dtype=torch.int64)
            taken = [column.index_select(0, at.to(column.device)) for column in found[0]]
        except (IndexError, TypeError, ValueError, RuntimeError):  # the loader knows how, or how to say why not
            return self.stock.fetch(rows)
        return found[1](taken)


def _columns(fetcher: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]] | None:
    """The tensors whose rows make a batch, and what makes the batch of them; None for any other dataset or collation.

    They are looked up for each batch: a dataset's tensors may be exchanged at any time.
    """
    dataset: Any = fetcher.dataset
    collate: Any = fetcher.collate_fn
    while type(dataset) is Subset:
        dataset = dataset.dataset
    kind = type(dataset)
    if kind is TensorDataset and collate is default_collate:
        columns, made = list(dataset.tensors), list
    elif f"{kind.__module__}.{kind.__qualname__}" in _OF_TENSORS_BY_KEY:
        names, more = list(dataset.datadict), {}
        of: Any = getattr(collate, "__self__", None)
        if type(of) is kind and getattr(collate, "__func__", None) is getattr(kind, "collate_fn", None):
            more = {"name": of.name}  # as NeuroMANCER's names its batches
        elif collate is not default_collate:
            return None
        columns, made = list(dataset.datadict.values()), lambda taken: {**dict(zip(names, taken, strict=True)), **more}
    else:
        return None
    is_plain = all(type(t) is Tensor and t.dim() and not t.requires_grad and t.layout is torch.strided for t in columns)
    return (columns, made) if is_plain and columns else None
