"""What is trained: each workload is a function that makes a problem and its data.

A problem is called with a batch (a dict of tensors and "name") and returns a dict with f"{name}_loss", which every peer
can train. All weights come from one seed, and no peer shuffles, so that all must end at the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import weft

Tensors = dict[str, Tensor]


@dataclass
class Workload:
    """A problem, its data, and how often to go through it."""

    name: str
    make: Callable[[], nn.Module]
    train: Tensors
    dev: Tensors
    batch_size: int
    epochs: int
    """In one round; the first two are not counted."""
    optimizer: Callable[[Any], torch.optim.Optimizer] = field(
        default=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)
    )
    clip: float = 100.0
    threads: int = 1
    require_grad: tuple[str, ...] = ()
    """Keys of the batch that the problem takes derivatives with respect to."""
    widths: tuple[int, ...] = ()
    """Of its multilayer perceptron, where the matrix products alone are timed too."""
    device: str = "cpu"

    @property
    def steps(self) -> int:
        """Training batches in an epoch."""
        return -(-len(next(iter(self.train.values()))) // self.batch_size)

    def to(self, device: str) -> None:
        """Put the data there; the problem is put there before it is trained."""
        self.device = device
        self.train, self.dev = ({k: v.to(device) for k, v in t.items()} for t in (self.train, self.dev))


def mlp(*widths: int, nonlinear: type[nn.Module] = nn.GELU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nonlinear()]
    return nn.Sequential(*layers[:-1])


def uniform(rows: int, seed: int, **ranges: tuple[float, float]) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {k: lo + (hi - lo) * torch.rand(rows, 1, generator=generator) for k, (lo, hi) in ranges.items()}


ROSENBROCK: dict[str, Any] = {
    "train": uniform(3333, 1, a=(0.2, 1.2), p=(0.5, 2.0)),
    "dev": uniform(333, 2, a=(0.2, 1.2), p=(0.5, 2.0)),
    "batch_size": 64,
    "epochs": 12,
    "widths": (2, 80, 80, 80, 80, 2),
}


def rosenbrock_weft() -> Workload:
    """The parametric constrained Rosenbrock problem as a weft Problem."""

    def make() -> nn.Module:
        net = weft.Node(mlp(2, 80, 80, 80, 80, 2), ["a", "p"], ["x"], name="solution")

        def f(x: Tensor, a: Tensor) -> Tensor:
            return (1 - x[:, [0]]) ** 2 + a * (x[:, [1]] - x[:, [0]] ** 2) ** 2

        def radius2(x: Tensor) -> Tensor:
            return x[:, [0]] ** 2 + x[:, [1]] ** 2

        return weft.Problem(
            [net],
            [weft.objective(f, name="f")],
            [
                weft.greater_equal(lambda x: x[:, [0]], lambda x: x[:, [1]], weight=100.0, name="order"),
                weft.greater_equal(radius2, lambda p: (p / 2) ** 2, weight=100.0, name="inner"),
                weft.less_equal(radius2, lambda p: p**2, weight=100.0, name="outer"),
            ],
        )

    return Workload("Rosenbrock (weft)", make, **ROSENBROCK)


def rosenbrock_neuromancer() -> Workload:
    """The same problem made of NeuroMANCER's own classes."""

    def make() -> nn.Module:
        from neuromancer.constraint import variable
        from neuromancer.loss import PenaltyLoss
        from neuromancer.problem import Problem
        from neuromancer.system import Node

        net = Node(mlp_of_two(mlp(2, 80, 80, 80, 80, 2)), ["a", "p"], ["x"], name="solution")
        x, a, p = variable("x"), variable("a"), variable("p")
        x1, x2 = x[:, [0]], x[:, [1]]
        f = ((1 - x1) ** 2 + a * (x2 - x1**2) ** 2).minimize(weight=1.0, name="f")
        inside = [100.0 * (x1 >= x2), 100.0 * ((p / 2) ** 2 <= x1**2 + x2**2), 100.0 * (x1**2 + x2**2 <= p**2)]
        return Problem([net], PenaltyLoss([f], inside))

    return Workload("Rosenbrock (NeuroMANCER)", make, **ROSENBROCK)


class mlp_of_two(nn.Module):
    """A network of the two inputs side by side, as NeuroMANCER's nodes call it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: Tensor, p: Tensor) -> Tensor:
        return self.net(torch.cat([a, p], dim=-1))


def rosenbrock_sgd() -> Workload:
    """Another optimizer: momentum and coupled weight decay."""
    workload = rosenbrock_weft()
    workload.name = "Rosenbrock (SGD, momentum)"
    workload.optimizer = lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
    return workload


def rollout() -> Workload:
    """A policy that steers a linear plant to the origin, five steps in closed loop."""
    a, b = torch.tensor([[1.0, 0.1], [0.0, 1.0]]), torch.tensor([[0.005], [0.1]])

    def make() -> nn.Module:
        policy = weft.Node(mlp(2, 32, 32, 1), ["x"], ["u"], name="policy")
        plant = weft.Node(lambda x, u: x @ a.T + u @ b.T, ["x", "u"], ["x"], name="plant")
        return weft.Problem(
            [weft.Rollout([policy, plant], steps=5)],
            [
                weft.objective(lambda x: x.square().sum(-1), name="state"),
                weft.objective(lambda u: u.square(), 0.01, "effort"),
            ],
            [weft.less_equal("u", 1.0, name="upper"), weft.greater_equal("u", -1.0, name="lower")],
        )

    def states(rows: int, seed: int) -> Tensors:
        return {"x": 2 * torch.rand(rows, 1, 2, generator=torch.Generator().manual_seed(seed)) - 1}

    return Workload("closed-loop rollout", make, states(2000, 1), states(500, 2), batch_size=100, epochs=12)


def pinn() -> Workload:
    """Burgers' equation by collocation: u_t + u u_x = 0.01/pi u_xx, with second derivatives."""

    def residual(u: Tensor, t: Tensor, x: Tensor) -> Tensor:
        u_t, u_x = torch.autograd.grad(u.sum(), (t, x), create_graph=True)
        u_xx = torch.autograd.grad(u_x.sum(), x, create_graph=True)[0]
        return (u_t + u * u_x - 0.01 / torch.pi * u_xx) ** 2

    def make() -> nn.Module:
        node = weft.Node(mlp(2, 20, 20, 20, 1, nonlinear=nn.Tanh), ["t", "x"], ["u"], name="net")
        return weft.Problem([node], [weft.objective(residual, name="equation")], grad_inference=True)

    points = {"t": (0.0, 1.0), "x": (-1.0, 1.0)}
    return Workload(
        "PINN (Burgers)",
        make,
        uniform(4800, 1, **points),
        uniform(1200, 2, **points),
        batch_size=1200,
        epochs=25,
        require_grad=("t", "x"),
    )


def neural_ode() -> Workload:
    """The right-hand side of an ODE, learned through ten steps of Runge and Kutta."""

    class Integrated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.right = mlp(
                2, 32, 2, nonlinear=nn.Tanh
            )  # not in a closure, which would not be copied with the problem

        def forward(self, x: Tensor) -> Tensor:
            path, h = [], 0.1
            for _ in range(10):
                k1 = self.right(x)
                k2 = self.right(x + h / 2 * k1)
                k3 = self.right(x + h / 2 * k2)
                k4 = self.right(x + h * k3)
                x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
                path.append(x)
            return torch.stack(path, 1)

    def make() -> nn.Module:
        node = weft.Node(Integrated(), ["x"], ["path"], name="ode")
        return weft.Problem([node], [weft.objective(lambda path, y: (path - y) ** 2, name="fit")])

    def paths(rows: int, seed: int) -> Tensors:
        x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed))
        angle = 0.1 * torch.arange(1, 11)[None, :, None]
        turned = x[:, None, :] * angle.cos() + x[:, None, :].flip(-1) * angle.sin() * torch.tensor([1.0, -1.0])
        return {"x": x, "y": turned}

    return Workload("neural ODE", make, paths(640, 1), paths(64, 2), batch_size=64, epochs=12)


def one_batch() -> Workload:
    """One small batch an epoch: what an epoch costs."""
    workload = rosenbrock_weft()
    workload.name, workload.epochs = "one batch an epoch", 300
    workload.train = {k: v[:64] for k, v in workload.train.items()}
    workload.dev = {k: v[:64] for k, v in workload.dev.items()}
    return workload


def wide() -> Workload:
    """A wide network and large batches on all cores: time goes into arithmetic."""

    def make() -> nn.Module:
        node = weft.Node(mlp(16, 1024, 1024, 1024, 16), ["x"], ["y"], name="net")
        return weft.Problem([node], [weft.objective(lambda y, x: (y - x.sin()) ** 2, name="fit")])

    def points(rows: int, seed: int) -> Tensors:
        return {"x": torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))}

    return Workload(
        "wide MLP",
        make,
        points(2048, 1),
        points(512, 2),
        batch_size=512,
        epochs=9,
        threads=2,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
    )


WORKLOADS = (
    rosenbrock_weft,
    rosenbrock_neuromancer,
    rosenbrock_sgd,
    rollout,
    pinn,
    neural_ode,
    one_batch,
    wide,
)
