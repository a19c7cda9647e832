"""Loaders whose rows are gathered at once: the batches, their order and the random numbers are those of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, TensorDataset, random_split

import weft
from tests.helpers.bitwise import same
from weft.data.loaders import iterator_of


def odd_tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(23, 4, 2, generator=generator)
    return [x.transpose(1, 2), torch.arange(23), torch.rand(23, dtype=torch.float64), torch.rand(23, 1) > 0.5]


def by_number() -> TensorDataset:
    return TensorDataset(*odd_tensors())


def by_key() -> weft.DictDataset:
    return weft.DictDataset(dict(zip("abcd", odd_tensors(), strict=True)))


def of_neuromancer() -> Any:
    dataset = pytest.importorskip("neuromancer.dataset")
    return dataset.DictDataset(dict(zip("abcd", odd_tensors(), strict=True)), name="train")


LOADERS: dict[str, Callable[[Any], DataLoader]] = {
    "in order": lambda d: DataLoader(d, batch_size=5),
    "shuffled": lambda d: DataLoader(d, batch_size=5, shuffle=True),
    "without the last": lambda d: DataLoader(d, batch_size=5, drop_last=True),
    "own generator": lambda d: DataLoader(d, 4, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "with replacement": lambda d: DataLoader(d, 4, sampler=RandomSampler(d, replacement=True, num_samples=31)),
    "batches by number": lambda d: DataLoader(d, batch_sampler=BatchSampler([3, 1, -1, 1, 20], 2, False)),
    "a part": lambda d: DataLoader(Subset(d, [4, 1, 1, 9, 7]), batch_size=2),
    "a part of a part": lambda d: DataLoader(random_split(random_split(d, [15, 8])[0], [10, 5])[0], 3, shuffle=True),
    "one by one": lambda d: DataLoader(d, batch_size=None),
}


def collated(make: Callable[[], Any], kind: str) -> tuple[DataLoader, Any]:
    torch.manual_seed(0)
    dataset = make()
    loader = LOADERS[kind](dataset)
    if hasattr(dataset, "collate_fn") and loader.batch_size is not None:
        loader.collate_fn = dataset.collate_fn
    return loader, dataset


def gone_through(make: Callable[[], Any], kind: str, take: Callable[[Any], Any]) -> tuple[list[Any], Tensor]:
    loader, _ = collated(make, kind)
    torch.manual_seed(1)
    return [batch for _ in range(2) for batch in take(loader)], torch.get_rng_state()


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("make", [by_number, by_key, of_neuromancer], ids=lambda make: make.__name__)
def test_batches_and_random_numbers_are_those_of_the_loader(make: Callable[[], Any], kind: str) -> None:
    found, random = gone_through(make, kind, iterator_of)
    expected, random_expected = gone_through(make, kind, iter)
    assert len(found) == len(expected) > 1
    for mine, batch in zip(found, expected, strict=True):
        assert type(mine) is type(batch)
        if isinstance(batch, dict):
            assert list(mine) == list(batch)
            assert mine.get("name") == batch.get("name")
        mine, batch = (
            [v for v in (b.values() if isinstance(b, dict) else b) if isinstance(v, Tensor)] for b in (mine, batch)
        )
        assert [t.dtype for t in mine] == [t.dtype for t in batch]
        assert [t.stride() for t in mine] == [t.stride() for t in batch]
        assert same(mine, batch)
    assert torch.equal(random, random_expected)
    assert kind not in ("shuffled", "own generator") or not same(
        *([b[0] if isinstance(b, list) else b["a"] for b in part] for part in (expected[:4], expected[5:9]))
    )


class AskedOneByOne(TensorDataset):
    count = 0

    def __getitem__(self, index: Any) -> Any:
        type(self).count += 1
        return super().__getitem__(index)


class SquaredNumbers(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index**2))


def test_what_a_dataset_or_a_collation_does_itself_is_done() -> None:
    list(iterator_of(DataLoader(AskedOneByOne(*odd_tensors()), batch_size=4)))
    assert AskedOneByOne.count == 23
    assert torch.cat(list(iterator_of(DataLoader(SquaredNumbers(), batch_size=4)))).tolist() == [
        0.0,
        1.0,
        4.0,
        9.0,
        16.0,
        25.0,
    ]
    own = DataLoader(by_number(), batch_size=4, collate_fn=lambda batch: len(batch))
    assert list(iterator_of(own)) == [4, 4, 4, 4, 4, 3]


def test_rows_are_gathered_at_once_and_from_the_tensors_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, asked = by_key(), []
    monkeypatch.setattr(weft.DictDataset, "__getitem__", lambda self, index: asked.append(index))
    batches = iterator_of(DataLoader(dataset, batch_size=10))
    next(batches)
    dataset.datadict["b"] = dataset.datadict["b"] + 100
    assert next(batches)["b"].tolist() == list(range(110, 120))
    assert not asked


def test_a_row_that_is_not_there_is_named_by_torch() -> None:
    loader = DataLoader(by_number(), batch_sampler=[[0, 99]])
    with pytest.raises(IndexError, match="index 99 is out of bounds"):
        list(iterator_of(loader))


def test_tensors_that_require_gradients_keep_them() -> None:
    x = torch.rand(6, 1, requires_grad=True)
    for batch in iterator_of(DataLoader(TensorDataset(x), batch_size=2)):
        batch[0].sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0]] * 6
