"""Relative errors of physics-informed networks against CPU seconds: Adam, L-BFGS, and the optimizers of `weft.optim`.

    python -m benchmarks.second_order                       # five seeds, all problems; writes results/
    python -m benchmarks.second_order --problems poisson --seeds 1

Float64, one thread, CPU time of the process (so a shared machine will do); a net of 2-20-20-20-1 with tanh, 921
parameters. What is measured is training alone: errors are evaluated, and graphs made (`compile=True`), while the clock
stands still; what graphs took is said beside. A seed decides the first weights and the points; settings were chosen on
seeds from 100 on.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import datetime
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import weft
from weft.compile.choosing import Chosen
from weft.compile.residuals import ResidualGraphs
from weft.optim.least_squares import Rows

PI = math.pi
VISCOSITY = 0.01 / PI

# ---- problems: residuals of an equation inside, and of values on the boundary ----------------------------------------


class PINN(nn.Module):
    """A network whose equation and boundary values are residuals; the boundary counts `weight` times as much."""

    grad_inference = True
    weight = 100.0

    def __init__(self) -> None:
        super().__init__()
        sizes, layers = [2, 20, 20, 20, 1], []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
            nn.init.xavier_normal_(layers[-2].weight)
            nn.init.zeros_(layers[-2].bias)
        self.net = nn.Sequential(*layers[:-1])

    def equation(self, x: Tensor) -> Tensor:
        """What is zero where the network solves the equation."""
        raise NotImplementedError

    def residuals(self, batch: Any) -> dict[str, Tensor]:
        """Of the equation at the inner points, and at the boundary, scaled so that the boundary has weight 1."""
        inside, edge = batch["inside"], batch["edge"]
        values = (self.net(edge["x"]) - edge["u"])[:, 0]
        return {"equation": self.equation(inside["x"]) / self.weight**0.5, "edge": values}

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The loss: the mean squares of both."""
        return {f"{batch['name']}_loss": torch.stack([r.square().mean() for r in self.residuals(batch).values()]).sum()}


def derivatives(net: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """u, its first and its unmixed second derivatives."""
    u = net(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    second = [torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    return u[:, 0], [first[:, 0], first[:, 1]], second


def waves(x: Tensor, a: int, b: int) -> Tensor:
    """sin(a pi x) sin(b pi y)."""
    return torch.sin(a * PI * x[:, 0]) * torch.sin(b * PI * x[:, 1])


class Poisson(PINN):
    """Laplace u = f on a square, with the solution sin(pi x) sin(pi y)."""

    a, b, k = 1, 1, 0

    def equation(self, x: Tensor) -> Tensor:
        u, _, second = derivatives(self.net, x)
        source = (self.k**2 - (self.a**2 + self.b**2) * PI**2) * waves(x, self.a, self.b)
        return second[0] + second[1] + self.k**2 * u - source

    def exact(self, x: Tensor) -> Tensor:
        """The solution."""
        return waves(x, self.a, self.b)

    def edge(self, n: int) -> Tensor:
        """Points on the boundary."""
        along = 2 * torch.rand(4, n // 4, dtype=torch.float64) - 1
        one = torch.ones(n // 4, dtype=torch.float64)
        sides = [(along[0], one), (along[1], -one), (one, along[2]), (-one, along[3])]
        return torch.cat([torch.stack(side, 1) for side in sides])

    def inside(self, n: int) -> Tensor:
        """Points in the square."""
        return 2 * torch.rand(n, 2, dtype=torch.float64) - 1

    def grid(self) -> Tensor:
        """Where the error is measured."""
        line = torch.linspace(-1, 1, 50, dtype=torch.float64)
        return torch.cartesian_prod(line, line)


class Helmholtz(Poisson):
    """Laplace u + u = f, with the solution sin(pi x) sin(4 pi y)."""

    a, b, k = 1, 4, 1


class Burgers(PINN):
    """u_t + u u_x = nu u_xx from -sin(pi x), nu = 0.01 / pi; the solution by Cole and Hopf's transformation."""

    weight = 1.0

    def equation(self, x: Tensor) -> Tensor:
        u, first, second = derivatives(self.net, x)
        return first[0] + u * first[1] - VISCOSITY * second[1]

    def exact(self, x: Tensor) -> Tensor:
        t, place = x[:, :1].numpy(), x[:, 1:].numpy()
        nodes, weights = np.polynomial.hermite.hermgauss(100)
        eta = place - np.sqrt(4 * VISCOSITY * t) * nodes
        factor = np.exp(-np.cos(PI * eta) / (2 * PI * VISCOSITY)) * weights
        return torch.from_numpy(-(np.sin(PI * eta) * factor).sum(1) / factor.sum(1))

    def edge(self, n: int) -> Tensor:
        place = 2 * torch.rand(n, dtype=torch.float64) - 1
        t = torch.rand(n // 2, dtype=torch.float64)
        side = torch.where(torch.rand(n // 2) < 0.5, -1.0, 1.0).double()
        return torch.cat([torch.stack([0 * place, place], 1), torch.stack([t, side], 1)])

    def inside(self, n: int) -> Tensor:
        """Half of them uniform, half of them dense about x = 0, where the solution is as thin as its viscosity."""
        t, place = torch.rand(n, dtype=torch.float64), 2 * torch.rand(n, dtype=torch.float64) - 1
        return torch.stack([t, torch.where(torch.arange(n) % 2 == 0, place, place**3)], 1)

    def grid(self) -> Tensor:
        times, places = (torch.linspace(*ends, dtype=torch.float64) for ends in ((0.0, 1.0, 41), (-1.0, 1.0, 81)))
        return torch.cartesian_prod(times[1:], places)


PROBLEMS: dict[str, tuple[type[Any], int, int, float]] = {
    "poisson": (Poisson, 1024, 256, 20.0),
    "helmholtz": (Helmholtz, 1024, 256, 10.0),
    "burgers": (Burgers, 4096, 512, 120.0),
}
"""Problem, points inside and on the boundary, CPU seconds."""
MARKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
MANY, WARM = 10**6, 50

# ---- methods: phases -------------------------------------------------------------------------------------------------


def adam(params: Any) -> torch.optim.Optimizer:
    """As today's first phase."""
    return torch.optim.Adam(params, lr=5e-3, fused=True)


def lbfgs(params: Any) -> torch.optim.Optimizer:
    """As today's second phase."""
    return torch.optim.LBFGS(
        params, max_iter=10, history_size=100, line_search_fn="strong_wolfe", tolerance_change=0, tolerance_grad=0
    )


def warm() -> weft.Phase:
    """The first steps are cheapest by what needs no matrix."""
    return weft.Phase(epochs=WARM, optimizer=adam)


METHODS: dict[str, Callable[[], list[weft.Phase]]] = {
    "Adam, then L-BFGS": lambda: [weft.Phase(epochs=1000, optimizer=adam), weft.Phase(epochs=MANY, optimizer=lbfgs)],
    "SSBFGS": lambda: [weft.Phase(epochs=MANY, optimizer=lambda p: weft.optim.SSBFGS(p, max_iter=5))],
    "SSBroyden": lambda: [weft.Phase(epochs=MANY, optimizer=lambda p: weft.optim.SSBroyden(p, max_iter=5))],
    "Adam, then Levenberg-Marquardt": lambda: [
        warm(),
        weft.Phase(epochs=MANY, optimizer=weft.optim.LevenbergMarquardt),
    ],
    "Adam, then natural gradient": lambda: [warm(), weft.Phase(epochs=MANY, optimizer=weft.optim.NaturalGradient)],
}

# ---- measuring -------------------------------------------------------------------------------------------------------


class Clock:
    """CPU seconds of this process, less those in which graphs were made."""

    def __init__(self) -> None:
        self.on_graphs = 0.0

    def __call__(self) -> float:
        return time.process_time() - self.on_graphs

    @contextmanager
    def leaving_out(self, *methods: tuple[type, str]) -> Iterator[None]:
        """Within, what these methods take is not counted."""
        before = [getattr(kind, name) for kind, name in methods]

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **options: Any) -> Any:
                began = self()  # one may call another
                try:
                    return function(*args, **options)
                finally:
                    self.on_graphs += self() - began

            return called

        for (kind, name), function in zip(methods, before, strict=True):
            setattr(kind, name, timed(function))
        try:
            yield
        finally:
            for (kind, name), function in zip(methods, before, strict=True):
                setattr(kind, name, function)


def measure(problem: str, method: str, seed: int, budget: float, compile: bool = True) -> tuple[list[float], float]:
    """The relative L2 error at each mark of the budget (what was reached, where the method ended before); and the
    seconds that graphs took."""
    kind, inner, outer, _ = PROBLEMS[problem]
    torch.manual_seed(seed)
    module = kind()
    edge = module.edge(outer)
    parts: Any = {"inside": {"x": module.inside(inner)}, "edge": {"x": edge, "u": module.exact(edge)[:, None]}}
    data = weft.Data(parts, batch_size={name: len(part["x"]) for name, part in parts.items()}, shuffle=False)
    data = weft.Data(data.train, batch_size=data.batch_size, shuffle=False, inputs_require_grad=("x",))
    grid = module.grid()
    truth = module.exact(grid)
    trainer = weft.Trainer(
        phases=METHODS[method](),
        precision="64-true",
        compile=compile,
        patience=None,
        progress=False,
        monitor_metric="train_loss",
    )
    spent, errors, clock = 0.0, [], Clock()

    def error() -> float:
        with torch.no_grad():
            return float((module.net(grid)[:, 0] - truth).norm() / truth.norm())

    makers = (Chosen, "_choose"), (ResidualGraphs, "_make"), (Rows, "of")
    with clock.leaving_out(*makers), trainer.start(module, data) as run:
        began = clock()
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.update(batch)
            spent += clock() - began
            while len(errors) < len(MARKS) and spent >= MARKS[len(errors)] * budget:
                errors.append(error())
            if spent >= budget or str(run.progress.search_stop).startswith("no lower loss"):
                break
            began = clock()
        errors += [error()] * (len(MARKS) - len(errors))
    return errors, clock.on_graphs


def rows(problem: str, methods: list[str], seeds: range, budget: float, compile: bool) -> list[str]:
    """A table of medians, with the smallest and largest of the seeds."""
    heads = [f"{mark * budget:.3g} s" for mark in MARKS]
    lines = [f"| {problem} | " + " | ".join(heads) + " | graphs |", "|---|" + "---|" * (len(heads) + 1)]
    for method in methods:
        found, graphs = zip(*(measure(problem, method, seed, budget, compile) for seed in seeds), strict=True)
        cells = [f"{statistics.median(e):.1e} ({min(e):.0e} to {max(e):.0e})" for e in zip(*found, strict=True)]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {max(graphs):.0f} s |")
        print(lines[-1], flush=True)
    return lines


def cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "this machine")


def main() -> None:
    """Measure what was asked for and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--methods", default="", help="only those whose name holds one of these texts, by commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=float, help="CPU seconds of each run (default: the problem's)")
    parser.add_argument("--eager", action="store_true", help="without graphs")
    parser.add_argument("--out", type=Path, help="a file for the tables (default: results/second-order-<date>.md)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    methods = [m for m in METHODS if any(part in m for part in given.methods.split(","))]
    lines = [f"{__doc__}\nMedian of {given.seeds} seeds (smallest to largest), on {platform.processor() or cpu()}, "]
    lines += [f"torch {torch.__version__}, Python {platform.python_version()}."]
    for problem in given.problems.split(","):
        seeds = range(given.first_seed, given.first_seed + given.seeds)
        lines += ["", *rows(problem, methods, seeds, given.budget or PROBLEMS[problem][3], not given.eager)]
    path = given.out or Path(__file__).parent / "results" / f"second-order-{datetime.date.today()}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
