"""Batches made once: the same rows together in every epoch, in another order, and nothing left behind."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import weft
from weft.data.splits import batches_of


class CountedRows(Dataset):
    """Counts how often a row is read."""

    def __init__(self, rows: int = 23) -> None:
        self.rows, self.reads = rows, 0

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        self.reads += 1
        return {"p": torch.tensor([float(row)])}


def epoch(data: weft.Data, number: int, split: str = "train", source: Any = None) -> list[tuple[float, ...]]:
    source = source or batches_of(data, split, seed=0)
    return [tuple(batch["p"].flatten().tolist()) for batch in source.epoch(number)]


@pytest.mark.parametrize("place", ["in_memory", "on_disk"])
def test_batches_are_made_once_and_come_in_a_new_order(place: str) -> None:
    rows = CountedRows()
    source = batches_of(weft.Data(rows, batch_size=4, pre_batch=place), "train", seed=0)
    first, second, again = (epoch(None, number, source=source) for number in (0, 1, 0))  # type: ignore[arg-type]
    assert rows.reads == 23  # once each, over three epochs
    assert first == again and first != second and sorted(first) == sorted(second)
    assert sorted(sum(first, ())) == [float(i) for i in range(23)]
    plain = weft.Data(CountedRows(), batch_size=4)
    assert sorted(epoch(plain, 0)) == sorted(first) and sorted(epoch(plain, 1)) != sorted(second)


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    data = weft.Data(CountedRows(), batch_size=4, pre_batch="in_memory")
    assert epoch(data, 3) == epoch(data, 3)
    source = batches_of(data, "train", seed=0)
    assert source is not None
    skipped = [tuple(b["p"].flatten().tolist()) for b in source.epoch(3, start=2)]
    assert skipped == epoch(data, 3)[2:]
    assert [t for b in batches_of(data, "train", seed=1).epoch(3) for t in b["p"].flatten().tolist()] != sum(
        epoch(data, 3), ()
    )


def test_splits_keep_their_order_and_drop_last_is_kept() -> None:
    data = weft.Data(CountedRows(), dev=CountedRows(), batch_size=4, drop_last=True, pre_batch="in_memory")
    assert epoch(data, 1, "dev") == [tuple(float(i) for i in range(k, min(k + 4, 23))) for k in range(0, 23, 4)]
    assert len(epoch(data, 0)) == 5


def test_what_a_problem_does_to_a_batch_does_not_last() -> None:
    source = batches_of(weft.Data(CountedRows(), batch_size=23, pre_batch="in_memory", shuffle=False), "train", seed=0)
    assert source is not None
    next(iter(source.epoch(0)))["p"].zero_()
    assert next(iter(source.epoch(0)))["p"].sum() == sum(range(23))


def test_two_runs_on_disk_do_not_meet_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sources = [
        batches_of(weft.Data(CountedRows(n), batch_size=4, pre_batch="on_disk"), "train", seed=0) for n in (8, 12)
    ]
    assert [len(list(source.epoch(0))) for source in sources if source is not None] == [2, 3]
    assert len(list(tmp_path.glob("weft-batches-*/batch-*.pt"))) == 5
    del sources
    gc.collect()
    assert not list(tmp_path.iterdir())


class Odd(CountedRows):
    def __getitem__(self, row: int) -> Any:
        return {"p": torch.zeros(1)}

    @staticmethod
    def collate_fn(rows: list[Any]) -> Any:
        return {"p": torch.zeros(len(rows), 1), "graph": CountedRows(3)}


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(TypeError, match="keeps batches of tensors and plain values"):
        list(batches_of(weft.Data(Odd(), batch_size=4, pre_batch="on_disk"), "train", seed=0).epoch(0))
    assert len(list(batches_of(weft.Data(Odd(), batch_size=4, pre_batch="in_memory"), "train", seed=0).epoch(0))) == 6
    with pytest.raises(ValueError, match="which makes batches"):
        batches_of(weft.Data(DataLoader(CountedRows(), batch_size=4), pre_batch="in_memory"), "train", seed=0)
    with pytest.raises(ValueError, match="pre_batch='memory': expected 'in_memory' or 'on_disk'"):
        weft.Data(CountedRows(), pre_batch="memory")


def test_training_on_tensors_is_the_same_with_it() -> None:
    from weft.demo import data_setup, make_problem

    def history(**options: Any) -> dict[str, list[float]]:
        import dataclasses

        torch.manual_seed(0)
        data = dataclasses.replace(data_setup(nsim=60, batch_size=8), **options)
        return weft.Trainer(epochs=2, seed=0, accelerator="cpu", progress=False).fit(make_problem(), data).history

    assert history(pre_batch="in_memory") == history() != history(shuffle=False)
