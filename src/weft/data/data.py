"""Data: what trains, and in which batches. Tensors stay where they are used and are sliced; nothing is collated.

def data_setup(nsim=5000):
    p = torch.rand(nsim, 2)
    train, dev = weft.DictDataset({"p": p[100:]}), weft.DictDataset({"p": p[:100]})
    return train, dev, None, 64                      # train, dev, test, batch size (None: one batch)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader, Dataset

from weft.config import BatchSize, Count, Natural, TrainerConfig, check, with_manual
from weft.data.datasets import short

SPLITS = ("train", "dev", "test", "predict")


@with_manual
@dataclass(frozen=True)
class Data:
    """The data of a run, by split, and how it is cut into batches.

    Each split is a `DictDataset` (or NeuroMANCER's), a dict of tensors, a pair `(X, y)` (the keys are then `x` and
    `y`), a table (each column is a key, of shape (rows, 1)), an open HDF5 file, what `numpy.load` returns of an .npz
    and `scipy.io.loadmat` of a .mat, a dict of datasets of different sizes
    (`{"interior": ..., "boundary": ...}`: the batch is nested by these names, and the smaller ones start over until
    the largest is through), any map-style dataset, a `DataLoader`, or an iterable of batches, which pass unchanged.
    """

    train: Any
    """What is trained on."""
    dev: Any = None
    """What is validated on: it decides about best weights and early stopping."""
    test: Any = None
    """What `trainer.test()` measures."""
    predict: Any = None
    """What `trainer.predict()` computes for; targets may be missing."""
    batch_size: BatchSize = None
    """Rows per batch and process (>= 1); None or "all": one batch. A dict by split, by part of a split, or both."""
    shuffle: bool = True
    """Training rows in a new order each epoch, a function of (seed, epoch) alone."""
    drop_last: bool = False
    """Leave out a short last training batch."""
    num_workers: Natural | Literal["all"] = 0
    """Processes that read a dataset which is not made of tensors; "all": one per core."""
    pre_batch: Literal["in_memory", "on_disk"] | None = None
    """Make the batches of a map-style dataset once: "in_memory" or "on_disk". Tensors stay in memory in any case."""
    refresh_every: Count | None = None
    """Call the data setup function again every n epochs (resampled collocation points)."""
    inputs_require_grad: tuple[str, ...] | list[str] = ()
    """Keys that derivatives are taken with respect to ("x"; "interior.x" of one part); they require grad in batches."""

    def __post_init__(self) -> None:
        if all(getattr(self, split) is None for split in SPLITS):
            raise ValueError("Data: there is no training data (train=None), and nothing to evaluate.")
        for split in SPLITS:
            object.__setattr__(self, split, read_rows(split, getattr(self, split)))
        check(self)
        object.__setattr__(self, "batch_size", _none_for_all(self.batch_size))
        given = {split: source for split in SPLITS if (source := getattr(self, split)) is not None}
        if own := [split for split, source in given.items() if makes_batches(source)]:
            from weft.data.idle import refuse_idle

            refuse_idle(given, own, self.batch_size, self.drop_last, self.shuffle)

    def size_of_batch(self, split: str, part: str | None = None) -> int | None:
        """The batch size of a split, or of one part of it."""
        size: Any = self.batch_size
        for name in (split, part):
            if isinstance(size, Mapping) and name is not None and name in size:
                size = size[name]
        if isinstance(size, Mapping):
            if part is None and split in ("test", "predict"):
                return None  # a dict that does not name these splits: they go through in one batch
            raise ValueError(f"Data: batch_size={self.batch_size!r} has no entry for {part or split!r}.")
        return size


class NoData(Data):
    """No data at all: a loop of one's own makes what it trains on."""

    def __post_init__(self) -> None:
        pass


def nothing_to_train_on(data: Data) -> Exception:
    """What to raise where there must be training data."""
    if isinstance(data, NoData):
        return TypeError("fit: no data given. Pass (X, y), weft.Data, a dataset, a loader or a data setup function.")
    return ValueError("There is no training data (train=None).")


def read_rows(split: str, source: Any) -> Any:
    """`source` with its rows under keys, where it has none itself: (X, y), a table, a file of arrays.

    TypeError for a lone tensor or array, with the line to write.
    """
    if (
        source is None
        or (type(source) is dict and "__header__" not in source)
        or isinstance(source, Dataset | DataLoader)
    ):
        return source
    from weft.data.rows import read

    return read(split, source)


def makes_batches(source: Any) -> bool:
    """Whether a split yields batches by itself, which nobody cuts: a list, an iterable, a DataLoader."""
    is_rows = isinstance(source, Mapping | Dataset) or hasattr(source, "datadict") or hasattr(source, "resident")
    return source is not None and not is_rows


def _none_for_all(size: Any) -> Any:
    if isinstance(size, Mapping):
        return {k: _none_for_all(v) for k, v in size.items()}
    return None if size == "all" else size


def as_data(data: Any, dev: Any = None, setup_kwargs: Mapping[str, Any] | None = None) -> Data:
    """`Data` made of whatever `fit` was given: a setup function, a Data, a 4-tuple, a dataset, a loader, batches."""
    kwargs = dict(setup_kwargs or {})
    if isinstance(data, nn.Module):
        raise TypeError(f"fit: the data is a module, {type(data).__name__}; expected a data setup function, or data.")
    if callable(data) and not isinstance(data, Dataset | DataLoader):
        if dev is not None:
            raise TypeError("fit: a data setup function returns its own dev set; `dev` cannot be given as well.")
        return _from_setup(data(**kwargs), getattr(data, "__name__", "data_setup"))
    if kwargs:
        raise _unknown_arguments(kwargs)
    if data is None and dev is None:
        return NoData(None)
    if isinstance(data, Data):
        return data if dev is None else replace(data, dev=dev)
    if isinstance(data, tuple) and len(data) == 4 and (data[3] is None or isinstance(data[3], int | Mapping)):
        if dev is not None:
            raise TypeError("fit: the tuple (train, dev, test, batch_size) holds a dev set; `dev` was given as well.")
        return Data(*data[:3], batch_size=data[3])
    return Data(data, dev)


def _unknown_arguments(given: Mapping[str, Any]) -> TypeError:
    from weft.words.foreign import advice

    told = []
    for name, value in given.items():
        is_option = name in TrainerConfig.__dataclass_fields__ or name in ("optimizer", "scheduler", "hooks", "loggers")
        here = f"; here it is an option of the trainer: weft.Trainer({name}=...)" if is_option else ""
        told.append(f"{name!r}{here or advice(name, value, ('data', 'epochs', 'resume', 'renew'))}")
    more = "".join(f" {one}{'' if one.endswith('?') else '.'}" for one in told if "; " in one)
    return TypeError(
        f"fit: unknown arguments {sorted(given)}; only a data setup function takes further arguments.{more}"
    )


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
