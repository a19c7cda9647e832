# %% [markdown]
# # Part 2: control, hard-coded tensors, devices, precision, saving and loading
#
# Differentiable predictive control of a double integrator: a neural policy is trained through the closed loop so that
# it brings every initial state to the origin, with bounded controls. No controller is imitated: the gradient of the
# closed-loop cost does it all. Where no bound is active, the optimum is known: the linear quadratic regulator (LQR).

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.linalg import solve_discrete_are

import weft

SMALL = bool(os.environ.get("WEFT_SMALL"))  # what the test suite runs; the figures in the README are of the full size
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The plant
#
# `A` and `B` are hard-coded tensors, closed over by a plain function. On a GPU they have to follow the data: as buffers
# of a module they do by themselves, and this is all there is to it. There is no `.to(device)` anywhere.


# %%
class Plant(torch.nn.Module):
    """x(t+1) = A x(t) + B u(t), for x of shape (batch, 2) and u of shape (batch, 1)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("A", torch.tensor([[1.2, 1.0], [0.0, 1.0]]))
        self.register_buffer("B", torch.tensor([[1.0], [0.5]]))

    def forward(self, x, u):
        return x @ self.A.T + u @ self.B.T


plant = Plant()
policy = torch.nn.Sequential(
    torch.nn.Linear(2, 32), torch.nn.GELU(), torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 1)
)
loop = weft.Rollout(
    [weft.Node(policy, ["x"], ["u"], name="policy"), weft.Node(plant, ["x", "u"], ["x"], name="plant")], steps=15
)

# %% [markdown]
# ## The problem
#
# Tensors are (batch, time, features). `x` is given with one time entry and ends with `steps + 1`; `u` has `steps`. A
# penalty # lets a bound be broken a little, so it is set 2 % tighter than the one that has to hold.

# %%
Q, R, U_MAX, X_MAX = 1.0, 0.5, 1.0, 5.0
problem = weft.Problem(
    [loop],
    objectives=[
        weft.objective(lambda x: Q * x[:, 1:].square().sum(-1), name="state"),
        weft.objective(lambda u: R * u.square().sum(-1), name="control"),
    ],
    constraints=[
        weft.less_equal(lambda u: u.abs(), 0.98 * U_MAX, weight=50.0, name="control_bound"),
        weft.less_equal(lambda x: x.abs(), X_MAX, weight=10.0, name="state_bound"),
    ],
)
print(problem.describe())


def initial_states(n):
    return (torch.rand(n, 1, 2) - 0.5) * 2 * torch.tensor([1.5, 1.0])


def data_setup(nsim=3000, batch_size=200):
    def initial(n):
        return weft.DictDataset({"x": torch.rand(n, 1, 1) * initial_states(n)})  # more of them near the origin

    return initial(nsim), initial(nsim // 5), None, batch_size


# %% [markdown]
# ## Training
#
# A curriculum in two phases: a short horizon first, then a longer one at a smaller rate. One history, one best, and
# `accelerator="gpu"` or `precision="bf16-mixed"` would be the only change for other hardware.

# %%
short, long = (10, 10) if SMALL else (100, 200)  # epochs


def adam(lr):
    return lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True)


def cosine(epochs, end):
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, end)


def longer(trainer):
    loop.steps = 30


trainer = weft.Trainer(
    phases=[
        weft.Phase(epochs=short, optimizer=adam(2e-3), scheduler=cosine(short, 1e-4)),
        weft.Phase(epochs=long, optimizer=adam(1e-3), scheduler=cosine(long, 1e-6), setup=longer),
    ],
    clip=10.0,
    progress=False,
)
result = trainer.fit(problem, data_setup, nsim=600 if SMALL else 3000)
print(result)

# %% [markdown]
# ## Against the optimum
#
# From small initial states no bound is ever active, and the cost of the optimal controller is $x_0^T P x_0$ with $P$
# from # the discrete algebraic Riccati equation (scipy).

# %%
A, B = plant.A.double().numpy(), plant.B.double().numpy()
P = solve_discrete_are(A, B, Q * np.eye(2), R * np.eye(1))
K = np.linalg.solve(R * np.eye(1) + B.T @ P @ B, B.T @ P @ A)
starts = torch.tensor([[0.4, 0.0], [0.0, 0.3], [-0.3, 0.2], [0.3, -0.2], [-0.2, -0.2]])[:, None]
loop.steps = 60
closed = trainer.predict({"x": starts})
states, controls = closed["x"].double(), closed["u"].double()
cost = Q * states.square().sum((1, 2)) + R * controls.square().sum((1, 2))
optimal = torch.tensor(np.einsum("bi,ij,bj->b", starts[:, 0].double(), P, starts[:, 0].double()))
excess = float((cost.sum() / optimal.sum()) - 1)
print(f"closed-loop cost over LQR: +{100 * excess:.2f} % (each: {np.round((cost / optimal).numpy(), 4)})")

# %% [markdown]
# ## From far away
#
# There the bounds are active; a linear controller would break them. 1000 random states tell how far the policy keeps
# them, # four are drawn.

# %%
closed = trainer.predict({"x": initial_states(1000)})
final = float(closed["x"][:, -1].norm(dim=-1).max())
largest_control, largest_state = (float(closed[key].abs().max()) for key in ("u", "x"))
print(f"largest distance from the origin after {loop.steps} steps: {final:.4f}")
print(f"largest control {largest_control:.3f} (bound {U_MAX}), largest state {largest_state:.3f} (bound {X_MAX})")

far = torch.tensor([[1.4, 0.8], [-1.4, -0.8], [1.0, -0.9], [-1.2, 0.9]])[:, None]
closed = trainer.predict({"x": far})

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for i, (x, u) in enumerate(zip(closed["x"], closed["u"], strict=True)):
    left.plot(*x.T, "o-", markersize=3, color=f"C{i}")
    right.step(range(len(u)), u[:, 0], where="post", color=f"C{i}", label=f"from ({x[0, 0]:.1f}, {x[0, 1]:.1f})")
left.plot(0, 0, "k+", markersize=12)
left.set(xlabel="position", ylabel="velocity", title="closed loop, phase plane")
right.axhline(U_MAX, color="0.5", linestyle="--")
right.axhline(-U_MAX, color="0.5", linestyle="--", label="bounds")
right.set(xlabel="time step", ylabel="control", xlim=(0, 25), title="controls")
right.legend(fontsize="small", loc=(0.62, 0.58))
plt.show()

# %% [markdown]
# ## Saving, loading, precision
#
# Weights are plain tensors. The same policy, loaded into a new problem and evaluated in float64, gives the same
# controls # up to float32's last digits.

# %%
import tempfile  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    trainer.save_weights(f"{folder}/policy.pt")
    weft.load_weights(problem, f"{folder}/policy.pt")
in_double = weft.Trainer(precision="64-true", progress=False).predict({"x": far.double()}, problem=problem)
difference = float((in_double["u"] - closed["u"]).abs().max())
print(f"controls in {in_double['u'].dtype} differ by {difference:.1e}")

# %%
figures = {
    "excess_cost": excess,
    "final_distance": final,
    "largest_control": largest_control,
    "largest_state": largest_state,
    "difference_float64": difference,
}
