"""The batches of a split: slices of tensors that are in memory, or what a DataLoader yields.

    for batch in Batches(parts, sizes, split="train", ...).epoch(3, start=20):      # epoch 3 from its batch 20 on
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from weft.prebatch import PreBatched, num_workers
from weft.sharding import SharedBatches, share, share_of_part, shared_loader, without_empty

if TYPE_CHECKING:
    from weft.data import Data

CHUNK_BYTES = 4 << 20


def seeded_order(rows: int, seed: int, key: tuple[int, ...]) -> Tensor:
    """The row numbers in an order that is a function of `seed` and `key` alone, on the CPU."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(int(state)))


class Batches:
    """The batches of one split: `len`, `rows`, and `epoch(number, start)` to go through them.

    Resident tensors are gathered a chunk of batches at a time (one index_select per key) and sliced, so that a
    small batch costs microseconds; what is yielded is a copy, and the dataset itself cannot be changed by a problem.
    """

    resident = True

    def __init__(
        self, parts: dict[str, dict[str, Tensor]], sizes: dict[str, int | None], *, split: str, nested: bool,
        shuffle: bool, drop_last: bool, seed: int, require_grad: Iterable[str] = (), rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.parts, self.split, self.nested, self.shuffle, self.seed = parts, split, nested, shuffle, seed
        self.require_grad, self.rank, self.world, self.drop_last = set(require_grad), rank, world, drop_last
        self.lengths = {p: next(iter(t.values())).shape[0] for p, t in parts.items()}
        num_bytes = {p: sum(t.element_size() * t.numel() for t in tensors.values()) for p, tensors in parts.items()}
        self.row_bytes = {p: num_bytes[p] // max(1, n) for p, n in self.lengths.items()}
        self.sizes = {p: min((sizes[p] or n) * (world if sizes[p] else 1), n) for p, n in self.lengths.items()}
        counts = [n // self.sizes[p] if drop_last else -(-n // self.sizes[p]) for p, n in self.lengths.items()]
        self._num_batches = max(counts)

    @property
    def rows(self) -> int:
        """Examples in an epoch: rows of the (largest part of the) split."""
        return max(self.lengths.values())

    def __len__(self) -> int:
        return self._num_batches

    def epoch(self, number: int, start: int = 0) -> Iterable[dict[str, Any]]:
        """The batches of epoch `number` from batch `start` on."""
        streams = [self._stream(i, part, number, start) for i, part in enumerate(self.parts)]
        if not self.nested:
            yield from streams[0]
            return
        for batches in zip(*streams, strict=False):
            batch = {part: b for part, b in zip(self.parts, batches, strict=True)}
            yield {**batch, "name": self.split, "epoch": number}

    def _stream(self, number_of_part: int, part: str, epoch: int, start: int) -> Iterable[dict[str, Any]]:
        """`len(self)` batches of one part; a part that is smaller than the largest starts over in a new order."""
        rows, size = self.lengths[part], self.sizes[part]
        per_cycle = rows // size if self.drop_last else -(-rows // size)
        done = start
        while done < self._num_batches:
            cycle, first = divmod(done, per_cycle)
            shuffle = self.shuffle and size < rows  # in one batch of all rows the order is of no consequence
            order = seeded_order(rows, self.seed, (epoch, number_of_part, cycle)).to(self._device()) if shuffle else None
            last = min(per_cycle, first + self._num_batches - done)
            yield from self._slices(part, order, range(first, last), epoch, done)
            done += last - first

    def _device(self) -> torch.device:
        return next(iter(next(iter(self.parts.values())).values())).device

    def _slices(
        self, part: str, order: Tensor | None, batches: range, epoch: int, done: int
    ) -> Iterable[dict[str, Any]]:
        tensors, size, rows = self.parts[part], self.sizes[part], self.lengths[part]
        keys = list(tensors)
        chunk = max(1, CHUNK_BYTES // max(1, self.row_bytes[part] * size))  # batches gathered at a time
        grad = [k in self.require_grad or tensors[k].requires_grad for k in keys]
        any_grad, fixed = any(grad), {} if self.nested else {"name": self.split, "epoch": epoch}
        for first in range(batches.start, batches.stop, chunk):
            lo, hi = first * size, min(min(first + chunk, batches.stop) * size, rows)
            index = order[lo:hi] if order is not None else torch.arange(lo, hi, device=self._device())
            if self.world > 1:
                index, local_sizes = self._share(part, index, size, done + first - batches.start)
            else:
                local_sizes = size
            if order is None and self.world == 1:
                gathered = [tensors[k].detach()[lo:hi].clone() for k in keys]
            else:
                gathered = [tensors[k].detach().index_select(0, index) for k in keys]
            is_one = hi - lo <= size and self.world == 1
            split_rows = [(t,) if is_one else t.split(local_sizes) for t in (*gathered, index)]
            for *values, rows_index in zip(*split_rows, strict=True):
                if any_grad:
                    values = [v.detach().requires_grad_() if g else v for v, g in zip(values, grad, strict=True)]
                yield {**dict(zip(keys, values, strict=True)), **fixed, "index": rows_index}

    def _share(self, part: str, index: Tensor, size: int, number: int) -> tuple[Tensor, list[int]]:
        """This process's rows of each global batch of a part; the first one of `index` is batch `number` of the epoch."""
        main, shares = next(iter(self.parts)), []
        for i, rows in enumerate(index.split(size)):
            if part == main:
                mine = share(len(rows), self.rank, self.world)
            else:
                mine = share_of_part(len(rows), self._rows_of(main, number + i), self.rank, self.world)
            shares.append(rows[mine])
        return torch.cat(shares), [len(s) for s in shares]

    def _rows_of(self, part: str, number: int) -> int:
        """Rows that a part has in (global) batch `number` of an epoch."""
        rows, size = self.lengths[part], self.sizes[part]
        in_cycle = number % (rows // size if self.drop_last else -(-rows // size))
        return min(size, rows - in_cycle * size)


class LoaderBatches:
    """The batches of a DataLoader or of any iterable, exactly as it yields them (its order, its random numbers).

    A dict gets "name" (the split) and "epoch"; everything else passes unchanged.
    """

    resident = False

    def __init__(self, loader: Any, *, split: str, to_device: Callable[[Any], Any], sampler: Any = None) -> None:
        self.loader, self.split, self.to_device, self.sampler = loader, split, to_device, sampler
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
        if self.one_shot and self._used:
            raise RuntimeError(
                f"The {self.split} data is a one-shot iterable and was used up by the first epoch; "
                "pass a list, a DataLoader, or an object whose __iter__ starts anew."
            )
        self._used = True
        if self.sampler is not None:
            self.sampler.epoch = number
        batches = iter(self.loader)
        for _ in range(start):
            next(batches)
        if isinstance(sampler := getattr(self.loader, "batch_sampler", None), SharedBatches):
            batches = without_empty(batches, sampler, start)
        return (self.to_device(self._named(batch, number)) for batch in batches)

    def _named(self, batch: Any, number: int) -> Any:
        if not isinstance(batch, dict):
            return batch
        name = batch.get("name", self.split)
        if name != self.split and self.split != "predict":
            raise ValueError(wrong_name(name, self.split))
        return {**batch, "name": self.split, "epoch": number}


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
    data: Data, source: Any, split: str, *, seed: int, device: Any, to_device: Callable[[Any], Any], rank: int, world: int
) -> LoaderBatches:
    """The batches of a dataset that is no tensors (a DataLoader is made for it), a DataLoader, or an iterable of batches.

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
            source, batch_size=size or rows, sampler=sampler, drop_last=training and data.drop_last,
            num_workers=num_workers(data.num_workers), collate_fn=getattr(source, "collate_fn", None),
            pin_memory=torch.device(device).type == "cuda" and data.pre_batch is None,
            generator=torch.Generator(),  # its own, so that iterating does not draw from the global random state
        )  # fmt: skip
    if not hasattr(source, "__iter__"):
        raise TypeError(
            f"The {split} data is {short(source)}; expected a dataset, a DataLoader or an iterable of batches."
        )
    streams = isinstance(source, DataLoader) and isinstance(source.dataset, IterableDataset)  # len() would raise
    if not streams and hasattr(source, "__len__") and len(source) == 0:
        raise ValueError(f"The {split} data is empty: {short(source)} yields no batch.")
    made_here = sampler is not None
    if world > 1:
        source, sampler = shared_loader(
            source, split, lambda rows, shuffle: SeededOrder(rows, seed, shuffle), rank, world
        )
    if data.pre_batch is not None:
        if not made_here:
            raise ValueError(f"Data: pre_batch needs a dataset; the {split} data is {short(source)}, which makes batches.")
        once = LoaderBatches(source, split=split, to_device=lambda batch: batch, sampler=sampler)
        sampler = source = PreBatched(lambda: once.epoch(0), len(source), source.dataset, data.pre_batch, seed, shuffle)
    return LoaderBatches(source, split=split, to_device=to_device, sampler=sampler)


def wrong_name(name: str, split: str) -> str:
    """What to say to a dataset that was named for another split."""
    return (
        f"A dataset named {name!r} was given as the {split} data. "
        f"Name it {split!r}, or leave the name out."
    )


def short(value: Any) -> str:
    """Type and beginning of a value, for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
