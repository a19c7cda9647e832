"""Batches that are made once and kept, for datasets whose rows are slow to read or to put together.

Which rows share a batch is then fixed by the first epoch's order; later epochs take the batches in a new order.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch


class PreBatched:
    """The batches of `make(0)`, kept in memory or in a temporary folder of its own, in an order by (seed, `epoch`).

    Each use gets a copy, so that nothing a problem does to a batch outlasts its step. On disk only tensors and plain
    values can be kept. With `shuffle=False` the order stays as it was made. The folder goes with the object.
    """

    made_once = True

    def __init__(
        self, make: Callable[[], Iterable[Any]], count: int, dataset: Any, place: str, seed: int, shuffle: bool
    ) -> None:
        self.make, self.count, self.dataset, self.place = make, count, dataset, place
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self.within: Callable[[], AbstractContextManager[None]] = nullcontext  # of what they are made: the random state
        self._kept: list[Any] | None = None
        self._folder: Path | None = None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        if self._kept is None:
            if self.place == "on_disk":
                self._folder = Path(tempfile.mkdtemp(prefix="weft-batches-"))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            with self.within():
                self._kept = [self._put(number, batch) for number, batch in enumerate(self.make())]
        order = range(len(self._kept))
        if self.shuffle:
            source = np.random.SeedSequence([self.seed, self.epoch, 1, 0])
            order = np.random.Generator(np.random.PCG64(source)).permutation(len(self._kept)).tolist()
        for number in order:
            yield self._get(number)

    def _put(self, number: int, batch: Any) -> Any:
        if self._folder is None:
            return batch
        path = self._folder / f"batch-{number}.pt"
        torch.save(batch, path)
        if number == 0:
            self._read(path)  # a batch that cannot be read back is found before the others are made
        return path

    def _get(self, number: int) -> Any:
        assert self._kept is not None
        kept = self._kept[number]
        return copy.deepcopy(kept) if self._folder is None else self._read(kept)

    def _read(self, path: Path) -> Any:
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:
            raise TypeError(
                "pre_batch='on_disk' keeps batches of tensors and plain values, and these hold something else; "
                f"use 'in_memory'. ({str(error).splitlines()[0]})"
            ) from error
