"""The demo: learn the solution map of a constrained optimization problem, and compare it with the true optimum.

For each parameter (a, p), the constrained Rosenbrock problem in x = (x0, x1) is

    minimise    (1 - x0)^2 + a (x1 - x0^2)^2
    subject to  x0 >= x1,    (p/2)^2 <= x0^2 + x1^2 <= p^2

A network 2 -> 80x4 -> 2 learns x(a, p) from objective and penalties alone, without ever seeing an optimum
(the formulation of NeuroMANCER's first tutorial on parametric programming).
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import weft

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANGES = {"a": (0.2, 1.2), "p": (0.5, 2.0)}


def rosenbrock(x: Tensor, a: Tensor) -> Tensor:
    """The objective, (batch, 1)."""
    return (1 - x[:, [0]]) ** 2 + a * (x[:, [1]] - x[:, [0]] ** 2) ** 2


def radius2(x: Tensor) -> Tensor:
    """The squared distance from the origin, (batch, 1)."""
    return (x**2).sum(dim=1, keepdim=True)


def make_problem() -> weft.Problem:
    """The problem with an untrained network."""
    sizes = [2, 80, 80, 80, 80]
    hidden = [m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
    net = weft.Node(nn.Sequential(*hidden, nn.Linear(80, 2)), ["a", "p"], ["x"], name="solution")
    return weft.Problem(
        [net],
        objectives=[weft.objective(rosenbrock, name="f")],
        constraints=[
            weft.greater_equal(lambda x: x[:, [0]], lambda x: x[:, [1]], weight=100.0, name="order"),
            weft.greater_equal(radius2, lambda p: (p / 2) ** 2, weight=100.0, name="inner"),
            weft.less_equal(radius2, lambda p: p**2, weight=100.0, name="outer"),
        ],
        name="rosenbrock",
    )


def data_setup(nsim: int = 5000, batch_size: int = 64, seed: int = 408) -> weft.Data:
    """`nsim` random parameters, a third each for training, early stopping and the final comparison."""
    generator = torch.Generator().manual_seed(seed)

    def sample(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(nsim, 1, generator=generator)

    columns = {key: sample(*limits).chunk(3) for key, limits in RANGES.items()}
    train, dev, test = (weft.DictDataset({key: parts[i] for key, parts in columns.items()}) for i in range(3))
    return weft.Data(train, dev, test, batch_size=batch_size)


def true_optimum(a: float, p: float) -> np.ndarray:
    """The optimum for one parameter by scipy's SLSQP, the best of several starts, shape (2,)."""
    from scipy.optimize import minimize

    constraints = [
        {"type": "ineq", "fun": lambda x: x[0] - x[1]},
        {"type": "ineq", "fun": lambda x: x @ x - (p / 2) ** 2},
        {"type": "ineq", "fun": lambda x: p**2 - x @ x},
    ]

    def objective(x: np.ndarray) -> float:
        return (1 - x[0]) ** 2 + a * (x[1] - x[0] ** 2) ** 2

    found = [
        minimize(objective, p * np.array([np.cos(t), np.sin(t)]) * 0.75, constraints=constraints, method="SLSQP")
        for t in (0.0, 0.6, -0.6)
    ]
    feasible = [f for f in found if f.success and min(c["fun"](f.x) for c in constraints) > -1e-6]
    return min(feasible, key=lambda f: f.fun).x


def compare(trainer: weft.Trainer, num_points: int = 200) -> dict[str, np.ndarray]:
    """Predicted and true solutions at held-out parameters: arrays of shape (num_points,), solutions (num_points, 2)."""
    test = trainer.run.data.test.datadict  # type: ignore[union-attr]
    a, p = (test[key][:num_points] for key in ("a", "p"))
    x = trainer.predict({"a": a, "p": p})["x"]
    best = torch.tensor(np.array([true_optimum(*point) for point in torch.cat([a, p], 1).double().tolist()]))
    return {
        "a": a[:, 0].numpy(),
        "p": p[:, 0].numpy(),
        "x": x.numpy(),
        "x_true": best.numpy(),
        "f": rosenbrock(x, a)[:, 0].numpy(),
        "f_true": rosenbrock(best, a.double())[:, 0].numpy(),
        "violation": violation(x, p).numpy(),
        "violation_true": violation(best, p.double()).numpy(),
    }


def violation(x: Tensor, p: Tensor) -> Tensor:
    """The largest violation of the three constraints at each point, (batch,); 0 where all hold."""
    r2 = radius2(x)
    values = torch.cat([x[:, [1]] - x[:, [0]], (p / 2) ** 2 - r2, r2 - p**2], dim=1)
    return values.amax(dim=1).clamp(min=0)


def main(epochs: int = 400, root_dir: str = "runs", progress: Any = "auto", **setup: Any) -> dict[str, np.ndarray]:
    """Train, print the table, write `runs/demo/`. Returns what `compare` found."""
    torch.manual_seed(0)
    problem = make_problem()
    print(problem.describe(), "\n")
    trainer = weft.Trainer(
        epochs=epochs,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        seed=0,
        root_dir=root_dir,
        run_name="demo",
        loggers="tensorboard",
        progress=progress,
    )
    result = trainer.fit(problem, data_setup, **setup)
    print(result)
    began = time.perf_counter()
    found = compare(trainer)
    print(f"scipy solved {len(found['f'])} problems in {time.perf_counter() - began:.1f} s\n")
    _print_table(found)
    folder = Path(root_dir) / "demo"
    weft.plot.save_summary(result, folder / "curves.png")
    _solution_maps(trainer, folder / "solutions.png")
    trainer.save_weights(folder / "weights.pt")
    print(f"\nWritten to {folder}/: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    return found


def _print_table(found: dict[str, np.ndarray]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(found['f'])} held-out parameters")
    for column in ("", "network", "true optimum (scipy)"):
        table.add_column(column, justify="left" if not column else "right")
    for name, key, measure in (
        ("objective, mean", "f", np.mean),
        ("violation, mean", "violation", np.mean),
        ("violation, largest", "violation", np.max),
    ):
        table.add_row(name, f"{measure(found[key]):.5f}", f"{measure(found[key + '_true']):.5f}")
    distance = np.linalg.norm(found["x"] - found["x_true"], axis=1)
    table.add_row("distance to the optimum, mean", f"{distance.mean():.5f}", "")
    for i in range(4):
        x, y = found["x"][i], found["x_true"][i]
        name = f"x at a={found['a'][i]:.2f}, p={found['p'][i]:.2f}"
        table.add_row(name, f"({x[0]:.3f}, {x[1]:.3f})", f"({y[0]:.3f}, {y[1]:.3f})")
    Console(width=None if sys.stdout.isatty() else 90).print(table)


def _solution_maps(trainer: weft.Trainer, path: Path) -> None:
    """Objective, feasible set, and both solutions for four parameters, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    for ax, (a, p) in zip(figure.subplots(2, 2).flat, [(0.2, 0.8), (1.2, 0.8), (0.2, 1.6), (1.2, 1.6)], strict=True):
        _solution_map(trainer, ax, a, p)
    figure.savefig(path, dpi=110)


def _solution_map(trainer: weft.Trainer, ax: Axes, a: float, p: float) -> None:
    weft.plot.solution_map(
        lambda x, y: (1 - x) ** 2 + a * (y - x**2) ** 2 + 1e-3,
        (-0.5, 2.0),
        (-1.2, 1.5),
        ax,
        log=True,
        labels=("$x_0$", "$x_1$", "objective"),
    )
    x, y = np.meshgrid(np.linspace(-0.5, 2.0, 301), np.linspace(-1.2, 1.5, 301))
    infeasible = (y > x) | (x**2 + y**2 < (p / 2) ** 2) | (x**2 + y**2 > p**2)
    ax.contourf(x, y, infeasible.astype(float), levels=[0.5, 1.5], colors="white", alpha=0.55)
    ax.contour(x, y, infeasible.astype(float), levels=[0.5], colors="0.3", linewidths=0.8)
    best = true_optimum(a, p)
    learned = trainer.predict({"a": torch.tensor([[a]]), "p": torch.tensor([[p]])})["x"][0]
    ax.plot(*best, "o", markersize=13, markerfacecolor="none", markeredgecolor="red", label="optimum (scipy)")
    ax.plot(*learned, "x", markersize=9, color="black", markeredgewidth=2, label="network")
    ax.set_title(f"a = {a}, p = {p} (pale: infeasible)")
    ax.set_aspect("equal")
    ax.legend(loc="upper right", fontsize="small")


if __name__ == "__main__":
    torch.set_num_threads(1)  # for a network this small, threads cost more than they bring
    main()
