"""Parts of a batch (micro-batches, processes) that cannot make the update of one big batch: told once, else silent."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.step.shares import is_sum_over_rows

X = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
DATA = {"x": X, "m": (torch.arange(16)[:, None] % 3 == 0).float()}


class Readout(nn.Module):
    """A layer, and a loss of its output and the batch."""

    def __init__(self, loss: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.loss = nn.Linear(2, 1), loss

    def forward(self, batch: Any) -> Any:
        return self.loss(self.layer(batch["x"]), batch)


def weights_after(loss: Callable[[Tensor, Any], Any], size: int = 4, accumulate: int = 4, **options: Any) -> Tensor:
    problem = Readout(loss)
    options = {"epochs": 1, "progress": False, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1), **options}
    data = weft.Data(DATA, batch_size=size, shuffle=False)
    weft.Trainer(accumulate=accumulate, **options).fit(problem, data)
    return problem.layer.weight.detach()


SUMS: dict[str, Callable[[Tensor, Any], Any]] = {
    "sum": lambda u, b: u.square().sum(),
    "sum over rows and features, by dims": lambda u, b: u.square().sum(dim=(0, 1)),
    "sum of sums": lambda u, b: u.square().sum() + u.abs().sum(),
    "a mean and a sum": lambda u, b: u.square().mean() + u.abs().sum(),
    "sum by a negative dim": lambda u, b: u[:, 0].sum(-1),
    "mse_loss": lambda u, b: nn.functional.mse_loss(u, 1 + b["x"][:, :1], reduction="sum"),
    "smooth_l1_loss": lambda u, b: nn.functional.smooth_l1_loss(u, b["x"][:, :1], reduction="sum"),
}
MEANS: dict[str, Callable[[Tensor, Any], Any]] = {
    "mean": lambda u, b: u.square().mean(),
    "sum of features, mean of rows": lambda u, b: u.square().sum(1).mean(),
    "sum by number": lambda u, b: u.square().sum() / len(u),
    "mean of rows, sum of features": lambda u, b: (u * b["x"]).square().mean(0).sum(),
    "mse_loss": lambda u, b: nn.functional.mse_loss(u, b["x"][:, :1]),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_over_rows_is_told_where_parts_are_averaged(name: str) -> None:
    with pytest.warns(UserWarning, match="accumulate=4: the loss is a sum over the 4 rows of its part") as told:
        parts = weights_after(SUMS[name])
    assert len(told) == 1
    assert not torch.allclose(parts, weights_after(SUMS[name], 16, 1))  # it is told with reason


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_over_rows_is_exact_and_nothing_is_said(name: str, no_warnings: list[Any]) -> None:
    torch.testing.assert_close(weights_after(MEANS[name]), weights_after(MEANS[name], 16, 1), rtol=1e-5, atol=1e-6)
    assert not no_warnings


def test_a_sum_is_told_nothing_where_there_is_one_part(no_warnings: list[Any]) -> None:
    weights_after(SUMS["sum"], 16, 1)
    assert not no_warnings
    assert not is_sum_over_rows(X.requires_grad_().sum(), 7)  # of other rows than the batch has
    X.requires_grad_(False)


def by_term(u: Tensor, b: Any) -> Any:
    seen = b["m"].sum()
    part = (u * b["m"]).square().sum() / seen
    return {"loss": part + u.abs().mean(), "seen": part, "seen_weight": seen}


def test_a_weight_of_a_term_alone_is_told_under_accumulation() -> None:
    with pytest.warns(UserWarning, match="train_seen count by weights of their own in the history, and the grad"):
        weights_after(by_term)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights_after(by_term, accumulate=1)
        weights_after(lambda u, b: {**by_term(u, b), "num_examples": b["m"].sum()})


def test_two_processes_are_told_too() -> None:
    """A warning of another process is an error here, so that it comes back."""
    options = {"devices": 2, "strategy": "ddp_fork", "timeout": 60, "accelerator": "cpu"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the loss is a sum")
        with pytest.raises(Exception, match="2 processes: the loss is a sum over the 4 rows"):
            weights_after(SUMS["sum"], accumulate=1, **options)


# ---- nested parts


class Unequal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 1)

    def forward(self, batch: Any) -> Tensor:
        return self.layer(batch["i"]["x"]).square().mean() + self.layer(batch["b"]["x"]).abs().mean()


def fit_shares(rows: tuple[int, int], sizes: Any, accumulate: int) -> Tensor:
    problem = Unequal()
    data = {
        name: weft.DictDataset({"x": torch.linspace(0.1, 1, n)[:, None]}) for name, n in zip("ib", rows, strict=True)
    }
    trainer = weft.Trainer(
        epochs=1, progress=False, accumulate=accumulate, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    trainer.fit(problem, weft.Data(copy.deepcopy(data), batch_size=sizes, shuffle=False))
    return problem.layer.weight.detach()


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [((10, 4), {"i": 4, "b": 2}), ((12, 5), {"i": 4, "b": 2}), ((9, 9), {"i": 3, "b": 5}), ((7, 8), {"i": 4, "b": 4})],
)
def test_parts_of_other_shares_are_told_once_under_accumulation(rows: Any, sizes: Any) -> None:
    with pytest.warns(UserWarning, match="the mean over 'b' is weighted by the rows of 'i'") as told:
        fit_shares(rows, sizes, 3)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("rows", "sizes"), [((12, 6), {"i": 4, "b": 2}), ((8, 8), {"i": 4, "b": 4}), ((10, 5), {"i": 4, "b": 2})]
)
def test_parts_of_equal_shares_accumulate_exactly_without_a_word(rows: Any, sizes: Any, no_warnings: list[Any]) -> None:
    torch.testing.assert_close(fit_shares(rows, sizes, 3), fit_shares(rows, None, 1), rtol=1e-5, atol=1e-6)
    assert not no_warnings
