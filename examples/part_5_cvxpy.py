# %% [markdown]
# # Part 5: an optimization layer from cvxpylayers
#
# Some constraints must hold exactly, not on average. Here the last layer of the network is itself an optimization
# problem: the projection onto a polytope. cvxpylayers differentiates through it, so it trains like any other layer.
#
# The task: for every $p$ find $\min_x \|x - c(p)\|_4$ subject to $\mathbf 1^T x = 1$, $0 \le x \le 0.6$.

# %%
import os

import cvxpy as cp
import matplotlib.pyplot as plt
import numpy as np
import torch
from cvxpylayers.torch import CvxpyLayer

import weft

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.manual_seed(0)
torch.set_num_threads(1)
SIZE, LIMIT = 3, 0.6

# %% [markdown]
# ## The layer
#
# Written once in cvxpy's words. `weft.Node` takes it like any module; nothing has to be wrapped or registered, and no
# weights # are deep-copied (its sparse buffers could not be).

# %%
x, y = cp.Variable(SIZE), cp.Parameter(SIZE)
projection = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= 0, x <= LIMIT])
layer = CvxpyLayer(projection, parameters=[y], variables=[x])


def project(y):
    return layer(y, solver_args={"eps": 1e-9})[0].to(y.dtype)  # it computes in float64


def target(p):
    """c(p) for p of shape (batch, 1), torch or numpy."""
    stack = torch.cat if isinstance(p, torch.Tensor) else lambda parts, axis: np.concatenate(parts, axis)
    return stack([p, 0.5 - p**2, 0.3 + 0 * p], 1)


net = torch.nn.Sequential(
    torch.nn.Linear(1, 24), torch.nn.GELU(), torch.nn.Linear(24, 24), torch.nn.GELU(), torch.nn.Linear(24, SIZE)
)
problem = weft.Problem(
    [weft.Node(net, ["p"], ["y"], name="proposal"), weft.Node(project, ["y"], ["x"], name="projection")],
    objectives=[weft.objective(lambda x, p: (x - target(p)).pow(4).sum(1).add(1e-12).pow(0.25), name="distance")],
)
print(problem.describe())

# %%
rows = 64 if SMALL else 512
data = weft.Data(
    weft.DictDataset({"p": 2 * torch.rand(rows, 1) - 1}),
    weft.DictDataset({"p": torch.linspace(-1, 1, 32)[:, None]}),
    batch_size=32,
)
epochs = 2 if SMALL else 60
trainer = weft.Trainer(
    epochs=epochs,
    progress=False,
    seed=0,
    optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0),
    scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, 1e-4),
)
result = trainer.fit(problem, data)
print(result)

# %% [markdown]
# ## Against cvxpy
#
# Three checks at parameters it was not trained on: the constraints hold; the layer projects as cvxpy does with another
# solver; and the whole network finds the optimum of the original problem.

# %%
p = np.linspace(-0.95, 0.95, 7 if SMALL else 39)[:, None]
found = {
    key: value.double().numpy() for key, value in trainer.predict({"p": torch.tensor(p, dtype=torch.float32)}).items()
}
violation = float(np.max([np.abs(found["x"].sum(1) - 1).max(), -found["x"].min(), found["x"].max() - LIMIT]))


def solve(objective):
    cp.Problem(cp.Minimize(objective), [cp.sum(x) == 1, x >= 0, x <= LIMIT]).solve(solver=cp.CLARABEL)
    return x.value.copy()


projected = np.array([solve(cp.sum_squares(x - row)) for row in found["y"]])
optimum = np.array([solve(cp.sum(cp.power(x - row, 4))) for row in target(p)])
difference = float(np.abs(projected - found["x"]).max())
distance = float(np.abs(optimum - found["x"]).max())


def cost(x):
    return np.linalg.norm(x - target(p), 4, axis=1).mean()


excess = float(cost(found["x"]) / cost(optimum) - 1)
print(f"constraints violated by {violation:.1e}; projection differs from cvxpy's by {difference:.1e}")
print(f"cost above the optimum's: {100 * excess:.2f} %; largest distance of any entry {distance:.3f}")

# %%
figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
for i in range(SIZE):
    ax.plot(p, optimum[:, i], color=f"C{i}", linewidth=4, alpha=0.3, label=f"$x_{i}$, cvxpy")
    ax.plot(p, found["x"][:, i], "--", color=f"C{i}", label=f"$x_{i}$, network")
ax.axhline(LIMIT, color="0.5", linestyle=":", label="bound")
ax.set(xlabel="parameter $p$", ylabel="solution $x$")
ax.legend(fontsize="small", ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))
plt.show()

# %%
figures = {
    "violation": violation,
    "projection_difference": difference,
    "excess_cost": excess,
    "largest_distance": distance,
}
