# %% [markdown]
# # The heat equation, with soft boundary and initial conditions
#
# $u_t = u_{xx}$ for $x \in [0, 1]$, $t \in [0, 0.2]$, $u(0, t) = u(1, t) = 0$ and $u(x, 0) = \sin(\pi x)$. The solution
# is $e^{-\pi^2 t} \sin(\pi x)$; the network sees the equation and the two conditions only, each at points of its own.

# %%
import os

import matplotlib.pyplot as plt
import torch

import weft

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.manual_seed(0)
torch.set_num_threads(1)
T = 0.2
sizes = [2, 20, 20, 1]
layers = [m for i, o in zip(sizes, sizes[1:], strict=False) for m in (torch.nn.Linear(i, o), torch.nn.Tanh())]
net = torch.nn.Sequential(*layers[:-1])


# %% [markdown]
# ## Three parts
#
# A split of several datasets has one part for each. Their keys are `interior.x`, `boundary.x`, ...: `Node.on` makes one
# node of the same network for each part, and a term says which part its keys belong to.

# %%
d = weft.gradient  # of a quantity by an input, row by row
points = {"interior": 400, "boundary": 60, "initial": 60}
parts = {name: {"x": torch.rand(n, 1), "t": T * torch.rand(n, 1)} for name, n in points.items()}
parts["boundary"]["x"].round_()  # the two ends
parts["initial"]["t"].zero_()

problem = weft.Problem(
    weft.Node(net, ["x", "t"], ["u"], name="net").on(*parts),
    objectives=[weft.objective(lambda u, x, t: (d(u, t) - d(d(u, x), x)) ** 2, part="interior", name="equation")],
    constraints=[
        weft.equal("u", 0.0, part="boundary", weight=10.0, norm=2, name="boundary"),
        weft.equal("u", lambda x: torch.sin(torch.pi * x), part="initial", weight=10.0, norm=2, name="initial"),
    ],
    grad_inference=True,  # the loss is made of derivatives, in evaluations too
)
print(problem.describe())

# %% [markdown]
# `inputs_require_grad` names what is differentiated by. Without it, or without `grad_inference` above, torch's error
# says which of the two is missing.

# %%
trainer = weft.Trainer(
    phases=[
        weft.Phase(epochs=20 if SMALL else 600, optimizer=lambda params: torch.optim.Adam(params, lr=5e-3)),
        weft.Phase(
            epochs=2 if SMALL else 15,
            optimizer=lambda params: torch.optim.LBFGS(params, max_iter=50, line_search_fn="strong_wolfe"),
        ),
    ],
    progress=False,
    seed=0,
)
result = trainer.fit(problem, weft.Data(parts, inputs_require_grad=["interior.x", "interior.t"]))
print(result)

# %% [markdown]
# ## The solution
#
# `keys` runs the nodes that are asked for, so the other parts need not be there.

# %%
t, x = torch.meshgrid(torch.linspace(0, T, 60), torch.linspace(0, 1, 80), indexing="ij")
rows = {"interior": {"x": x.reshape(-1, 1), "t": t.reshape(-1, 1)}}
found = trainer.predict(rows, keys=["interior.u"])["interior.u"].reshape(x.shape)
truth = torch.exp(-(torch.pi**2) * t) * torch.sin(torch.pi * x)
error = float((found - truth).norm() / truth.norm())
print(f"relative L2 error: {error:.2e}")

# %%
weft.plot.field(t[:, 0].numpy(), x[0].numpy(), found.T.numpy(), truth.T.numpy(), labels=("t", "x", "u"))
plt.show()

# %%
figures = {"relative_error": error, "at_the_ends": float(found[:, [0, -1]].abs().max())}
