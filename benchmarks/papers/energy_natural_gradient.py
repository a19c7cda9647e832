"""Poisson's equation on a square by energy natural gradients: Mueller and Zeinhofer, ICML 2023 (arXiv:2302.13163)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import weft
from benchmarks.papers.table import show


def exact(x: Tensor) -> Tensor:
    """The solution, sin(pi x) sin(pi y)."""
    return torch.sin(math.pi * x).prod(dim=1, keepdim=True)


class Poisson(nn.Module):
    """-Laplace u = 2 pi^2 sin(pi x) sin(pi y) on the unit square, u = 0 on its boundary; 64 hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))

    def residuals(self, batch: Any) -> dict[str, Tensor]:
        """Of the equation at the inner points, and of the boundary values."""
        x = batch["inside"]["x"]
        u = self.net(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        laplacian = sum(torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
        return {"equation": laplacian + 2 * math.pi**2 * exact(x)[:, 0], "edge": self.net(batch["edge"]["x"])}

    def forward(self, batch: Any) -> Tensor:
        """The mean squares of both."""
        return torch.stack([r.square().mean() for r in self.residuals(batch).values()]).sum()


def grid(n: int, margin: float) -> Tensor:
    """n x n points of the unit square, `margin` from its boundary."""
    line = torch.linspace(margin, 1 - margin, n, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


def measure(seed: int) -> dict[str, float]:
    """The relative error in L2 after 200 steps."""
    torch.manual_seed(seed)
    inside, line = grid(30, 1 / 31), torch.linspace(0, 1, 30, dtype=torch.float64)
    ends = [torch.zeros_like(line), torch.ones_like(line)]
    edge = torch.cat([torch.stack(side, 1) for end in ends for side in ((line, end), (end, line))])
    parts: Any = {"inside": {"x": inside}, "edge": {"x": edge}}
    data = weft.Data(parts, batch_size={"inside": 900, "edge": 120}, shuffle=False, inputs_require_grad=("x",))
    problem = Poisson()
    trainer = weft.Trainer(
        epochs=200, optimizer=weft.optim.NaturalGradient, precision="64-true", progress=False, patience=None
    )
    trainer.fit(problem, data)
    points = grid(100, 0.0)
    with torch.no_grad():
        error = (problem.net(points) - exact(points)).norm() / exact(points).norm()
    return {"relative L2 error": float(error)}


if __name__ == "__main__":
    show(
        "Energy natural gradient, Poisson in two dimensions",
        "2-64-1 tanh, 257 parameters, 900 + 120 points, 200 steps of weft.optim.NaturalGradient, float64.",
        {"relative L2 error": "1e-6 to 1e-8"},
        measure,
    )
