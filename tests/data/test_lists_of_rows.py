"""A batch size that cuts nothing is refused, with the line that makes a dataset of rows; nothing is ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import weft

X = torch.linspace(-1, 1, 12)[:, None]
ROWS = [{"x": x, "y": x.sin()} for x in X]
PAIRS = [(x, x.sin()) for x in X]
LOADER = DataLoader(TensorDataset(X, X), batch_size=4)
WHOLE = {"x": X, "y": X.sin()}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (ROWS, r"train data is list .*weft.DictDataset\(\{k: torch.stack\(\[r\[k\] for r in rows\]\)"),
        (PAIRS, r"train data is list .*torch.stack\(\[r\[0\] for r in rows\]\)"),
        (LOADER, r"train data is DataLoader .*to the DataLoader, or its dataset"),
        (iter(ROWS), r"train data is list_iterator .*weft.DictDataset"),
    ],
)
def test_a_batch_size_for_what_makes_its_batches_itself_is_refused(source: Any, says: str) -> None:
    with pytest.raises(ValueError, match=r"batch_size=8 has no effect: the " + says):
        weft.Data(source, batch_size=8)
    with pytest.raises(ValueError, match=r"batch_size=\{'train': 8, 'dev': 4\} has no effect"):
        weft.Data(source, WHOLE, batch_size={"train": 8, "dev": 4})
    with pytest.raises(ValueError, match=r"drop_last=True has no effect"):
        weft.Data(source, drop_last=True)
    weft.Data(source)


def test_the_order_of_a_loader_that_shuffles_is_not_changed_by_an_option() -> None:
    with pytest.raises(ValueError, match=r"shuffle=False has no effect: the train data is DataLoader"):
        weft.Data(DataLoader(ROWS, batch_size=4, shuffle=True), shuffle=False)
    weft.Data(LOADER, shuffle=False)  # it says the same
    weft.Data(WHOLE, DataLoader(ROWS, batch_size=4, shuffle=True), shuffle=False)


def test_what_a_setup_function_returns_is_looked_at_too() -> None:
    with pytest.raises(ValueError, match="batch_size=8 has no effect: the train data is list"):
        weft.Trainer(epochs=1, progress=False).fit(nn.Linear(1, 1), lambda: (ROWS, ROWS, None, 8))


def test_a_batch_size_of_another_split_is_no_mistake() -> None:
    weft.Data(LOADER, WHOLE, batch_size=8)
    weft.Data(ROWS, WHOLE, batch_size={"dev": 8})
    weft.Data(WHOLE, [WHOLE], batch_size=8, drop_last=True)
    weft.Data(LOADER, batch_size=4)  # it says the same


def test_the_line_that_is_named_cuts_the_rows_and_evaluations_take_batches_as_they_are() -> None:
    rows, sizes = ROWS, []
    data = weft.DictDataset({k: torch.stack([r[k] for r in rows]) for k in rows[0]})

    def step(trainer: Any, batch: Any) -> Any:
        sizes.append(len(batch["x"]))
        return (trainer.problem(batch["x"]) - batch["y"]).square().mean()

    made = nn.Linear(1, 1)
    trainer = weft.Trainer(epochs=1, progress=False, training_step=step, test_step=step)
    trainer.fit(made, weft.Data(data, test=[WHOLE], batch_size=8))
    assert sizes == [8, 4]
    trainer.test(made, weft.Data(data, test=[WHOLE], batch_size=8))
    trainer.test(made, [WHOLE, WHOLE])
    assert sizes == [8, 4, 12, 12, 12]
