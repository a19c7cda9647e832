"""Toy problems that several rooms train, with their data: one name, one thing.

    problem                         data                                what it has
    plant_and_policy                tanh_points                         named parts, two objectives
    small_rosenbrock                parameter_rows                      a constraint with a parameter
    byhand.Regression               byhand.tensors, byhand.slices       the loop by hand to compare with
    resuming.make_problem           resuming.make_data, .rows           all that a resumed run must not forget
    killing.plain_problem           killing.plain_data                  nothing that keeps it from being compiled
    shards.Fit                      points                              float64, layers that can be sharded
    job.LineWithDropout             job.setup                           a script's: random numbers in each process
    lightning_tools.LineModule      lightning_tools.loaders             a LightningModule
    neuromancer_problems            Formulation.loaders                 NeuroMANCER's own, one for each tutorial

What only one file trains stands there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import weft


def plant_and_policy(seed: int = 0) -> weft.Problem:
    """Two named nodes with two objectives: parts that can be frozen, averaged, loaded."""
    torch.manual_seed(seed)
    nodes = [
        weft.Node(nn.Sequential(nn.Linear(2, 4), nn.Tanh()), ["x"], ["h"], name="plant"),
        weft.Node(nn.Linear(4, 1), ["h"], ["out"], name="policy"),
    ]
    terms = [
        weft.objective(lambda out, y: (out - y) ** 2, name="fit"),
        weft.objective(lambda h: h**2, 0.1, name="size"),
    ]
    return weft.Problem(nodes, terms)


def tanh_points(rows: int = 16, seed: int = 1) -> dict[str, Tensor]:
    """Inputs of two columns, and the tanh of their sum."""
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": x.sum(-1, keepdim=True).tanh()}


def small_rosenbrock() -> weft.Problem:
    """Rosenbrock's function with a parameter, outside of a circle whose radius is another."""
    torch.manual_seed(0)
    net = weft.Node(tanh_net(2, 2), ["a", "p"], ["x"], name="net")
    f = weft.objective(lambda x, a: (1 - x[:, :1]) ** 2 + a * (x[:, 1:] - x[:, :1] ** 2) ** 2, name="f")
    outer = weft.less_equal(lambda x: x.square().sum(1, keepdim=True), lambda p: p**2, weight=10.0, name="outer")
    return weft.Problem([net], [f], [outer])


def tanh_net(inputs: int, outputs: int, hidden: int = 8, *extra: nn.Module) -> nn.Sequential:
    """One hidden layer, with what else is to follow it."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), *extra, nn.Linear(hidden, outputs))


def parameter_rows(n: int, seed: int = 1) -> weft.DictDataset:
    """Parameters of `small_rosenbrock`."""
    generator = torch.Generator().manual_seed(seed)
    return weft.DictDataset(
        {"a": torch.rand(n, 1, generator=generator), "p": 0.5 + torch.rand(n, 1, generator=generator)}
    )


def points(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Points of a square in float64."""
    return {"x": torch.rand(rows, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1}


def batch_of_rows(n: int, **tensors: Tensor) -> dict[str, Any]:
    """A batch as a trainer hands it to a problem: with its name, its epoch and the numbers of its rows."""
    return {**tensors, "name": "train", "epoch": 0, "index": torch.arange(n)}


def adam(params: Any) -> torch.optim.Optimizer:
    """What problems in shards and in phases are trained with."""
    return torch.optim.Adam(params, lr=1e-2)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
