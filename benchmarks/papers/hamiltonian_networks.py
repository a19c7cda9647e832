"""A mass on a spring from noisy points: Greydanus, Dzamba, Yosinski, NeurIPS 2019 (arXiv:1906.01563), task 1."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

import weft
from benchmarks.papers.table import show

NOISE = 0.1


def net(outputs: int) -> nn.Sequential:
    """Two hidden layers of 200 with tanh, orthogonal at first, as the paper's."""
    layers = [nn.Linear(2, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, outputs)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*layers)


class Baseline(nn.Module):
    """The derivatives of (q, p) are a network's outputs."""

    grad_inference = True

    def __init__(self) -> None:
        super().__init__()
        self.net = net(2)

    def field(self, x: Tensor) -> Tensor:
        """(dq/dt, dp/dt) at points (n, 2)."""
        return self.net(x)

    def forward(self, batch: Any) -> Tensor:
        """The mean square error of the derivatives."""
        return (self.field(batch["x"]) - batch["dx"]).square().mean()


class Hamiltonian(Baseline):
    """A network is the energy H; dq/dt = dH/dp, dp/dt = -dH/dq."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(1)

    def field(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return torch.stack([slope[:, 1], -slope[:, 0]], dim=1)


def trajectories(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """30 points each over t in [0, 3] of H = q^2 + p^2, radius 0.1 to 1; the positions have noise, derivatives none."""
    radius = 0.1 + 0.9 * torch.rand(count, 1, generator=generator)
    phase = 2 * math.pi * torch.rand(count, 1, generator=generator) - 2 * torch.linspace(0, 3, 30)
    x = (radius[..., None] * torch.stack([phase.cos(), phase.sin()], dim=-1)).reshape(-1, 2)
    dx = 2 * torch.stack([x[:, 1], -x[:, 0]], dim=1)
    return {"x": x + NOISE * torch.randn(x.shape, generator=generator), "dx": dx}


def energy_error(problem: Baseline, generator: torch.Generator) -> float:
    """The mean square error of the energy along 25 trajectories of t in [0, 20] (Runge and Kutta's fourth order)."""
    radius, phase = 0.1 + 0.9 * torch.rand(25, generator=generator), 2 * math.pi * torch.rand(25, generator=generator)
    x, h, errors = radius[:, None] * torch.stack([phase.cos(), phase.sin()], dim=1), 0.05, []
    for _ in itertools.repeat(None, 400):
        k1 = problem.field(x).detach()
        k2 = problem.field(x + h / 2 * k1).detach()
        k3 = problem.field(x + h / 2 * k2).detach()
        k4 = problem.field(x + h * k3).detach()
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        errors.append((x.square().sum(1) - radius**2).square().mean())
    return float(torch.stack(errors).mean())


def measure(seed: int) -> dict[str, float]:
    """Losses and energy errors of both."""
    found = {}
    for name, kind in (("baseline", Baseline), ("HNN", Hamiltonian)):
        generator = torch.Generator().manual_seed(seed)
        train, test = trajectories(25, generator), trajectories(25, generator)
        torch.manual_seed(seed)
        problem = kind()
        trainer = weft.Trainer(
            epochs=2000, progress=False, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=1e-4)
        )
        result = trainer.fit(problem, weft.Data(train, batch_size=750, inputs_require_grad=("x",)))
        found[f"{name}, train loss"] = result.history["train_loss"][-1]
        found[f"{name}, test loss"] = float(problem({key: value for key, value in test.items()}).detach())
        found[f"{name}, energy"] = energy_error(problem, generator)
    return found


if __name__ == "__main__":
    show(
        "Hamiltonian neural networks, mass and spring",
        "Two hidden layers of 200, 25 trajectories of 30 points with noise 0.1, 2000 steps of Adam (1e-3, decay 1e-4).",
        {
            "baseline, train loss": "3.71e-2",
            "HNN, train loss": "3.69e-2",
            "baseline, test loss": "3.67e-2",
            "HNN, test loss": "3.59e-2",
            "baseline, energy": "(other trajectories)",
            "HNN, energy": "(other trajectories)",
        },
        measure,
    )
