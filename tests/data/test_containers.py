"""What data may be given as: kept as it is, with all that it says, or refused by name."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

import weft
from weft.data.batches import CHUNK_BYTES
from weft.data.splits import check_finite, num_not_finite

X = torch.rand(8, 1, generator=torch.Generator().manual_seed(0))


def square() -> weft.Problem:
    return weft.Problem([weft.Node(nn.Linear(1, 1), ["x"], ["u"])], [weft.objective(lambda u: u**2, name="m")])


def fit_one(data: Any, dev: Any = None, made: nn.Module | None = None, **options: Any) -> weft.FitResult:
    return weft.Trainer(epochs=1, progress=False, **options).fit(made or square(), data, dev)


class Quantity(np.ndarray):
    """An array with a unit, as pint and astropy have them."""

    unit = "km"


# ---- kept

NAN = float("nan")
KEPT: dict[str, tuple[Any, list[Any], torch.dtype]] = {
    "column": (pd.Series([1.0, 2.0, 3.0]), [1.0, 2.0, 3.0], torch.float64),
    "column of a split": (pd.Series([1.0, 2.0, 3.0], index=[4, 9, 2]), [1.0, 2.0, 3.0], torch.float64),
    "column in reverse": (pd.Series([1.0, 2.0, 3.0])[::-1], [3.0, 2.0, 1.0], torch.float64),
    "column with nan": (pd.Series([1.0, NAN, 3.0]), [1.0, NAN, 3.0], torch.float64),
    "table": (pd.DataFrame({"a": [1, 2], "b": [3, 4]}), [[1, 3], [2, 4]], torch.int64),
    "table of two kinds": (pd.DataFrame({"a": [1, 2], "b": [0.5, 4]}), [[1.0, 0.5], [2.0, 4.0]], torch.float64),
    "nullable, nothing missing": (pd.Series([1, 2], dtype="Int64"), [1, 2], torch.int64),
    "nullable table": (pd.DataFrame({"a": [1, 2]}, dtype="Float64"), [[1.0], [2.0]], torch.float64),
    "uint16": (np.array([1, 65535], np.uint16), [1, 65535], torch.int32),
    "uint32": (np.array([1, 2**32 - 1], np.uint32), [1, 2**32 - 1], torch.int64),
    "uint64": (np.array([1, 2**63 - 1], np.uint64), [1, 2**63 - 1], torch.int64),
    "uint16 tensor": (torch.tensor([1, 65535], dtype=torch.uint16), [1, 65535], torch.int32),
    "uint8": (np.array([1, 255], np.uint8), [1, 255], torch.uint8),
    "masked array without a mask": (np.ma.array([1.0, 2.0]), [1.0, 2.0], torch.float64),
    "list": ([1.0, 2.0], [1.0, 2.0], torch.float32),
    "list of tuples": ([(1.0, 2.0), (3.0, 4.0)], [[1.0, 2.0], [3.0, 4.0]], torch.float32),
    "bool": (np.array([True, False]), [True, False], torch.bool),
    "complex": (np.array([1j, 2.0]), [1j, 2.0], torch.complex128),
}


@pytest.mark.parametrize("kind", KEPT)
def test_the_numbers_of_a_container_are_kept(kind: str) -> None:
    given, values, dtype = KEPT[kind]
    made = weft.DictDataset({"v": given}).datadict["v"]
    assert made.dtype == dtype
    assert np.array_equal(np.array(made.tolist()), np.array(values), equal_nan=dtype.is_floating_point)


def test_columns_train_in_shuffled_batches_whatever_they_came_in() -> None:
    table = pd.DataFrame({"x": np.arange(8.0), "n": np.arange(8, dtype=np.uint16)}, index=range(8, 0, -1))
    seen: list[tuple[float, int]] = []
    look = {"on_step_start": lambda t, b: seen.extend(zip(b["x"][:, 0].tolist(), b["n"].tolist(), strict=True))}
    data = weft.DictDataset({"x": table[["x"]], "n": table["n"]})
    fit_one(weft.Data(data, batch_size=3), precision="64-true", hooks=look)
    assert sorted(seen) == [(float(i), i) for i in range(8)]


def test_a_dataset_of_a_file_is_read_at_once(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["x"], file["y"] = X.numpy(), X.numpy()
        for data in ({"x": file["x"], "y": file["y"]}, file):
            assert weft.DictDataset(data).datadict["x"].equal(X)
            assert fit_one(weft.Data(data, batch_size=3)).steps == 3


def test_arrays_share_their_memory_and_read_only_ones_draw_no_warning(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        made = weft.DictDataset({"x": mapped}).datadict["x"]
        assert made.data_ptr() == mapped.ctypes.data
        fit_one(weft.Data({"x": mapped}, batch_size=3))


# ---- refused

REFUSED: dict[str, tuple[Any, str]] = {
    "missing integers": (pd.Series([1, None, 3], dtype="Int64"), r"1 of its numbers .*Int64.*dropna"),
    "missing floats": (pd.Series([1.0, None], dtype="Float64"), "1 of its numbers are missing"),
    "missing bools": (pd.Series([True, None], dtype="boolean"), "1 of its numbers are missing"),
    "table with missing": (pd.DataFrame({"a": pd.Series([1, None], dtype="Int64"), "b": [1, 2]}), "1 of its numbers"),
    "categories": (pd.Series(["a", "b"], dtype="category"), r"stand for categories.*\.cat\.codes"),
    "categories of numbers": (pd.Series([10, 20], dtype="category"), "stand for categories"),
    "times": (pd.Series(pd.date_range("2020", periods=2)), "it holds times"),
    "times of a zone": (pd.Series(pd.date_range("2020", periods=2, tz="UTC")), "expected numbers|it holds times"),
    "durations": (pd.Series(pd.to_timedelta([1, 2], unit="s")), "it holds times"),
    "datetime64": (np.array(["2020", "2021"], "M8[Y]"), r"it holds times \(datetime64\[Y\]\)"),
    "text": (pd.Series(["a", "b"]), "expected numbers"),
    "objects": (np.array([None, 1]), "expected numbers"),
    "masked": (np.ma.array([1.0, 2.0], mask=[0, 1]), r"masked array with 1 missing.*\.filled"),
    "unit": (np.ones(3).view(Quantity), "it has a unit, km"),
    "units": (SimpleNamespace(units="m", shape=(2,), dtype=np.dtype("f4")), "it has a unit, m"),
    "named dimensions": (
        SimpleNamespace(dims=("t", "x"), coords={}, shape=(2, 2), dtype=np.dtype("f4")),
        r"dimensions \('t', 'x'\)",
    ),
    "sparse": (torch.eye(3).to_sparse(), r"sparse tensor.*\.to_dense\(\)"),
    "big-endian": (np.arange(3, dtype=">f4"), r"bytes are in the other order.*astype\(float32\)"),
    "too large": (np.array([2**64 - 1], np.uint64), r"above 2\*\*63 - 1"),
    "negative strides": (np.arange(3.0)[::-1], "negative"),
    "records": (np.zeros(2, [("a", "f4")]), "expected numbers"),
    "words": (["a", "b"], "too many dimensions"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_tensor_cannot_hold_is_refused_by_name(kind: str) -> None:
    given, says = REFUSED[kind]
    with pytest.raises(TypeError, match=f"DictDataset: 'v' cannot be made a tensor.*({says})"):
        weft.DictDataset({"v": given})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="'v' .*nested tensor"):
        weft.DictDataset({"v": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])})


def test_columns_whose_rows_carry_other_labels_do_not_belong_together() -> None:
    x = pd.Series([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="rows of 'y' and 'x' have different labels"):
        weft.DictDataset({"x": x, "y": x.sample(frac=1.0, random_state=1)})
    shuffled = x.sample(frac=1.0, random_state=1)
    weft.DictDataset({"x": shuffled, "y": shuffled, "z": np.ones(3)})


@pytest.mark.parametrize(
    "given",
    [X, X.numpy(), pd.Series([1.0, 2.0]), np.ma.array([1.0]), "data.csv"],
    ids=["tensor", "array", "column", "masked", "text"],
)
def test_tensors_and_arrays_are_no_batches(given: Any) -> None:
    way = "Load it first" if isinstance(given, str) else r"fit\(weft.Supervised\(net, loss_fn\), \(X, y\)\)"
    says = f"train data is .*are not taken for batches.*{way}"
    made = nn.Linear(1, 1)
    for call in (lambda: fit_one(given, made=made), lambda: weft.Data(given), lambda: fit_one(given, given, made=made)):
        with pytest.raises(TypeError, match=says):
            call()
    with pytest.raises(TypeError, match="dev data is .*are not taken for batches"):
        fit_one({"x": X}, given)
    trainer = weft.Trainer(epochs=1, progress=False)
    trainer.fit(square(), {"x": X})
    with pytest.raises(TypeError, match="predict data is .*are not taken for batches"):
        trainer.predict(given)


@pytest.mark.parametrize(
    "data",
    [
        weft.Data(TensorDataset(X, X), batch_size=4),
        DataLoader(TensorDataset(X, X), batch_size=4),
        list(zip(X, X, strict=True)),
        [X, X],
    ],
    ids=["dataset", "loader", "pairs", "tensors"],
)
def test_a_problem_says_that_it_reads_batches_by_key(data: Any) -> None:
    with pytest.raises(TypeError, match=r"reads batches by key, and got one of type \w+; .*weft.DictDataset"):
        fit_one(data)


def test_batches_that_are_tensors_still_train_a_module_that_reads_them() -> None:
    step = lambda trainer, batch: trainer.problem(batch).square().mean()
    assert fit_one([X, X[:3]], made=nn.Linear(1, 1), training_step=step).steps == 2


# ---- keys that weft writes


class Yields(Dataset):
    def __init__(self, **columns: Any) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": X[i], **{key: column[i] for key, column in self.columns.items()}}


IDS = torch.arange(100, 108)
WRITES: dict[str, tuple[Callable[[], Any], str]] = {
    "index": (lambda: {"x": X, "index": IDS}, "index"),
    "epoch": (lambda: weft.DictDataset({"x": X, "epoch": IDS}), "epoch"),
    "name": (lambda: {"x": X, "name": IDS}, "name"),
    "reset_index": (lambda: {k: c for k, c in pd.DataFrame({"x": [1.0, 2.0]}).reset_index().items()}, "index"),
    "in a part": (lambda: {"a": {"x": X}, "b": {"x": X, "index": IDS}}, "index"),
    "a part": (lambda: {"a": {"x": X}, "name": {"x": X}}, "name"),
    "dataset with epoch": (lambda: weft.Data(Yields(epoch=IDS), batch_size=4), "epoch"),
    "dataset with name": (lambda: weft.Data(Yields(name=[f"sample{i}" for i in range(8)]), batch_size=4), "name"),
    "loader with epoch": (lambda: DataLoader(Yields(epoch=IDS)), "epoch"),
    "loader with names": (lambda: DataLoader(Yields(name=["a"] * 8)), "name"),
    "iterable with epoch": (lambda: [{"x": X, "epoch": IDS}], "epoch"),
    "prebatched": (lambda: weft.Data(Yields(epoch=IDS), batch_size=4, pre_batch="in_memory"), "epoch"),
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_column_that_weft_would_write_over_is_refused_by_name(kind: str) -> None:
    make, key = WRITES[kind]
    with pytest.raises(ValueError, match=f"The train data (has|yields a batch with a) '{key}'.*'row_{key}'"):
        fit_one(make(), precision="64-true")


def test_an_index_that_a_loader_yields_and_a_name_of_the_split_stay() -> None:
    seen: list[Any] = []
    look = {"on_step_start": lambda trainer, batch: seen.append((batch["index"].tolist(), batch["name"]))}
    fit_one(DataLoader(Yields(index=IDS), batch_size=8), hooks=look)
    fit_one([{"x": X, "index": IDS, "name": "train"}], hooks=look)
    assert seen == [(IDS.tolist(), "train")] * 2


def test_batches_made_once_train_and_are_named_once() -> None:
    seen: list[Any] = []
    look = {"on_step_start": lambda trainer, batch: seen.append((batch["name"], batch["epoch"]))}
    weft.Trainer(epochs=2, progress=False, hooks=look).fit(
        square(), weft.Data(Yields(), batch_size=8, pre_batch="in_memory")
    )
    assert seen == [("train", 0), ("train", 1)]


# ---- numbers that are not finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("shape", [(5000,), (5000, 3), (5000, 2, 2), (5000, 0)])
def test_rows_that_are_not_finite_are_counted_in_every_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.ones(shape, dtype=dtype)
    assert num_not_finite(values) == 0
    if values.numel():
        values[[3, 4999]], values[77] = float("nan"), float("-inf")
        assert num_not_finite(values) == 3


def test_a_sum_that_overflows_or_cancels_is_no_finding_and_hides_none() -> None:
    assert num_not_finite(torch.full((100,), 3e38)) == 0
    assert num_not_finite(torch.full((70000,), 60000.0, dtype=torch.float16)) == 0
    assert num_not_finite(torch.tensor([float("inf"), float("-inf"), 1.0])) == 2
    assert num_not_finite(torch.ones(3, dtype=torch.int64)) == 0


class Allocations(TorchDispatchMode):
    """The largest tensor that torch makes meanwhile outside of the memory of `given`, in bytes."""

    def __init__(self, given: np.ndarray) -> None:
        super().__init__()
        self.start, self.stop, self.largest = given.ctypes.data, given.ctypes.data + given.nbytes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, list | tuple) else [out]:
            if isinstance(made, Tensor) and not self.start <= made.data_ptr() < self.stop:
                self.largest = max(self.largest, made.numel() * made.element_size())
        return out


@pytest.mark.parametrize("bad", [False, True])
def test_the_look_for_numbers_that_are_not_finite_needs_a_few_mib(tmp_path: Path, bad: bool) -> None:
    x = np.memmap(tmp_path / "x", "f4", "w+", shape=(400_000, 64))  # 98 MiB
    if bad:
        x[7, 1] = np.nan
    with Allocations(x) as made, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_finite(weft.Data({"x": x}), False)
    assert len(caught) == bad
    assert made.largest <= 2 * CHUNK_BYTES


def test_loaders_and_shares_are_not_loaded_by_a_plain_fit() -> None:
    code = (
        "import sys, torch, weft\n"
        "p = weft.Problem([weft.Node(torch.nn.Linear(1, 1), ['x'], ['u'])], [weft.objective(lambda u: u**2)])\n"
        "d = weft.DictDataset({'x': torch.rand(8, 1)})\n"
        "weft.Trainer(epochs=1, progress=False, checkpoint=True, root_dir='r').fit(p, weft.Data(d, d, batch_size=3))\n"
        "print(sorted(m for m in sys.modules if m.startswith('weft.data.') or m == 'weft.step.measures'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['weft.data.batches', 'weft.data.data', 'weft.data.datasets', 'weft.data.splits']"
