"""The batches of a split: slices of tensors that are in memory, or what a DataLoader yields.

for batch in Batches(parts, sizes, split="train", ...).epoch(3, start=20):      # epoch 3 from its batch 20 on
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
        self,
        parts: dict[str, dict[str, Tensor]],
        sizes: dict[str, int | None],
        *,
        split: str,
        nested: bool,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        require_grad: Iterable[str] = (),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.parts, self.split, self.nested, self.shuffle, self.seed = parts, split, nested, shuffle, seed
        self.rank, self.world, self.drop_last = rank, world, drop_last
        asked = set(require_grad)
        self.require_grad = {p: {k for k in t if k in asked or f"{p}.{k}" in asked} for p, t in parts.items()}
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
            order = (
                seeded_order(rows, self.seed, (epoch, number_of_part, cycle)).to(self.device(), non_blocking=True)
                if shuffle
                else None
            )
            last = min(per_cycle, first + self._num_batches - done)
            yield from self._slices(part, order, range(first, last), epoch, done)
            done += last - first

    @property
    def is_uneven(self) -> bool:
        """Whether parts cycle, or their batches are not the same shares of them: no one weight is right for all."""
        rows, size = next(iter(self.lengths.values())), next(iter(self.sizes.values()))
        return any(self.sizes[part] * rows != size * number for part, number in self.lengths.items())

    def device(self) -> torch.device:
        return next(iter(next(iter(self.parts.values())).values())).device

    def _slices(
        self, part: str, order: Tensor | None, batches: range, epoch: int, done: int
    ) -> Iterable[dict[str, Any]]:
        tensors, size, rows = self.parts[part], self.sizes[part], self.lengths[part]
        keys = list(tensors)
        chunk = max(1, CHUNK_BYTES // max(1, self.row_bytes[part] * size))  # batches gathered at a time
        grad = [k in self.require_grad[part] or tensors[k].requires_grad for k in keys]
        any_grad, fixed = any(grad), {} if self.nested else {"name": self.split, "epoch": epoch}
        for first in range(batches.start, batches.stop, chunk):
            lo, hi = first * size, min(min(first + chunk, batches.stop) * size, rows)
            index = order[lo:hi] if order is not None else torch.arange(lo, hi, device=self.device())
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
        """This process's rows of each global batch of a part.

        The first one of `index` is batch `number` of the epoch.
        """
        from weft.data.shares import share, share_of_part

        main, shares = next(iter(self.parts)), []
        for i, rows in enumerate(index.split(size)):
            if part == main:
                mine = share(len(rows), self.rank, self.world)
            else:
                mine = share_of_part(len(rows), self.rows_of_part(main, number + i), self.rank, self.world)
            shares.append(rows[mine])
        return torch.cat(shares), [len(s) for s in shares]

    def rows_of_part(self, part: str, number: int) -> int:
        """Rows that a part has in (global) batch `number` of an epoch."""
        rows, size = self.lengths[part], self.sizes[part]
        in_cycle = number % (rows // size if self.drop_last else -(-rows // size))
        return min(size, rows - in_cycle * size)


def in_lists(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` batches; the last may be shorter."""
    iterator = iter(batches)
    while batch := list(islice(iterator, size)):
        yield batch


def within(limit: float | None, source: Any) -> int | None:
    """A limit on batches as a number of them; a share is one of all that `source` has. None: no limit."""
    return max(1, int(limit * len(source))) if isinstance(limit, float) else limit


def num_batches(source: Any, limit: float | None) -> int | None:
    """Batches in an epoch of `source` within a limit; None if there are none, or nobody knows."""
    if source is None or not hasattr(getattr(source, "loader", []), "__len__"):
        return None
    try:
        most, there = within(limit, source), len(source)
    except TypeError:  # a DataLoader of an iterable dataset
        return None
    return there if most is None else min(most, there)


def num_examples(batch: Any) -> Any:
    """What a batch counts for: what it says (`batch["num_examples"]`), else how many rows it has.

    The batch may say one number, or one for each row, which are added up; any other object may have an attribute of
    that name (a float where they are weights). Rows are the first dimension that most of its tensors share (see
    `rows_in`). ValueError for a number below zero.
    """
    if type(batch) is dict and "num_examples" not in batch:
        return rows_in(batch)
    said = batch.get("num_examples") if isinstance(batch, Mapping) else getattr(batch, "num_examples", None)
    if said is None or callable(said):
        return rows_in(batch)
    number = float(said.sum() if isinstance(said, Tensor) else said)
    if not 0 <= number < float("inf"):
        raise ValueError(f'A batch says "num_examples" {number:g}; expected a number >= 0, or one for each row.')
    return int(number) if number.is_integer() else number


def rows_in(batch: Any) -> int:
    """The first dimension that most tensors of `batch` share (dict, list, tuple, object or tensor), 1 if there is none.

    A batch with row numbers, "index", has as many rows. Where as many tensors agree on another one, it is that of
    tensors of floating point numbers, then that of the first tensor. Tensors of one number do not count. Of what is
    nested, the outermost tensors count; where there are none, those of the first part that has some.
    """
    index = batch.get("index") if isinstance(batch, dict) else None
    if type(index) is Tensor and index.dim() == 1:  # the row numbers, which come with every batch of a DictDataset
        return index.size(0)
    found = [tensor for _, tensor in outermost(batch)]
    if len(found) < 2:
        return found[0].size(0) if found else 1
    votes: dict[int, list[int]] = {}
    for tensor in found:
        vote = votes.setdefault(tensor.size(0), [0, 0])
        vote[0] += 1
        vote[1] += tensor.is_floating_point()
    return max(votes, key=votes.__getitem__)  # of equals the first


def outermost(batch: Any) -> list[tuple[Any, Tensor]]:
    """The tensors that say how many rows a batch has, by key, attribute or number."""
    if isinstance(batch, Tensor):
        return [("", batch)] if batch.dim() else []
    if isinstance(batch, Mapping):
        items = list(batch.items())
    elif isinstance(batch, list | tuple):
        items = list(enumerate(batch))
    else:  # an object of a library of graphs, say, or a dataclass
        items = list(getattr(batch, "__dict__", {}).items())
    found = [(key, value) for key, value in items if isinstance(value, Tensor) and value.dim()]
    nested = (outermost(value) for _, value in items if isinstance(value, Mapping | list | tuple))
    return found or next(filter(None, nested), [])


def disagreement(batch: Any) -> str | None:
    """What to say once of a batch whose tensors differ in their rows, and that does not say what it counts for."""
    said = batch.get("num_examples") if isinstance(batch, Mapping) else getattr(batch, "num_examples", None)
    index = batch.get("index") if isinstance(batch, Mapping) else None
    is_known = said is not None or (isinstance(index, Tensor) and index.dim() == 1)
    found = [] if is_known else outermost(batch)
    if len({tensor.size(0) for _, tensor in found}) < 2:
        return None
    from weft.data.counting import in_words

    return in_words(found, rows_in(batch))
