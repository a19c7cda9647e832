"""A family of quadratic programs solved by a network: DC3, Donti, Rolnick, Kolter, ICLR 2021 (arXiv:2104.12225)."""

from __future__ import annotations

from typing import Any

import numpy as np
import osqp
import scipy.sparse
import torch
from torch import Tensor, nn

import weft
from benchmarks.papers.table import show

VARIABLES, EQUALITIES, INEQUALITIES, EXAMPLES = 100, 50, 50, 10_000
HELD_OUT = 833  # an example in twelve for validation, as many for the test, as in the paper

# y'Qy / 2 + p'y is to be least where Ay = x and Gy <= h; x is what changes. Drawn as in the paper, from its seed.
draw = np.random.RandomState(17)
Q, P = np.diag(draw.random_sample(VARIABLES)), draw.random_sample(VARIABLES)
A = draw.normal(size=(EQUALITIES, VARIABLES))
X = draw.uniform(-1, 1, size=(EXAMPLES, EQUALITIES))
G = draw.normal(size=(INEQUALITIES, VARIABLES))
INVERSE = np.linalg.pinv(A)
H = np.abs(G @ INVERSE).sum(1)


class Program(nn.Module):
    """y = A^+ x + t N z(x): N spans what A sends to zero, so that Ay = x; A^+ x is feasible, t <= 1 ends at a bound.

    The network says z. What it asks for beyond the inequalities is cut back along the line to A^+ x.
    """

    inverse: Tensor
    free: Tensor
    g: Tensor
    h: Tensor
    q: Tensor
    p: Tensor

    def __init__(self) -> None:
        super().__init__()
        free = np.linalg.svd(A)[2][EQUALITIES:].T
        self.constants = {"inverse": INVERSE, "free": free, "g": G, "h": H, "q": np.diag(Q), "p": P}
        for name, value in self.constants.items():
            self.register_buffer(name, torch.as_tensor(value.copy(), dtype=torch.float32))
        layers = [nn.Linear(EQUALITIES, 200), nn.SiLU(), nn.Linear(200, 200), nn.SiLU(), nn.Linear(200, 50)]
        self.net = nn.Sequential(*layers)

    def solution(self, x: Tensor) -> Tensor:
        """A feasible y for each x."""
        start, step = x @ self.inverse.T, self.net(x) @ self.free.T
        room, used = self.h - start @ self.g.T, step @ self.g.T
        allowed = torch.where(used > 0, room / used.clamp(min=1e-12), torch.inf).amin(1, keepdim=True)
        return start + step * allowed.clamp(max=1.0)

    def forward(self, batch: Any) -> Tensor:
        """The mean objective."""
        y = self.solution(batch["x"])
        return (0.5 * self.q * y.square() + self.p * y).sum(1).mean()


def optimum(xs: Any) -> float:
    """The mean objective of OSQP's solutions."""
    both = scipy.sparse.csc_matrix(np.concatenate([A, G]))
    low, high = np.full(INEQUALITIES, -np.inf), H
    solver, found = osqp.OSQP(), []
    solver.setup(
        scipy.sparse.csc_matrix(Q), P, both, np.r_[xs[0], low], np.r_[xs[0], high], verbose=False, polishing=True
    )
    for x in xs:
        solver.update(l=np.r_[x, low], u=np.r_[x, high])
        found.append(solver.solve().info.obj_val)
    return float(np.mean(found))


def measure(seed: int) -> dict[str, float]:
    """Objectives and the largest violations on the test examples."""
    torch.manual_seed(seed)
    x = torch.as_tensor(X, dtype=torch.float32)
    train, dev, test = x[: -2 * HELD_OUT], x[-2 * HELD_OUT : -HELD_OUT], X[-HELD_OUT:]
    problem, epochs = Program(), 150
    trainer = weft.Trainer(
        epochs=epochs,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        patience=None,
        progress=False,
        seed=seed,
    )
    trainer.fit(problem, weft.Data({"x": train}, dev={"x": dev}, batch_size={"train": 200, "dev": HELD_OUT}))
    problem.double()
    for name, value in problem.constants.items():  # with all their digits
        getattr(problem, name).copy_(torch.as_tensor(value.copy()))
    with torch.no_grad():
        y = problem.solution(torch.as_tensor(test)).numpy()
    objective = 0.5 * (y**2 @ np.diag(Q)) + y @ P
    return {
        "objective": float(objective.mean()),
        "largest violation of an equality": float(np.abs(y @ A.T - test).max()),
        "largest violation of an inequality": float(np.maximum(y @ G.T - H, 0).max()),
        "objective by OSQP": optimum(test),
    }


if __name__ == "__main__":
    show(
        "DC3's convex quadratic program",
        "100 variables, 50 equalities, 50 inequalities; two hidden layers of 200, 150 epochs of Adam, batches of 200; "
        "equalities by completion, inequalities by a step that ends at the first bound.",
        {
            "objective": "-13.46",
            "largest violation of an equality": "0",
            "largest violation of an inequality": "0",
            "objective by OSQP": "-15.05",
        },
        measure,
    )
