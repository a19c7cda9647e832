"""Parametric programs of NeuroMANCER's tutorials, solved by one network for all parameters, against scipy."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn

import weft
from benchmarks.papers.table import show

EPOCHS = 300


@dataclass
class Program:
    """What is least, the functions that must be at most 0, and the ranges of the parameters."""

    objective: Callable[..., Any]
    limits: dict[str, Callable[..., Any]]
    ranges: dict[str, tuple[float, float]]


RING = {
    "order": lambda x, y, p: y - x,
    "inner": lambda x, y, p: (p / 2) ** 2 - x**2 - y**2,
    "outer": lambda x, y, p: x**2 + y**2 - p**2,
}
PROGRAMS = {
    "Rosenbrock": Program(lambda x, y, a: (1 - x) ** 2 + a * (y - x**2) ** 2, RING, {"a": (0.2, 1.2), "p": (0.5, 2.0)}),
    "Himmelblau": Program(lambda x, y: (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2, RING, {"p": (2.0, 6.0)}),
    "quadratic": Program(
        lambda x, y: x**2 + y**2,
        {
            "c1": lambda x, y, p: p - x - y,
            "c2": lambda x, y, p: x + y - p - 5,
            "c3": lambda x, y, q: x - y + q - 5,
            "c4": lambda x, y, q: y - x - q,
        },
        {"p": (1.0, 10.0), "q": (1.0, 10.0)},
    ),
}


def drawn(program: Program, count: int, seed: int) -> dict[str, Tensor]:
    """Columns of parameters, uniform in their ranges."""
    draw = torch.Generator().manual_seed(seed)
    return {name: lo + (hi - lo) * torch.rand(count, 1, generator=draw) for name, (lo, hi) in program.ranges.items()}


def solved(program: Program, parameters: dict[str, Tensor]) -> Any:
    """(rows, 2): the best of what scipy's SLSQP finds from nine starts."""
    found = []
    for row in zip(*(column[:, 0].double().tolist() for column in parameters.values()), strict=True):
        given = dict(zip(parameters, row, strict=True))
        limits = [{"type": "ineq", "fun": lambda z, f=f, g=given: -call(f, z, g)} for f in program.limits.values()]
        tries = [
            scipy.optimize.minimize(
                lambda z, g=given: call(program.objective, z, g), start, method="SLSQP", constraints=limits, tol=1e-12
            )
            for start in itertools.product((-1.0, 1.0, 4.0), repeat=2)
        ]
        good = [t for t in tries if t.success and max(-c["fun"](t.x) for c in limits) < 1e-6]
        found.append(min(good, key=lambda t: t.fun).x)
    return np.array(found)


def call(function: Callable[..., Any], z: Any, given: dict[str, Any]) -> Any:
    """`function` of x, y and those parameters that it names."""
    names = function.__code__.co_varnames[2 : function.__code__.co_argcount]
    return function(z[0], z[1], *(given[name] for name in names))


def measure(seed: int) -> dict[str, float]:
    """How far the network's objective and points are from scipy's, and the largest violation, for each program."""
    figures = {}
    for name, program in PROGRAMS.items():
        torch.manual_seed(seed)
        widths = [len(program.ranges), 80, 80, 80, 80, 2]
        layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.GELU())][:-1]
        solution = weft.Node(nn.Sequential(*layers), list(program.ranges), ["z"], name="solution")
        cut = weft.Node(lambda z: (z[:, :1], z[:, 1:]), ["z"], ["x", "y"], name="cut")
        terms = [weft.less_equal(f, 0.0, weight=100.0, name=key) for key, f in program.limits.items()]
        problem = weft.Problem([solution, cut], [weft.objective(program.objective, name="objective")], terms)
        trainer = weft.Trainer(
            epochs=EPOCHS,
            optimizer=lambda params: torch.optim.Adam(params, lr=2e-3),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
            patience=None,
            progress=False,
            seed=seed,
        )
        trainer.fit(problem, weft.Data(drawn(program, 2000, seed), batch_size=100))
        test = drawn(program, 100, 1000)  # the same for all seeds
        z = torch.as_tensor(trainer.predict(test, keys=["z"])["z"]).double().numpy()
        best, given = solved(program, test), {key: value[:, 0].double().numpy() for key, value in test.items()}
        here, there = (call(program.objective, point.T, given) for point in (z, best))
        worst = max(float(np.max(call(f, z.T, given))) for f in program.limits.values())
        figures[f"{name}: mean objective, from scipy's"] = float(here.mean() - there.mean()) / float(there.mean())
        figures[f"{name}: mean distance to scipy's point"] = float(np.linalg.norm(z - best, axis=1).mean())
        figures[f"{name}: largest violation"] = max(0.0, worst)
    return figures


if __name__ == "__main__":
    keys = ("mean objective, from scipy's", "mean distance to scipy's point", "largest violation")
    show(
        "NeuroMANCER's parametric programs",
        "Four hidden layers of 80, penalties of weight 100, 2,000 parameters in batches of 100, 300 epochs of Adam; "
        "100 other parameters for the test. The tutorials publish no figures: what is to be reached is the solver's.",
        {f"{name}: {key}": "0" for name in PROGRAMS for key in keys},
        measure,
    )
