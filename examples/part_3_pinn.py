# %% [markdown]
# # Part 3: a physics-informed network for Burgers' equation, and its inverse problem
#
# $u_t + u\,u_x = \nu\,u_{xx}$ for $x \in [-1, 1]$, $t \in [0, 1]$ with $u(x, 0) = -\sin(\pi x)$, $u(\pm 1, t) = 0$ and
# $\nu = 0.01/\pi$: a sine steepens into a shock at $x = 0$. The network never sees the solution, only the equation.
# What helps: float64, Adam and then L-BFGS (two phases of one run), and points where the residual is large.

# %%
import math
import os

import matplotlib.pyplot as plt
import numpy as np
import torch

import weft

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.manual_seed(0)
torch.set_num_threads(1)
NU = 0.01 / torch.pi
WIDTH = 0.02  # a scale of x near the shock, whose layer is about 2 nu wide

# %% [markdown]
# ## The truth
#
# The transformation of Cole and Hopf turns the equation into the heat equation, whose solution is an integral with a
# Gaussian weight; Gauss-Hermite quadrature has it to many digits.


# %%
def exact(x, t, nu=NU, nodes=200):
    """The solution at points x, t (numpy arrays of one shape, t > 0), by Cole-Hopf."""
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    y = x[..., None] - np.sqrt(4 * nu * t[..., None]) * z
    kernel = weights * np.exp(-(np.cos(np.pi * y) + 1) / (2 * np.pi * nu))
    return -(kernel * np.sin(np.pi * y)).sum(-1) / kernel.sum(-1)


# %% [markdown]
# ## The ansatz
#
# $u = -\sin(\pi x) + t\,x\,(1 - x)\,N(x, t)$ satisfies the initial condition and both ends whatever $N$ is, so the
# residual is # the only term left. The solution is odd, so half of the interval is enough. The problem's loss is made
# of derivatives: # `grad_inference` keeps autograd on in evaluation, `inputs_require_grad` asks for derivatives in `x`
# and `t`.


# %%
class Ansatz(torch.nn.Module):
    """u(x, t) for x and t of shape (batch, 1), with the conditions built in."""

    def __init__(self, width=24, depth=3):
        super().__init__()
        sizes = [3, *[width] * depth]
        layers = [m for i, o in zip(sizes, sizes[1:], strict=False) for m in (torch.nn.Linear(i, o), torch.nn.Tanh())]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(width, 1))

    def forward(self, x, t):
        features = torch.cat([2 * x - 1, 2 * t - 1, torch.asinh(x / WIDTH) / 2 - 1], dim=1)
        return -torch.sin(torch.pi * x) + t * torch.tanh(x / WIDTH) * (1 - x) * self.net(features)


def derivative(of, by):
    return torch.autograd.grad(of.sum(), by, create_graph=True)[0]


def residual(u, x, t, nu=NU):
    """In the layer of the shock it is as large as 1/nu; the factor takes a part of that back."""
    u_x = derivative(u, x)
    return (x + 0.3) * (derivative(u, t) + u * u_x - nu * derivative(u_x, x))


def points(n, generator=None):
    """Random points that crowd towards x = 0, evenly on the stretched axis asinh(x / WIDTH)."""
    s, t = torch.rand(2, n, 1, generator=generator, dtype=torch.float64)
    return {"x": WIDTH * torch.sinh(s * math.asinh(1 / WIDTH)), "t": t}


problem = weft.Problem(
    [weft.Node(Ansatz(8, 2) if SMALL else Ansatz(), ["x", "t"], ["u"], name="u")],
    objectives=[weft.objective(lambda u, x, t: residual(u, x, t).square(), name="residual")],
    grad_inference=True,
    name="burgers",
)

# %% [markdown]
# ## Adam, then L-BFGS
#
# An epoch is one batch of all points. During the first phase the points are drawn anew, in proportion to the
# residual, every few hundred epochs. In the second, an epoch is one call of L-BFGS: up to 100 iterations with line
# searches.

# %%
adam_epochs, lbfgs_epochs, num_points = (10, 2, 200) if SMALL else (400, 24, 2000)


def lbfgs(params):
    return torch.optim.LBFGS(
        params, max_iter=100, history_size=50, line_search_fn="strong_wolfe", tolerance_change=0, tolerance_grad=0
    )


trainer = weft.Trainer(
    phases=[
        weft.Phase(
            epochs=adam_epochs,
            optimizer=lambda params: torch.optim.Adam(params, lr=5e-3),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, adam_epochs, 5e-4),
        ),
        weft.Phase(epochs=lbfgs_epochs, optimizer=lbfgs),
    ],
    hooks=weft.hooks.Resample(
        residual, lambda generator: points(4 * num_points, generator), every=max(1, adam_epochs // 5)
    ),
    precision="64-true",
    seed=0,
    progress=False,
)
train = weft.Data(weft.DictDataset(points(num_points)), batch_size=num_points, inputs_require_grad=("x", "t"))
result = trainer.fit(problem, train)
print(result)

# %%
x, t = np.meshgrid(np.linspace(-1, 1, 201), np.linspace(0.01, 1, 100))
truth = exact(x, t)


def solution(x, t):
    """The network's solution on the whole interval, by its symmetry."""
    rows = {"x": torch.tensor(np.abs(x).reshape(-1, 1)), "t": torch.tensor(t.reshape(-1, 1))}
    return np.sign(x) * trainer.predict(rows)["u"].numpy().reshape(x.shape)


error = float(np.linalg.norm(solution(x, t) - truth) / np.linalg.norm(truth))
print(f"relative L2 error: {error:.2e}")

# %%
weft.plot.field(t[:, 0], x[0], solution(x, t).T, truth.T, labels=("t", "x", "u"))
plt.show()

# %% [markdown]
# ## The inverse problem
#
# Now the viscosity is unknown, and there are noisy measurements of $u$ instead. It becomes one more parameter of the
# problem, # beside the network's. Two terms compete, residual and measurements; `ReLoBRaLo` (arXiv:2110.09813) gives
# more weight to the # one that shrinks more slowly.
#
# How well can the viscosity be known at all? With noise of standard deviation $\sigma$ no unbiased estimate has a
# smaller # standard error than $\sigma / \|\partial u / \partial \nu\|$ over the sensors (Cramér and Rao).


# %%
class Viscosity(torch.nn.Module):
    """One number, ten times too large at first; positive because its logarithm is what is learned."""

    def __init__(self):
        super().__init__()
        self.log_nu = torch.nn.Parameter(torch.tensor(math.log(10 * NU)))

    def forward(self, x):
        return self.log_nu.exp().expand(len(x), 1)


torch.manual_seed(1)
viscosity, sensors = Viscosity(), points(100 if SMALL else 1000)
places, noise = (sensors["x"].numpy(), sensors["t"].numpy() + 1e-6), 0.01
exact_u = torch.tensor(exact(*places))
sensors["measured"] = exact_u + noise * torch.randn_like(exact_u)
sensitivity = (exact(*places, nu=1.02 * NU) - exact(*places, nu=0.98 * NU)) / 0.04  # to a relative change of nu
standard_error = float(noise / np.linalg.norm(sensitivity))
inverse = weft.Problem(
    [
        weft.Node(Ansatz(8, 2) if SMALL else Ansatz(), ["x", "t"], ["u"], name="u"),
        weft.Node(viscosity, ["x"], ["nu"], name="viscosity"),
    ],
    objectives=[
        weft.objective(lambda u, x, t, nu: residual(u, x, t, nu).square(), name="residual"),
        weft.objective(lambda u, measured: (u - measured).square(), name="measurements"),
    ],
    grad_inference=True,
    name="inverse",
)
adam_epochs, lbfgs_epochs = (10, 2) if SMALL else (800, 10)
trainer = weft.Trainer(
    phases=[
        weft.Phase(epochs=adam_epochs, optimizer=lambda params: torch.optim.Adam(params, lr=5e-3)),
        weft.Phase(epochs=lbfgs_epochs, optimizer=lbfgs),
    ],
    hooks=weft.hooks.ReLoBRaLo(),
    monitor_metric="train_measurements",
    precision="64-true",
    seed=0,
    progress=False,
)
data = weft.Data(weft.DictDataset(sensors), batch_size=1000, inputs_require_grad=("x", "t"))
inverse_result = trainer.fit(inverse, data)
inverse.load_state_dict(inverse_result.last_weights)
found = float(viscosity.log_nu.detach().exp())
print(
    f"viscosity: {found:.6f}, true {NU:.6f}, off by {100 * abs(found / NU - 1):.2f} % "
    f"(standard error {100 * standard_error:.2f} %)"
)
print(f"weight of the measurements: {inverse_result.history['weight_measurements'][-1]:.1f}")

# %%
figures = {"relative_error": error, "viscosity_error": abs(found / NU - 1), "viscosity_standard_error": standard_error}
