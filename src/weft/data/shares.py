"""Who trains on which rows, when there are several processes: each global batch is cut in as equal shares as can be.

No row is left out and none is used twice, so a share may be one row smaller than another, or empty. What is computed
from it is weighted by its number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler


def share(rows: int, rank: int, world: int) -> slice:
    """The rows of a batch of `rows` that process `rank` of `world` computes."""
    return slice(rows * rank // world, rows * (rank + 1) // world)


def share_of_part(rows: int, main_rows: int, rank: int, world: int) -> slice:
    """The rows that a process takes of one part of a nested batch (interior, boundary, ...).

    Its weight is its share of the main part, so another part is cut only where all shares are equal; else each process
    takes it whole, and the mean over it is right in every process.
    """
    return share(rows, rank, world) if main_rows % world == 0 == rows % world else slice(0, rows)


class SharedBatches(Sampler):
    """Row numbers of this process's share of each global batch. An empty share is yielded as one row, to be cut off."""

    def __init__(self, order: Sampler, batch_size: int, drop_last: bool, rank: int, world: int) -> None:
        self.batches = BatchSampler(order, batch_size, drop_last)
        self.order, self.rank, self.world = order, rank, world

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.batches:
            yield rows[share(len(rows), self.rank, self.world)] or rows[:1]

    def is_empty(self, number: int) -> bool:
        """Whether this process's share of batch `number` is empty."""
        size, rows = self.batches.batch_size, len(self.order)  # type: ignore[arg-type]
        mine = share(min(size, rows - number * size), self.rank, self.world)
        return mine.start == mine.stop


def shared_loader(
    loader: Any, split: str, make_order: Callable[[int, bool], Sampler], rank: int, world: int
) -> tuple[DataLoader, Sampler]:
    """A loader like `loader` that yields this process's share of batches `world` times as large, and its order.

    `make_order(rows, shuffle)` makes an order that is alike in every process; one of its making is kept. Raises
    TypeError for what cannot be cut: an iterable, an iterable dataset, or a loader with a sampler of the user's own.
    """
    what = f"The {split} data is {type(loader).__name__}, and {world} processes train"
    instead = "Pass a dataset (in weft.Data with a batch_size), or a DataLoader that shuffles or reads in order."
    if not isinstance(loader, DataLoader):
        raise TypeError(f"{what}: an iterable of batches cannot be divided among them. {instead}")
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(f"{what}: its dataset is iterable, so nobody can tell which rows are whose. {instead}")
    order: Any = make_order(len(loader.dataset), isinstance(loader.sampler, RandomSampler))  # type: ignore[arg-type]
    known = (RandomSampler, SequentialSampler, type(order))
    if type(loader.batch_sampler) is not BatchSampler or type(loader.sampler) not in known:
        own = loader.sampler if type(loader.batch_sampler) is BatchSampler else loader.batch_sampler
        raise TypeError(f"{what}: its {type(own).__name__} would give the same rows to each of them. {instead}")
    order = loader.sampler if type(loader.sampler) is type(order) else order
    size = loader.batch_sampler.batch_size * world
    shared = DataLoader(
        loader.dataset,
        batch_sampler=SharedBatches(order, size, loader.drop_last, rank, world),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
    )
    return shared, order


def without_empty(batches: Iterable[Any], sampler: SharedBatches, start: int) -> Iterator[Any]:
    """The batches of a shared loader from number `start` on, those of an empty share cut to no rows."""
    for number, batch in enumerate(batches, start):
        yield _no_rows(batch) if sampler.is_empty(number) else batch


def _no_rows(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch[:0] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {k: 0 if k == "num_examples" else _no_rows(v) for k, v in batch.items()}
    return type(batch)(_no_rows(v) for v in batch) if isinstance(batch, list | tuple) else batch
