"""Batches from a DataLoader or any other iterable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from weft.data.batches import seeded_order
from weft.data.data import SPLITS
from weft.data.datasets import short, wrong_name

if TYPE_CHECKING:
    from weft.data.data import Data


_NO_BATCHES = (str, bytes, int, float, complex, type(None), type, set, memoryview, BaseException)


class LoaderBatches:
    """The batches of a DataLoader or of any iterable, exactly as it yields them (its order, its random numbers).

    A dict gets "name" (the split) and "epoch"; everything else passes unchanged.
    """

    resident = False
    """Whether the tensors are in memory, and their order a function of (seed, epoch)."""

    def __init__(
        self, loader: Any, *, split: str, to_device: Callable[[Any], Any], sampler: Any = None, workers: Any = None
    ) -> None:
        self.loader, self.split, self.to_device, self.sampler = loader, split, to_device, sampler
        self._workers: WorkerSeeds | None = workers
        self.one_shot = iter(loader) is loader if not isinstance(loader, DataLoader) else False
        self._used = False

    @property
    def rows(self) -> int | None:
        """Examples in an epoch where the loader's dataset has a length, else None."""
        dataset = getattr(self.loader, "dataset", None)
        return len(dataset) if hasattr(dataset, "__len__") else None  # type: ignore[arg-type]

    def __len__(self) -> int:
        try:
            return len(self.loader)
        except TypeError:
            raise TypeError(
                f"The {self.split} data ({type(self.loader).__name__}) has no length, so no share of it can be taken; "
                "give limit_batches as a number of batches."
            ) from None

    def epoch(self, number: int, start: int = 0) -> Iterable[Any]:
        """The batches of epoch `number`; the first `start` are drawn and left out."""
        return (self.to_device(self._named(batch, number)) for batch in self.raw(number, start))

    def raw(self, number: int, start: int = 0) -> Iterable[Any]:
        """The same as the loader made them."""
        if self.one_shot and self._used:
            return self._going_on()
        self._used = True
        if self.sampler is not None:
            self.sampler.epoch = number
        if self._workers is not None:
            self._workers.begin(number)
        batches = iterator_of(self.loader)
        for _ in range(start):
            next(batches)
        sampler: Any = getattr(self.loader, "batch_sampler", None)
        if hasattr(sampler, "is_empty"):  # of several processes
            from weft.data.shares import without_empty

            return without_empty(batches, sampler, start)
        return batches

    def _going_on(self) -> Iterator[Any]:
        """What a one-shot iterable has left after the epochs before, which `limit_batches` ended."""
        is_used_up = True
        for batch in self.loader:
            is_used_up = False
            yield batch
        if is_used_up:
            raise RuntimeError(
                f"The {self.split} data is a one-shot iterable and was used up by the epochs before; pass a list, a "
                "DataLoader, or an object whose __iter__ starts anew. An endless one needs limit_batches."
            )

    def _named(self, batch: Any, number: int) -> Any:
        if not isinstance(batch, dict):
            if isinstance(batch, _NO_BATCHES):
                raise TypeError(
                    f"The {self.split} data yields {str(batch)[:60]!r} ({type(batch).__name__}) as a batch; expected a "
                    "dict of tensors, or what your step takes as one."
                )
            return batch
        name = batch.get("name", self.split)
        if "epoch" in batch or not isinstance(name, str):
            key = "epoch" if "epoch" in batch else "name"
            raise ValueError(
                f"The {self.split} data yields a batch with a {key!r} of its own, {short(batch[key])}; weft writes "
                f"{'the number of the epoch' if key == 'epoch' else 'the name of the split'} there. "
                f"Rename it, for example to {f'row_{key}'!r}."
            )
        if name != self.split and self.split != "predict":
            raise ValueError(wrong_name(name, self.split))
        return {**batch, "name": self.split, "epoch": number}


def iterator_of(loader: Any) -> Iterator[Any]:
    """`iter(loader)`: without workers gathered at once, and they do not die of a signal to all processes of the run."""
    if not isinstance(loader, DataLoader):
        return iter(loader)
    if not loader.num_workers:
        from weft.data.gathering import gathering

        return gathering(iter(loader))
    from weft.data.workers import iterate

    return iterate(loader)


class WorkerSeeds:
    """Gives the workers of a loader random numbers that are a function of (seed, rank, epoch, split).

    A worker seeds torch, numpy and python from what the loader draws from `generator` when its iteration begins.
    """

    def __init__(self, generator: torch.Generator, seed: int, rank: int, split: str) -> None:
        self.generator, self.seed, self.rank, self.split = generator, seed, rank, SPLITS.index(split)

    def begin(self, epoch: int) -> None:
        """Seed those of an epoch."""
        state = np.random.SeedSequence([self.seed, self.rank, epoch, self.split]).generate_state(1, np.uint64)[0]
        self.generator.manual_seed(int(state >> np.uint64(1)))


class SeededOrder(torch.utils.data.Sampler):
    """Row numbers in an order that is a function of (seed, epoch) alone."""

    def __init__(self, rows: int, seed: int, shuffle: bool) -> None:
        self.rows, self.seed, self.shuffle, self.epoch = rows, seed, shuffle, 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Any:
        if not self.shuffle:
            return iter(range(self.rows))
        return iter(seeded_order(self.rows, self.seed, (self.epoch, 0, 0)).tolist())


def loader_batches(
    data: Data,
    source: Any,
    split: str,
    *,
    seed: int,
    device: Any,
    to_device: Callable[[Any], Any],
    rank: int,
    world: int,
) -> LoaderBatches:
    """The batches of a dataset that is no tensors (a DataLoader is made for it), a DataLoader, or an iterable of
    batches.

    Batches for a GPU come from pinned memory, so that their copy waits for nothing.
    """
    training, sampler = split == "train", None
    shuffle = training and data.shuffle
    if not isinstance(source, DataLoader) and hasattr(source, "__getitem__") and isinstance(source, Dataset):
        size = data.size_of_batch(split)
        rows = len(source)  # type: ignore[arg-type]
        if rows == 0:
            raise ValueError(f"The {split} data is empty: {short(source)} has no rows.")
        sampler = SeededOrder(rows, seed, shuffle)
        source = DataLoader(
            source,
            batch_size=size or rows,
            sampler=sampler,
            drop_last=training and data.drop_last,
            num_workers=num_workers(data.num_workers),
            collate_fn=getattr(source, "collate_fn", None),
            pin_memory=torch.device(device).type == "cuda" and data.pre_batch is None,
            generator=torch.Generator(),  # its own, so that iterating does not draw from the global random state
        )
    if not hasattr(source, "__iter__"):
        raise TypeError(
            f"The {split} data is {short(source)}; expected a dataset, a DataLoader or an iterable of batches."
        )
    streams = isinstance(source, DataLoader) and isinstance(source.dataset, IterableDataset)  # len() would raise
    if not streams and hasattr(source, "__len__") and len(source) == 0:
        raise ValueError(f"The {split} data is empty: {short(source)} yields no batch.")
    made_here = sampler is not None
    if world > 1:
        from weft.data.shares import shared_loader

        source, sampler = shared_loader(
            source, split, lambda rows, shuffle: SeededOrder(rows, seed, shuffle), rank, world
        )
        if source.num_workers:  # the user's generator is alike in every process, and its workers' noise would be
            source.generator = torch.Generator()
    is_ours = made_here or (world > 1 and source.num_workers)
    generator: Any = source.generator if is_ours else None
    workers = WorkerSeeds(generator, seed, rank, split) if is_ours else None
    if data.pre_batch is not None:
        if not made_here:
            raise ValueError(
                f"Data: pre_batch needs a dataset; the {split} data is {short(source)}, which makes batches."
            )
        from weft.data.prebatch import PreBatched

        once = LoaderBatches(source, split=split, to_device=to_device, sampler=sampler, workers=workers)
        workers = None
        sampler = source = PreBatched(lambda: once.raw(0), len(source), source.dataset, data.pre_batch, seed, shuffle)
    return LoaderBatches(source, split=split, to_device=to_device, sampler=sampler, workers=workers)


def num_workers(given: int | str) -> int:
    """`given`, or for "all" as many as this process may use cores."""
    if given != "all":
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
