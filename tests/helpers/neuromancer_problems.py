"""NeuroMANCER's tutorial formulations on small sizes, made of its own classes: what its own users train.

A `Formulation` makes the same problem and the same data each time it is asked; nothing in it knows of weft.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from neuromancer.callbacks import Callback
    from neuromancer.constraint import variable
    from neuromancer.dataset import DictDataset
    from neuromancer.dynamics import integrators, ode
    from neuromancer.loggers import BasicLogger, LossLogger
    from neuromancer.loss import AugmentedLagrangeLoss, BarrierLoss, PenaltyLoss
    from neuromancer.modules import blocks
    from neuromancer.modules.solvers import GradientProjection
    from neuromancer.problem import Problem
    from neuromancer.system import Node, System
    from neuromancer.trainer import LitTrainer as NeuromancerLitTrainer
    from neuromancer.trainer import Trainer as NeuromancerTrainer
    from neuromancer.utils import load_state_dict_lightning

__all__ = [
    "FORMULATIONS",
    "BasicLogger",
    "Callback",
    "Formulation",
    "LossLogger",
    "NeuromancerLitTrainer",
    "NeuromancerTrainer",
    "augmented_rosenbrock",
    "load_state_dict_lightning",
    "neuromancer_loader",
    "rosenbrock",
    "rosenbrock_rows",
    "sine_rows",
    "splits",
    "stacked",
]

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Formulation:
    """A problem, its tensors by split, and how the tutorial trains it."""

    name: str
    problem: Callable[[], nn.Module]
    data: Callable[[], dict[str, Tensors]]
    batch_size: int = 16
    lr: float = 1e-3
    trained: Callable[[Any], Any] = lambda problem: problem.parameters()
    """The parameters that the tutorial gives its optimizer."""
    deep_copies: bool = True
    """Whether NeuroMANCER's Trainer can copy the state dict at all."""

    def make(self) -> Any:
        """The problem with the same first weights each time."""
        torch.manual_seed(0)
        return self.problem()

    def loaders(self, shuffle: bool = False) -> list[DataLoader]:
        """NeuroMANCER's loaders of the splits there are, in the order train, dev, test."""
        torch.manual_seed(1)
        return [neuromancer_loader(tensors, name, self.batch_size, shuffle) for name, tensors in self.data().items()]

    def datasets(self) -> list[DictDataset | None]:
        """NeuroMANCER's datasets: train, dev, test; None for one that is missing."""
        torch.manual_seed(1)
        data = self.data()
        return [DictDataset(data[name], name=name) if name in data else None for name in ("train", "dev", "test")]

    def optimizer(self, problem: nn.Module) -> torch.optim.Optimizer:
        """What the tutorial trains with."""
        return torch.optim.AdamW(list(self.trained(problem)), lr=self.lr)


def neuromancer_loader(tensors: Tensors, name: str, batch_size: int, shuffle: bool = False) -> DataLoader:
    """A DataLoader over NeuroMANCER's DictDataset, as its tutorials make it."""
    dataset = DictDataset(tensors, name=name)
    return DataLoader(dataset, batch_size=batch_size, collate_fn=dataset.collate_fn, shuffle=shuffle)


def mlp(inputs: int, outputs: int, width: int = 8, layers: int = 2, nonlin: Any = nn.GELU) -> Any:
    """NeuroMANCER's MLP."""
    return blocks.MLP(inputs, outputs, nonlin=nonlin, hsizes=[width] * layers)


def splits(make: Callable[[int], Tensors], train: int = 40, dev: int = 16) -> dict[str, Tensors]:
    """A training and a dev set from one function of the number of rows."""
    return {"train": make(train), "dev": make(dev)}


def named(constraint: Any, name: str) -> Any:
    """The constraint under a name (NeuroMANCER's own holds a memory address)."""
    constraint.name = name
    return constraint


# -------------------------------------------------------------------------------------------- parametric programming


def rosenbrock_terms() -> tuple[list[Any], list[Any]]:
    x1, x2 = variable("x")[:, [0]], variable("x")[:, [1]]
    a, p = variable("a"), variable("p")
    objective = ((1 - x1) ** 2 + a * (x2 - x1**2) ** 2).minimize(weight=1.0, name="f")
    constraints = [
        named(100.0 * (x1 >= x2), "order"),
        named(100.0 * ((p / 2) ** 2 <= x1**2 + x2**2), "inner"),
        named(100.0 * (x1**2 + x2**2 <= p**2), "outer"),
    ]
    return [objective], constraints


class Concatenated(nn.Module):
    """A network of several inputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(torch.cat(inputs, dim=-1))


def rosenbrock(width: int = 8, layers: int = 2, loss: Any = PenaltyLoss) -> Any:
    net = Node(Concatenated(mlp(2, 2, width, layers, nn.ReLU)), ["a", "p"], ["x"], name="map")
    return Problem([net], loss(*rosenbrock_terms()))


def rosenbrock_rows(rows: int) -> Tensors:
    return {"a": 0.2 + torch.rand(rows, 1), "p": 0.5 + 5.0 * torch.rand(rows, 1)}


def pqp() -> Any:
    net = Node(Concatenated(mlp(2, 2, nonlin=nn.ReLU)), ["p1", "p2"], ["x"], name="map")
    x, y = variable("x")[:, [0]], variable("x")[:, [1]]
    p1, p2 = variable("p1"), variable("p2")
    objective = (x**2 + y**2).minimize(weight=1.0, name="f")
    constraints = [named(50.0 * (x + y - p1 >= 0), "c1"), named(50.0 * (-2 * x + y + p2 <= 5), "c2")]
    return Problem([net], PenaltyLoss([objective], constraints))


def projected() -> Any:
    net = Node(Concatenated(mlp(2, 2, nonlin=nn.ReLU)), ["a", "p"], ["x"], name="map")
    objectives, constraints = rosenbrock_terms()
    projection = GradientProjection(
        constraints, input_keys=["x"], output_keys=["x"], num_steps=2, step_size=0.05, name="proj"
    )
    return Problem([net, projection], PenaltyLoss(objectives, constraints), grad_inference=True)


def cvxpy_layer() -> Any:
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    z, target = cp.Variable(2), cp.Parameter(2)
    program = cp.Problem(cp.Minimize(cp.sum_squares(z - target)), [cp.sum(z) <= 1.0, z >= -1.0])
    layer = CvxpyLayer(program, parameters=[target], variables=[z])

    class Project(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0].to(x.dtype)

    net = Node(Concatenated(mlp(2, 2)), ["a", "p"], ["x"], name="map")
    x, p = variable("z"), variable("p")
    objective = ((x - p) ** 2).minimize(weight=1.0, name="f")
    return Problem([net, Node(Project(), ["x"], ["z"], name="project")], PenaltyLoss([objective], []))


# ------------------------------------------------------------------------------------------------------------- ODEs


def rollout_rows(nx: int, nsteps: int = 4, dt: float = 0.1, decay: float = 0.3) -> Callable[[int], Tensors]:
    """Trajectories of a damped rotation: X (batch, time, nx), its first entry as xn, and a known input U."""

    def rows(n: int) -> Tensors:
        x = torch.rand(n, nx) * 2 - 1
        u = torch.rand(n, nsteps, 1)
        turn = torch.roll(torch.eye(nx), 1, 0)
        turn[0] *= -1
        states = [x]
        for t in range(nsteps - 1):
            x = x + dt * (x @ turn.T - decay * x + 0.5 * u[:, t])
            states.append(x)
        X = torch.stack(states, dim=1)
        return {"X": X, "xn": X[:, :1], "U": u}

    return rows


def tracking_loss(key: str = "xn", data: str = "X") -> PenaltyLoss:
    x, truth = variable(data), variable(key)
    fit = (10.0 * (x == truth[:, :-1, :])) ^ 2
    step = (1.0 * (x[:, 1:, :] - x[:, :-1, :] == truth[:, 1:-1, :] - truth[:, :-2, :])) ^ 2
    return PenaltyLoss([], [named(fit, "trajectory"), named(step, "finite_difference")])


def neural_ode() -> Any:
    dynamics = integrators.RK4(mlp(2, 2), h=torch.tensor(0.1))
    return Problem([System([Node(dynamics, ["xn"], ["xn"], name="ode")])], tracking_loss())


def parameter_estimation() -> Any:
    dynamics = integrators.RK4(ode.LotkaVolterraParam(), h=torch.tensor(0.1))
    return Problem([System([Node(dynamics, ["xn"], ["xn"], name="ode")])], tracking_loss())


def universal_ode() -> Any:
    dynamics = integrators.RK4(ode.BrusselatorHybrid(mlp(2, 1)), h=torch.tensor(0.05))
    return Problem([System([Node(dynamics, ["xn"], ["xn"], name="ude")])], tracking_loss())


def state_space_model() -> Any:
    model = ode.SSM(mlp(2, 2), mlp(1, 2), nx=2, nu=1)
    return Problem([System([Node(model, ["xn", "U"], ["xn"], name="ssm")])], tracking_loss())


def koopman() -> Any:
    encoder, decoder = mlp(2, 4), mlp(4, 2)
    operator = nn.Linear(4, 4, bias=False)
    lift = Node(encoder, ["xn"], ["z"], name="encoder")
    rollout = System([Node(operator, ["z"], ["z"], name="K")], name="koopman", nsteps=4)
    back = Node(decoder, ["z"], ["y"], name="decoder")
    z, y, truth = variable("z"), variable("y"), variable("X")
    terms = [
        named((10.0 * (y[:, :-1, :] == truth)) ^ 2, "prediction"),
        named((1.0 * (y[:, [0], :] == truth[:, [0], :])) ^ 2, "reconstruction"),
        named((0.01 * (z[:, 1:, :] == z[:, :-1, :])) ^ 2, "latent"),
    ]
    return Problem([lift, rollout, back], PenaltyLoss([], terms))


# ------------------------------------------------------------------------------------------------------------- PDEs


def collocation_rows(rows: int) -> Tensors:
    xt = torch.rand(rows, 2)
    x, t = (2 * xt[:, :1] - 1).requires_grad_(), xt[:, 1:].clone().requires_grad_()
    return {"x": x, "t": t}


def pinn(residual: Callable[[Any, Any, Any], Any], constants: Callable[[], list[Any]] = list) -> Any:
    net = Node(Concatenated(mlp(2, 1, nonlin=nn.Tanh)), ["x", "t"], ["y"], name="net")
    x, t, y = variable("x"), variable("t"), variable("y")
    start = (10.0 * (torch.exp(-9.0 * t) * (y + torch.sin(torch.pi * x)) == 0.0 * x)) ^ 2
    inside = (1.0 * (residual(y, x, t) == 0.0 * x)) ^ 2
    loss = PenaltyLoss([], [named(inside, "residual"), named(start, "start")])
    return Problem([net, *constants()], loss, grad_inference=True)


def diffusion() -> Any:
    return pinn(lambda y, x, t: y.grad(t) - y.grad(x).grad(x) - torch.exp(-t) * torch.sin(torch.pi * x))


def burgers() -> Any:
    return pinn(lambda y, x, t: y.grad(t) + y * y.grad(x) - (0.01 / torch.pi) * y.grad(x).grad(x))


class Constant(nn.Module):
    """An unknown number of an inverse problem, one entry for each row."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.value * torch.ones_like(x)


def inverse_burgers() -> Any:
    nu = variable("nu")
    return pinn(
        lambda y, x, t: y.grad(t) + y * y.grad(x) - nu * y.grad(x).grad(x),
        lambda: [Node(Constant(0.05), ["x"], ["nu"], name="viscosity")],
    )


# ---------------------------------------------------------------------------------------------------------- control


def double_integrator() -> Any:
    A, B = torch.tensor([[1.0, 0.1], [0.0, 1.0]]), torch.tensor([[0.005], [0.1]])
    policy = Node(mlp(2, 1), ["X"], ["U"], name="policy")
    plant = Node(lambda x, u: x @ A.T + u @ B.T, ["X", "U"], ["X"], name="plant")
    x, u = variable("X"), variable("U")
    objectives = [((x == 0.0) ^ 2), ((u == 0.0) ^ 2)]
    limits = [named(10.0 * (u <= 1.0), "u_max"), named(10.0 * (u >= -1.0), "u_min")]
    terms = [named(5.0 * objectives[0], "regulation"), named(0.1 * objectives[1], "effort"), *limits]
    return Problem([System([policy, plant], nsteps=4)], PenaltyLoss([], terms))


def van_der_pol() -> Any:
    system = ode.VanDerPolControl()
    system.mu = nn.Parameter(torch.tensor([1.0]), requires_grad=False)
    plant = Node(integrators.RK4(system, h=torch.tensor(0.1)), ["X", "U"], ["X"], name="plant")
    policy = Node(
        blocks.MLP_bounds(2, 1, nonlin=nn.GELU, hsizes=[8, 8], min=-2.0, max=2.0), ["X"], ["U"], name="policy"
    )
    x, u = variable("X"), variable("U")
    terms = [named(10.0 * ((x[:, -1:, :] == 0.0) ^ 2), "terminal"), named(0.1 * ((u == 0.0) ^ 2), "effort")]
    return Problem([System([policy, plant], nsteps=4)], PenaltyLoss([], terms))


def two_tank_tracking() -> Any:
    """The plant's parameters get gradients that the optimizer, made of the policy's, never uses."""
    plant = Node(integrators.RK4(ode.TwoTankParam(), h=torch.tensor(1.0)), ["x", "u"], ["x"], name="plant")
    net = Concatenated(blocks.MLP_bounds(4, 2, nonlin=nn.GELU, hsizes=[8, 8], min=0.0, max=1.0))
    policy = Node(net, ["x", "r"], ["u"], name="policy")
    x, r = variable("x"), variable("r")
    terms = [named(5.0 * ((x[:, :-1, :] == r) ^ 2), "tracking"), named(10.0 * (x <= 1.0), "x_max")]
    return Problem([System([policy, plant], nsteps=4, nstep_key="r")], PenaltyLoss([], terms))


def two_tank_rows(rows: int) -> Tensors:
    return {"x": 0.1 + 0.8 * torch.rand(rows, 1, 2), "r": torch.rand(rows, 1, 1).expand(rows, 4, 2).clone()}


def lyapunov() -> Any:
    g = blocks.InputConvexNN(2, 1, linear_map=nn.Linear, nonlin=nn.ReLU, hsizes=[8, 8], bias=True)
    value = blocks.PosDef(g, eps=0.1, d=1.0)
    V_now, V_next = Node(value, ["x"], ["V"], name="V"), Node(value, ["x_next"], ["V_next"], name="V_next")
    decrease = named(10.0 * (variable("V_next") <= 0.99 * variable("V")), "decrease")
    size = (variable("V") ** 2).minimize(weight=0.01, name="size")
    return Problem([V_now, V_next], PenaltyLoss([size], [decrease]))


def lyapunov_rows(rows: int) -> Tensors:
    x = torch.rand(rows, 2) * 4 - 2
    return {"x": x, "x_next": x @ torch.tensor([[0.9, 0.3], [-0.3, 0.9]])}


def policy_of(problem: Any) -> Any:
    return problem.nodes[0].nodes[0].parameters()


FORMULATIONS = {
    f.name: f
    for f in (
        Formulation("pNLP", rosenbrock, lambda: splits(rosenbrock_rows)),
        Formulation("barrier", lambda: rosenbrock(loss=BarrierLoss), lambda: splits(rosenbrock_rows)),
        Formulation("pQP", pqp, lambda: splits(lambda n: {"p1": torch.rand(n, 1) * 10, "p2": torch.rand(n, 1) * 10})),
        Formulation("projected gradient", projected, lambda: splits(rosenbrock_rows)),
        Formulation("cvxpy layer", cvxpy_layer, lambda: splits(rosenbrock_rows, 8, 4), deep_copies=False),
        Formulation("NODE", neural_ode, lambda: splits(rollout_rows(2))),
        Formulation("parameter estimation", parameter_estimation, lambda: splits(rollout_rows(2)), lr=0.05),
        Formulation("UDE", universal_ode, lambda: splits(rollout_rows(2)), lr=0.01),
        Formulation("NSSM", state_space_model, lambda: splits(rollout_rows(2))),
        Formulation("deep Koopman", koopman, lambda: splits(rollout_rows(2))),
        Formulation("diffusion PINN", diffusion, lambda: {"train": collocation_rows(40)}, batch_size=40, lr=3e-3),
        Formulation("Burgers PINN", burgers, lambda: splits(collocation_rows), lr=3e-3),
        Formulation("inverse Burgers", inverse_burgers, lambda: {"train": collocation_rows(40)}, lr=3e-3),
        Formulation("linear system", double_integrator, lambda: splits(lambda n: {"X": 3 * torch.randn(n, 1, 2)})),
        Formulation("control of an ODE", van_der_pol, lambda: splits(lambda n: {"X": torch.randn(n, 1, 2)})),
        Formulation("reference tracking", two_tank_tracking, lambda: splits(two_tank_rows), trained=policy_of),
        Formulation("neural Lyapunov", lyapunov, lambda: splits(lyapunov_rows)),
    )
}


def stacked() -> Any:
    """A regression with NeuroMANCER's multi-fidelity network, whose nodes have alpha losses."""
    net = blocks.StackedMLP(
        1, 1, nonlin=nn.Tanh, h_sf_size=[4], n_stacked_mf_layers=2, h_linear_sizes=[4], h_nonlinear_sizes=[4]
    )
    fit = named((variable("y") == variable("target")) ^ 2, "fit")
    return Problem([Node(net, ["x"], ["y"], name="stacked")], PenaltyLoss([], [fit]))


def sine_rows(rows: int) -> Tensors:
    x = torch.rand(rows, 1)
    return {"x": x, "target": torch.sin(6 * x)}


def augmented_rosenbrock(train: DataLoader) -> Any:
    """The Rosenbrock problem with NeuroMANCER's augmented Lagrangian, which reads "index" and "epoch" in each batch."""
    net = Node(Concatenated(mlp(2, 2, nonlin=nn.ReLU)), ["a", "p"], ["x"], name="map")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it copies a tensor in a way that torch advises against
        loss = AugmentedLagrangeLoss(*rosenbrock_terms(), train_data=train, inner_loop=2)
    return Problem([net], loss)
