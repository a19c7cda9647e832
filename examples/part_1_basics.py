# %% [markdown]
# # Part 1: basics. From NeuroMANCER's trainers to weft
#
# A parametric problem: for every $(a, p)$ find
# $\min_x (1 - x_0)^2 + a (x_1 - x_0^2)^2$ subject to $x_0 \ge x_1$ and $(p/2)^2 \le x_0^2 + x_1^2 \le p^2$.
# A network learns the whole map $(a, p) \mapsto x$ from objective and penalties, without seeing a single optimum.
# The problem is NeuroMANCER's own; only the training changes, three times.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import minimize

with warnings.catch_warnings():  # its dependencies warn while they are imported
    warnings.simplefilter("ignore")
    from neuromancer.constraint import variable
    from neuromancer.dataset import DictDataset
    from neuromancer.loss import PenaltyLoss
    from neuromancer.modules import blocks
    from neuromancer.problem import Problem
    from neuromancer.system import Node

import weft
from weft.integrations.neuromancer import Trainer

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.set_num_threads(1)


# %%
class Joined(torch.nn.Module):
    """A network of two inputs, each (batch, 1)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, a, p):
        return self.net(torch.cat([a, p], dim=-1))


def make_problem():
    torch.manual_seed(0)
    net = blocks.MLP(2, 2, nonlin=torch.nn.ReLU, hsizes=[80] * 4)
    x0, x1 = variable("x")[:, [0]], variable("x")[:, [1]]
    a, p = variable("a"), variable("p")
    objective = ((1 - x0) ** 2 + a * (x1 - x0**2) ** 2).minimize(name="f")
    constraints = [100.0 * (x0 >= x1), 100.0 * ((p / 2) ** 2 <= x0**2 + x1**2), 100.0 * (x0**2 + x1**2 <= p**2)]
    for constraint, name in zip(constraints, ["order", "inner", "outer"], strict=True):
        constraint.name = name  # the name under which it is reported
    return Problem([Node(Joined(net), ["a", "p"], ["x"], name="solution")], PenaltyLoss([objective], constraints))


def data_setup(nsim=2000, batch_size=64):
    generator = torch.Generator().manual_seed(1)

    def rows(n, name):
        a, p = torch.rand(2, n, 1, generator=generator)
        return DictDataset({"a": 0.2 + a, "p": 0.5 + 1.5 * p}, name=name)

    return rows(nsim, "train"), rows(nsim // 4, "dev"), None, batch_size


def adam(params):
    return torch.optim.AdamW(params, lr=1e-3)


nsim, epochs = (128, 2) if SMALL else (2000, 20)

# %% [markdown]
# ## 1. NeuroMANCER's Trainer: the same lines
#
# One import changes. `train()` returns the best weights, as before; here the problem holds them, too.

# %%
train, dev, _, batch_size = data_setup(nsim)
loaders = [torch.utils.data.DataLoader(d, batch_size=batch_size, collate_fn=d.collate_fn) for d in (train, dev)]

first = make_problem()
trainer = Trainer(
    first, *loaders, optimizer=adam(first.parameters()), epochs=epochs, patience=epochs, epoch_verbose=epochs
)
best = trainer.train()

# %% [markdown]
# ## 2. LitTrainer: the same keywords
#
# Without Lightning underneath, and with what its README promises: the problem ends with its best weights.

# %%
second = make_problem()
lit = weft.LitTrainer(
    epochs=epochs, custom_optimizer=adam(second.parameters()), save_weights=False, shuffle=False, progress=False
)
lit_result = lit.fit(second, data_setup, nsim=nsim)
print(lit_result)

# %% [markdown]
# ## 3. weft's own Trainer
#
# The optimizer is a function of the parameters, so the trainer can be written before the problem. All three see the
# same # rows in the same order, so they end with the same weights, to the last bit.

# %%
third = make_problem()
result = weft.Trainer(epochs=epochs, optimizer=adam, progress=False, clip=100.0).fit(third, *loaders)
print(result)


def difference(one, other):
    return max(
        float((a - b).abs().max()) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


apart = {"Trainer": difference(first, third), "LitTrainer": difference(second, third)}
print("largest difference of any weight to weft.Trainer's:", apart)

# %% [markdown]
# ## 4. The problem in weft's own words
#
# Functions instead of symbols: the names of their arguments are the keys that they read. A misspelt key is an error
# with # a suggestion, and `problem.describe()` says what is read and written. With `compile=True` an update is one
# graph, which makes # such a small network several times faster.

# %%
torch.manual_seed(0)
net = blocks.MLP(2, 2, nonlin=torch.nn.ReLU, hsizes=[80] * 4)


def radius2(x):
    return x.square().sum(dim=1, keepdim=True)


problem = weft.Problem(
    [weft.Node(net, ["a", "p"], ["x"], name="solution")],
    objectives=[weft.objective(lambda x, a: (1 - x[:, [0]]) ** 2 + a * (x[:, [1]] - x[:, [0]] ** 2) ** 2, name="f")],
    constraints=[
        weft.greater_equal(lambda x: x[:, [0]], lambda x: x[:, [1]], weight=100.0, name="order"),
        weft.greater_equal(radius2, lambda p: (p / 2) ** 2, weight=100.0, name="inner"),
        weft.less_equal(radius2, lambda p: p**2, weight=100.0, name="outer"),
    ],
)
print(problem.describe())
epochs = 3 if SMALL else 1000
trainer = weft.Trainer(
    epochs=epochs,
    seed=0,
    progress=False,
    compile=not SMALL,
    optimizer=lambda params: torch.optim.Adam(params, lr=3e-3),
    scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, 1e-6),
)
result = trainer.fit(problem, data_setup, nsim=256 if SMALL else 4000)
print(result)

# %% [markdown]
# ## Against the optimum
#
# scipy's SLSQP solves each problem of a grid of parameters.


# %%
def optimum(a, p):
    constraints = [
        {"type": "ineq", "fun": lambda x: x[0] - x[1]},
        {"type": "ineq", "fun": lambda x: x @ x - (p / 2) ** 2},
        {"type": "ineq", "fun": lambda x: p**2 - x @ x},
    ]
    starts = [0.75 * p * np.array([np.cos(angle), np.sin(angle)]) for angle in (0.0, 0.6, -0.6)]
    found = [
        minimize(lambda x: (1 - x[0]) ** 2 + a * (x[1] - x[0] ** 2) ** 2, s, constraints=constraints) for s in starts
    ]
    return min((f for f in found if f.success), key=lambda f: f.fun).x


grid = np.array(
    [(a, p) for a in np.linspace(0.3, 1.1, 3 if SMALL else 9) for p in np.linspace(0.6, 1.9, 3 if SMALL else 9)]
)
truth = np.array([optimum(a, p) for a, p in grid])
a, p = torch.tensor(grid[:, [0]], dtype=torch.float32), torch.tensor(grid[:, [1]], dtype=torch.float32)
learned = trainer.predict({"a": a, "p": p})["x"].numpy()


def objective(x):
    return (1 - x[:, 0]) ** 2 + grid[:, 0] * (x[:, 1] - x[:, 0] ** 2) ** 2


r2 = (learned**2).sum(1)
violation = np.max([learned[:, 1] - learned[:, 0], (grid[:, 1] / 2) ** 2 - r2, r2 - grid[:, 1] ** 2, 0 * r2], axis=0)
distance = np.linalg.norm(learned - truth, axis=1)
gap = float(np.mean(objective(learned) - objective(truth)))
print(
    f"mean distance to the optimum {distance.mean():.4f}, objective {gap:+.5f}, largest violation {violation.max():.4f}"
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
result.plot(left)
left.set_title("training")
right.scatter(*truth.T, s=60, facecolors="none", edgecolors="C3", label="optimum (scipy)")
right.scatter(*learned.T, s=12, color="k", label="network")
right.set(xlabel="$x_0$", ylabel="$x_1$", title="solutions on a grid of parameters")
right.legend(fontsize="small")
plt.show()

# %%
figures = {
    "trainer_differs_by": apart["Trainer"],
    "littrainer_differs_by": apart["LitTrainer"],
    "mean_distance": float(distance.mean()),
    "objective_gap": gap,
    "largest_violation": float(violation.max()),
}
