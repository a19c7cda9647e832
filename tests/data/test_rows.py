"""What a user has at hand as data: tables, files of arrays, pairs of them. Read, or refused with the line to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import torch
from torch import nn
from torch.utils.data import TensorDataset

import weft
from weft.data.evaluated import evaluation_data

A, B = np.arange(12.0).reshape(6, 2), np.linspace(0, 1, 6)[:, None]


def npz(folder: Path) -> Any:
    np.savez(folder / "d.npz", a=A, b=B)
    return np.load(folder / "d.npz")


def mat(folder: Path) -> Any:
    scipy.io.savemat(folder / "d.mat", {"a": A, "b": B})
    return scipy.io.loadmat(folder / "d.mat")


def hdf5(folder: Path) -> Any:
    with h5py.File(folder / "d.h5", "w") as file:
        file["a"], file["b"] = A, B
    return h5py.File(folder / "d.h5")


MAPPINGS: dict[str, Callable[[Path], Any]] = {
    "npz": npz,
    "mat": mat,
    "hdf5": hdf5,
    "dict": lambda folder: {"a": A, "b": B},
}


@pytest.mark.parametrize("kind", MAPPINGS)
def test_files_of_arrays_are_read_by_their_names(kind: str, tmp_path: Path) -> None:
    problem = weft.Problem([weft.Node(nn.Linear(2, 1), ["a"], ["u"])], [weft.objective(lambda u, b: (u - b) ** 2)])
    given = MAPPINGS[kind](tmp_path)
    trainer = weft.Trainer(epochs=2, progress=False, precision="64-true", seed=0)
    result = trainer.fit(problem, weft.Data(given, given, batch_size=4))
    assert result.steps == 4 and trainer.run is not None
    tensors = trainer.run.state.source("dev").parts[""]
    assert set(tensors) == {"a", "b"}
    assert torch.equal(tensors["a"], torch.tensor(A)) and torch.equal(tensors["b"], torch.tensor(B))


def test_what_matlab_writes_besides_is_left_out_and_what_it_cannot_hold_is_told(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "d.mat", {"a": A, "cells": np.array([["x", A]], dtype=object)})
    with pytest.raises(TypeError, match="'cells' cannot be made a tensor"):
        weft.Data(scipy.io.loadmat(tmp_path / "d.mat"))
    assert set(weft.Data(mat(tmp_path)).train.datadict) == {"a", "b"}
    scipy.io.savemat(tmp_path / "d.mat", {"a": A, "row": np.arange(6.0)})  # MATLAB makes it one row of six columns
    with pytest.raises(ValueError, match=r"unequal lengths \{'a': 6, 'row': 1\}"):
        weft.Data(scipy.io.loadmat(tmp_path / "d.mat"))


def test_the_columns_of_a_table_are_keys_that_a_net_reads() -> None:
    table = pd.DataFrame({"a": A[:, 0], "c": A[:, 1], "b": B[:, 0]}, index=list("uvwxyz")).astype("float32")
    net = weft.Node(nn.Linear(2, 1), ["a", "c"], ["u"])  # concatenated on the last axis
    problem = weft.Problem([net], [weft.objective(lambda u, b: (u - b) ** 2, name="fit")])
    result = weft.Trainer(epochs=1, progress=False).fit(problem, table, table)
    data = weft.Data(table, batch_size=2).train.datadict
    assert {key: tuple(column.shape) for key, column in data.items()} == {k: (6, 1) for k in "acb"}
    assert result.steps == 1 and torch.equal(data["c"][:, 0], torch.tensor(A[:, 1], dtype=torch.float32))
    with pytest.raises(TypeError, match=r"'name' cannot be made a tensor"):
        weft.Data(table.assign(name="x"))


def from_file(folder: Path) -> Any:
    file = hdf5(folder)
    return file["a"], file["b"]


def mapped(folder: Path) -> Any:
    np.save(folder / "a.npy", A)
    return np.load(folder / "a.npy", mmap_mode="r"), B


PAIRS: dict[str, Callable[[Path], Any]] = {
    "datasets of a file": from_file,
    "memory map": mapped,
    "lists of the same": lambda folder: (np.array(A.tolist()), torch.tensor(B)),
    "table and column": lambda folder: (
        pd.DataFrame(A, index=range(6, 0, -1)),
        pd.Series(B[:, 0], index=range(6, 0, -1)),
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_x_and_y_are_arrays_of_any_kind(kind: str, tmp_path: Path) -> None:
    x, y = PAIRS[kind](tmp_path)
    for data in (weft.Data((x, y)).train, evaluation_data("dev", (x, y), {}).dev, weft.Data(None, (x, y)).dev):
        assert torch.equal(data.datadict["x"], torch.tensor(A))
        assert torch.equal(data.datadict["y"].flatten(), torch.tensor(B[:, 0]))
    if kind == "memory map":
        assert np.shares_memory(weft.Data((x, y)).train.datadict["x"].numpy(), x)  # in place


def test_columns_that_do_not_belong_together_are_told() -> None:
    table = pd.DataFrame({"a": A[:, 0], "b": B[:, 0]})
    with pytest.raises(ValueError, match="different labels"):
        weft.Data((table[["a"]], table[["b"]].sample(frac=1.0, random_state=1)))


def test_batches_of_tuples_and_lists_stay_batches() -> None:
    rows = TensorDataset(torch.tensor(A), torch.tensor(B))
    batch = {"a": torch.tensor(A)}
    for given in (rows, [torch.tensor(A), torch.tensor(A)], (batch, batch), [(torch.tensor(A), torch.tensor(B))]):
        assert weft.Data(given).train is given
    assert weft.Data((torch.tensor(A), torch.tensor(B))).train is not rows
