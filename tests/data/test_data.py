"""Data: what is in a batch, in which order, and that nothing is lost, doubled or changed."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import weft
from weft.data.batches import Batches
from weft.data.data import as_data
from weft.data.loaders import LoaderBatches
from weft.data.splits import batches_of

ROWS = 103


def numbered(rows: int = ROWS) -> weft.DictDataset:
    return weft.DictDataset({"x": torch.arange(rows * 2.0).reshape(rows, 2), "n": torch.arange(rows)})


def row_numbers(batches) -> list[int]:
    return torch.cat([b["n"] for b in batches]).tolist()


# ---- order --------------------------------------------------------------------------------------------------------


def test_an_epoch_yields_every_row_once_in_batches_of_the_asked_size():
    found = batches_of(weft.Data(numbered(), batch_size=10), "train", seed=3)
    assert isinstance(found, Batches) and len(found) == 11 and found.rows == ROWS
    batches = list(found.epoch(0))
    assert [len(b["n"]) for b in batches] == [10] * 10 + [3]
    assert sorted(row_numbers(batches)) == list(range(ROWS))
    for batch in batches:
        assert batch["name"] == "train" and batch["epoch"] == 0
        assert torch.equal(batch["index"], batch["n"])  # the row numbers
        assert torch.equal(batch["x"][:, 0], 2.0 * batch["n"])  # rows stay together


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    def order(seed, epoch):
        return row_numbers(batches_of(weft.Data(numbered(), batch_size=10), "train", seed=seed).epoch(epoch))

    state = torch.get_rng_state()
    first = order(1, 0)
    assert torch.equal(state, torch.get_rng_state())  # the global random state is neither drawn nor changed
    torch.rand(5)
    assert order(1, 0) == first
    assert order(1, 1) != first and order(2, 0) != first  # negative control


def test_an_epoch_started_in_the_middle_goes_on_as_the_whole_one():
    for parts in (numbered(), {"a": numbered(50), "b": numbered(21)}):
        found = batches_of(weft.Data(parts, batch_size=8), "train", seed=0)
        whole, rest = list(found.epoch(4)), list(found.epoch(4, start=3))
        for a, b in zip(whole[3:], rest, strict=True):
            assert str(a) == str(b)
        assert str(whole[2]) != str(rest[0])


def test_dev_data_and_shuffle_false_keep_the_order_of_the_rows():
    data = weft.Data(numbered(), numbered(), batch_size=10, shuffle=False)
    assert row_numbers(batches_of(data, "train", seed=0).epoch(0)) == list(range(ROWS))
    data = weft.Data(numbered(), numbered(), batch_size=10)
    assert row_numbers(batches_of(data, "dev", seed=0).epoch(5)) == list(range(ROWS))


def test_drop_last_leaves_out_the_short_training_batch_only():
    data = weft.Data(numbered(), numbered(), batch_size=10, drop_last=True)
    assert [len(b["n"]) for b in batches_of(data, "train", seed=0).epoch(0)] == [10] * 10
    assert len(row_numbers(batches_of(data, "dev", seed=0).epoch(0))) == ROWS


def test_without_a_batch_size_all_rows_are_one_batch():
    (batch,) = batches_of(weft.Data(numbered()), "train", seed=0).epoch(0)
    assert len(batch["n"]) == ROWS


def test_many_chunks_give_the_same_batches_as_one(monkeypatch):
    found = batches_of(weft.Data(numbered(), batch_size=7), "train", seed=0)
    whole = row_numbers(found.epoch(2))
    monkeypatch.setattr("weft.data.batches.CHUNK_BYTES", 500)
    assert row_numbers(found.epoch(2)) == whole


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_global_batch_without_doubles(world):
    whole = batches_of(weft.Data(numbered(), batch_size=10 * world), "train", seed=0)
    shares = [
        batches_of(weft.Data(numbered(), batch_size=10), "train", seed=0, rank=r, world=world) for r in range(world)
    ]
    assert {len(s) for s in shares} == {len(whole)}
    for batch, *parts in zip(whole.epoch(1), *(s.epoch(1) for s in shares), strict=True):
        assert torch.cat([p["n"] for p in parts]).tolist() == batch["n"].tolist()
        assert max(len(p["n"]) for p in parts) - min(len(p["n"]) for p in parts) <= 1


# ---- several datasets of different sizes --------------------------------------------------------------------------


def test_a_split_of_several_datasets_is_nested_and_the_smaller_ones_start_over():
    parts = {"interior": numbered(40), "boundary": numbered(7)}
    found = batches_of(weft.Data(parts, batch_size={"interior": 8, "boundary": 3}), "train", seed=0)
    batches = list(found.epoch(0))
    assert len(batches) == 5 and found.rows == 40
    assert sorted(torch.cat([b["interior"]["n"] for b in batches]).tolist()) == list(range(40))
    boundary = [b["boundary"]["n"].tolist() for b in batches]
    assert [len(b) for b in boundary] == [3, 3, 1, 3, 3]  # one pass, then a second begins
    assert sorted(row for rows in boundary[:3] for row in rows) == list(range(7))
    assert batches[0]["name"] == "train" and batches[0]["epoch"] == 0


def test_batch_sizes_by_split_and_part():
    data = weft.Data(
        {"a": numbered(20), "b": numbered(10)},
        {"a": numbered(6), "b": numbered(6)},
        batch_size={"train": {"a": 5, "b": 2}, "dev": 3},
    )
    first = next(iter(batches_of(data, "train", seed=0).epoch(0)))
    assert (len(first["a"]["n"]), len(first["b"]["n"])) == (5, 2)
    assert [len(b["b"]["n"]) for b in batches_of(data, "dev", seed=0).epoch(0)] == [3, 3]


def test_a_problem_trains_on_interior_and_boundary_points():
    """y' = -y with y(0) = 1: the residual inside, the value at the boundary."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()

    class Decay(torch.nn.Module):
        grad_inference = True

        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, batch):
            t = batch["interior"]["t"]
            y = self.net(t)
            (dy,) = torch.autograd.grad(y.sum(), t, create_graph=True)
            boundary = (self.net(batch["boundary"]["t"]) - 1).square().mean()
            return {"loss": (dy + y).square().mean() + boundary, "boundary": boundary}

    torch.manual_seed(0)
    points = {"interior": {"t": torch.rand(64, 1).double()}, "boundary": {"t": torch.zeros(1, 1).double()}}
    data = weft.Data(points, points, batch_size={"interior": 32, "boundary": 1}, inputs_require_grad=["t"])
    trainer = weft.Trainer(epochs=300, progress=False, optimizer=lambda p: torch.optim.Adam(p, 1e-2))
    trainer.fit(Decay(), data)
    t = torch.linspace(0, 1, 20).double()[:, None]
    assert (net(t) - torch.exp(-t)).abs().max() < 0.02
    assert trainer.validate()["dev_loss"] < 1e-3


# ---- what may be given --------------------------------------------------------------------------------------------


def test_numpy_lists_and_integers_keep_their_types():
    data = weft.DictDataset(
        {"a": np.ones((4, 2)), "b": [1, 2, 3, 4], "c": [0.5] * 4, "d": np.arange(4, dtype=np.int32)}
    )
    assert [t.dtype for t in data.datadict.values()] == [torch.float64, torch.int64, torch.float32, torch.int32]
    assert len(data) == 4 and data[1]["b"] == 2 and "a: (4, 2)" in repr(data)


def test_a_dataloader_is_iterated_exactly_as_it_is():
    torch.manual_seed(5)
    loader = DataLoader(numbered(), batch_size=10, shuffle=True)
    torch.manual_seed(7)
    expected = [row_numbers(loader), row_numbers(loader)]
    found = batches_of(weft.Data(loader), "train", seed=0)
    assert isinstance(found, LoaderBatches)
    torch.manual_seed(7)
    assert [row_numbers(found.epoch(0)), row_numbers(found.epoch(1))] == expected
    torch.manual_seed(8)
    assert row_numbers(found.epoch(0)) != expected[0]  # negative control


def test_batches_that_are_no_dicts_pass_unchanged():
    x, y = torch.rand(10, 2), torch.rand(10)
    given = [(x[:5], y[:5]), (x[5:], y[5:])]
    assert list(batches_of(weft.Data(given), "train", seed=0).epoch(0)) == given


def test_a_map_style_dataset_gets_a_loader_with_an_order_of_its_own():
    class Squares(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return {"n": torch.tensor(i), "square": torch.tensor(float(i * i))}

    found = batches_of(weft.Data(Squares(), Squares(), batch_size=6), "train", seed=1)
    state = torch.get_rng_state()
    first = row_numbers(found.epoch(0))
    assert (
        sorted(first) == list(range(20))
        and first != row_numbers(found.epoch(1))
        and first == row_numbers(found.epoch(0))
    )
    assert torch.equal(state, torch.get_rng_state())
    assert row_numbers(batches_of(weft.Data(Squares(), Squares(), batch_size=6), "dev", seed=1).epoch(0)) == list(
        range(20)
    )
    x = TensorDataset(torch.rand(6, 2), torch.rand(6))
    assert [len(b) for b in batches_of(weft.Data(x, batch_size=4), "train", seed=0).epoch(0)] == [2, 2]


def test_setup_functions_tuples_and_datasets_mean_the_same():
    def setup(n=20, size=5):
        return numbered(n), numbered(4), None, size

    for data in (as_data(setup, None, {"n": 30}), as_data(weft.Data(*setup(30)[:3], batch_size=5)), as_data(setup(30))):
        assert len(data.train) == 30 and data.batch_size == 5 and len(data.dev) == 4 and data.test is None
    assert as_data(numbered(), numbered(4)).dev.datadict["n"].numel() == 4


def test_what_requires_grad_in_a_dataset_requires_grad_in_its_batches():
    data = weft.DictDataset({"t": torch.rand(10, 1, requires_grad=True), "y": torch.rand(10, 1)})
    for split in ("train", "dev"):
        batch = next(iter(batches_of(weft.Data(data, data, batch_size=4), split, seed=0).epoch(0)))
        assert batch["t"].requires_grad and batch["t"].is_leaf and not batch["y"].requires_grad


def test_a_problem_that_writes_into_its_batch_does_not_change_the_dataset():
    class Rude(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, batch):
            batch["x"].mul_(3.0)
            return (self.weight * batch["x"]).square().mean()

    data, dev = numbered(), numbered(9)
    before = {k: v.clone() for k, v in data.datadict.items()}
    weft.Trainer(epochs=3, progress=False).fit(Rude(), weft.Data(data, dev, batch_size=10, shuffle=False))
    assert all(torch.equal(before[k], v) for k, v in data.datadict.items())
    assert torch.equal(dev.datadict["x"], numbered(9).datadict["x"])


# ---- windows ------------------------------------------------------------------------------------------------------


def test_windows_are_the_slices_of_the_series():
    series = {"y": torch.arange(20.0)[:, None], "u": torch.rand(20, 3)}
    data = weft.windows(series, length=6, stride=4)
    starts = range(0, 15, 4)
    assert data.datadict["y"].shape == (4, 6, 1) and data.datadict["u"].shape == (4, 6, 3)
    for row, start in enumerate(starts):
        assert torch.equal(data.datadict["u"][row], series["u"][start : start + 6])
    assert len(weft.windows([series, series], length=20)) == 2
    with pytest.raises(ValueError, match=r"last \{'y': 20, 'u': 20\} entries; expected equal, at least 21"):
        weft.windows(series, length=21)


# ---- refresh ------------------------------------------------------------------------------------------------------


class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        return {"loss": (self.weight - batch["x"]).square().mean(), "mean_x": batch["x"].mean()}


@pytest.mark.parametrize("seed", [None, 4])
def test_refresh_every_makes_the_data_anew_and_alike_for_the_same_seed(seed):
    def run():
        calls = []

        def setup():
            calls.append(torch.rand(12, 1))
            return weft.Data(weft.DictDataset({"x": calls[-1]}), batch_size=4, refresh_every=2)

        torch.manual_seed(1)
        result = weft.Trainer(epochs=6, seed=seed, progress=False).fit(Mean(), setup)
        return calls, result.history["train_mean_x"]

    calls, history = run()
    again, _ = run()
    assert len(calls) == 3  # epochs 0, 2, 4
    assert all(torch.equal(a, b) for a, b in zip(calls, again, strict=True))
    assert not torch.equal(calls[0], calls[1])
    expected = [float(c.double().mean()) for c in calls for _ in range(2)]
    assert history == pytest.approx(expected, abs=1e-6)


def test_with_a_seed_the_data_does_not_depend_on_the_users_random_state_nor_change_it():
    drawn = []

    def setup():
        drawn.append(torch.rand(3))
        return weft.DictDataset({"x": torch.ones(4, 1)}), None, None, 4

    for start in (1, 2):
        torch.manual_seed(start)
        weft.Trainer(epochs=1, seed=7, progress=False).fit(Mean(), setup)
    assert torch.equal(drawn[0], drawn[1])


def test_without_a_seed_the_users_random_state_is_used_as_it_is():
    def setup():
        return weft.DictDataset({"x": torch.rand(4, 1)}), None, None, 4

    torch.manual_seed(3)
    expected = torch.rand(4, 1)
    torch.manual_seed(3)
    trainer = weft.Trainer(epochs=1, progress=False)
    trainer.fit(Mean(), setup)
    assert torch.equal(trainer.run.data.train.datadict["x"], expected)
    assert torch.initial_seed() == 3 and trainer.run.state.feed.seed == 3  # recorded, not drawn


# ---- mistakes -----------------------------------------------------------------------------------------------------


def one_batch_fit(data, dev=None, **kwargs):
    return weft.Trainer(epochs=2, progress=False).fit(Mean(), data, dev, **kwargs)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: weft.DictDataset({"a": torch.rand(3), "b": torch.rand(4)}),
            ValueError,
            r"unequal lengths \{'a': 3, 'b': 4\}",
        ),
        (lambda: weft.DictDataset({"a": torch.rand(0, 2)}), ValueError, "empty"),
        (lambda: weft.DictDataset({}), TypeError, "dict of tensors"),
        (lambda: weft.DictDataset({"a": "text"}), TypeError, "'a' cannot be made a tensor"),
        (lambda: weft.DictDataset({"a": torch.tensor(1.0)}), ValueError, "single number"),
        (lambda: weft.Data(numbered(), batch_size=0), ValueError, "batch_size=0"),
        (lambda: weft.Data(numbered(), batch_size=2.5), ValueError, "batch_size=2.5"),
        (lambda: weft.Data(None), ValueError, "no training data"),
        (lambda: weft.Data(numbered(), refresh_every=0), ValueError, "refresh_every=0"),
        (lambda: one_batch_fit([]), ValueError, "train data is empty"),
        (
            lambda: one_batch_fit(DataLoader(numbered(3), batch_size=5, drop_last=True)),
            ValueError,
            "train data is empty",
        ),
        (lambda: one_batch_fit(weft.Data(numbered(3), batch_size=5, drop_last=True)), ValueError, "drop_last=True"),
        (
            lambda: one_batch_fit(numbered(), weft.DictDataset({"x": torch.rand(3, 1)}, name="train")),
            ValueError,
            "'train' was given as the dev",
        ),
        (lambda: one_batch_fit(numbered(), nsim=3), TypeError, "unknown arguments.*nsim"),
        (lambda: one_batch_fit(None), TypeError, "no data given"),
        (lambda: one_batch_fit(7), TypeError, "expected a dataset"),
        (lambda: one_batch_fit(lambda: numbered()), TypeError, r"expected \(train, dev, test, batch_size\)"),
        (lambda: one_batch_fit(iter([{"x": torch.rand(2, 1)}])), RuntimeError, "one-shot iterable"),
        (
            lambda: one_batch_fit(weft.Data(numbered(), inputs_require_grad=["t"])),
            ValueError,
            "inputs_require_grad names",
        ),
    ],
)
def test_bad_data_is_refused_in_words(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_nan_and_inf_are_counted_by_key():
    x = torch.ones(10, 2)
    x[2, 0], x[2, 1], x[5, 1] = float("nan"), float("inf"), float("-inf")
    data = weft.DictDataset({"x": x, "good": torch.ones(10)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weft.Trainer(epochs=1, progress=False, on_nonfinite="skip").fit(
            Mean(), weft.Data(data, batch_size=2, shuffle=False)
        )
    assert "train data: 'x' has NaN or Inf in 2 of 10 rows" in str(caught[0].message)
    with pytest.raises(ValueError, match="'x' has NaN or Inf in 2 of 10 rows"):
        weft.Trainer(epochs=1, progress=False, strict_data=True).fit(Mean(), data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weft.Trainer(epochs=1, progress=False).fit(Mean(), weft.DictDataset({"x": torch.ones(4, 1)}))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [4, 22, None])
def test_a_problem_that_changes_its_batch_in_place_does_not_change_the_data(
    shuffle: bool, batch_size: int | None
) -> None:
    class Doubles(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(2, 1), list[float]()

        def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            self.seen.append(batch["p"].mul_(2.0).abs().max().item())
            return {f"{batch['name']}_loss": (self.layer(batch["p"]) - 1).square().mean()}

    train, dev = torch.randn(22, 2), torch.randn(6, 2)
    before, problem = (train.clone(), dev.clone()), Doubles()
    data = weft.Data({"p": train}, {"p": dev}, batch_size=batch_size, shuffle=shuffle)
    weft.Trainer(epochs=3, progress=False).fit(problem, data)
    assert torch.equal(train, before[0]) and torch.equal(dev, before[1])
    assert max(problem.seen) == 2 * max(
        float(train.abs().max()), float(dev.abs().max())
    )  # and it did change its batches
