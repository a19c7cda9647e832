"""Every row with every other, (n,) against (n, 1), is refused in objectives and metrics, and told of steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft

N = 16
DATA = {"x": torch.linspace(0, 1, N)[:, None], "y": torch.linspace(0, 1, N).sin(), "z": torch.rand(N, 1)}


def single(fn: Callable[..., Tensor], batch_size: int | None = None, **options: Any) -> weft.FitResult:
    made = weft.Problem([weft.Node(nn.Linear(1, 1), ["x"], ["u"])], [weft.objective(fn, name="m")])
    return weft.Trainer(epochs=1, progress=False, **options).fit(made, weft.Data(DATA, batch_size=batch_size))


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize(
    "fn",
    [
        lambda u, y: (u - y) ** 2,
        lambda y, u: torch.nn.functional.softplus(y - u),
        lambda u, y, z: (u - y) * z,
        lambda u, y: (u * y).abs(),
        lambda x, y, u: (x - y) ** 2 + u,
    ],
)
def test_an_objective_of_every_row_with_every_other_is_refused(fn: Any, batch_size: int | None) -> None:
    with pytest.raises(ValueError, match=r"objective .m. has shape .*every row with every other.*x\[:, None\]"):
        single(fn, batch_size)


def test_it_is_found_after_a_first_batch_of_one_row() -> None:
    made = weft.Problem([weft.Node(nn.Linear(1, 1), ["x"], ["u"])], [weft.objective(lambda u, y: (u - y) ** 2)])
    one, all_of = ({k: v[:n] for k, v in DATA.items()} for n in (1, N))
    with pytest.raises(ValueError, match="every row with every other"):
        weft.Trainer(epochs=1, progress=False).fit(made, [one, all_of])


@pytest.mark.parametrize(
    "fn",
    [
        lambda u, y: (u[:, 0] - y) ** 2,
        lambda u, z: (u - z) ** 2,
        lambda u: torch.cdist(u, u),
        lambda u: u - u.T,
        lambda u, y: ((u[:, 0] - y) ** 2).mean(),
        lambda u, y: u + y[:, None],
    ],
)
def test_other_shapes_train(fn: Any) -> None:
    single(fn)


STEPS: dict[str, tuple[Callable[[nn.Module, dict[str, Tensor]], Tensor], bool]] = {
    "reduced at once": (lambda net, b: ((net(b["x"]) - b["y"]) ** 2).mean(), True),
    "the other way": (lambda net, b: (b["y"] - net(b["x"])).abs().mean(), True),
    "weights": (lambda net, b: (net(b["x"]).square() * b["y"]).mean(), True),
    "target is a column": (lambda net, b: (net(b["x"])[:, 0] - b["z"]).square().mean(), True),
    "equal shapes": (lambda net, b: (net(b["x"])[:, 0] - b["y"]).square().mean(), False),
    "pairs are meant": (lambda net, b: (b["y"][:, None] - b["y"]).mean() + net(b["x"]).mean(), False),
    "as many centers as rows": (lambda net, b: net((b["x"] - torch.ones(N)).mean(1, keepdim=True)).mean(), False),
    "a parameter of as many": (lambda net, b: (net(b["x"]) * nn.Parameter(torch.ones(N))).mean(), False),
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_that_pairs_every_row_with_every_other_is_told_once(kind: str) -> None:
    step, is_told = STEPS[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weft.Trainer(epochs=3, progress=False, training_step=lambda t, b: step(t.problem, b)).fit(nn.Linear(1, 1), DATA)
    told = [str(w.message) for w in caught if "every row with every other" in str(w.message)]
    assert len(told) == is_told
