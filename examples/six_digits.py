# %% [markdown]
# # A PINN to six digits
#
# $\Delta u = f$ on the square $[-1, 1]^2$ with $u = 0$ at its edge; $f$ is such that $u = \sin(\pi x) \sin(\pi y)$.
# Adam brings a network to two or three digits and then stays there. The loss is a sum of squares, so a last phase may
# be one that knows it: a few dozen steps of `weft.optim.NaturalGradient` (energy natural gradient, Müller and Zeinhofer
# 2023), each of which solves a linear system in all parameters.

# %%
import os

import matplotlib.pyplot as plt
import torch

import weft

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.set_num_threads(1)


def make_net():
    torch.manual_seed(0)
    sizes = [2, 20, 20, 20, 1]
    layers = [m for i, o in zip(sizes, sizes[1:], strict=False) for m in (torch.nn.Linear(i, o), torch.nn.Tanh())]
    return torch.nn.Sequential(*layers[:-1])


def solution(x, y):
    return torch.sin(torch.pi * x) * torch.sin(torch.pi * y)


# %% [markdown]
# ## Residuals say that the loss is a sum of squares
#
# `weft.residual` is a term whose objective is its mean square, and which second-order optimizers see before it is
# squared. All rows are in one batch, and `precision="64-true"`: float32 has no six digits.

# %%
d = weft.gradient  # of a quantity by an input, row by row
generator = torch.Generator().manual_seed(1)
inside = 2 * torch.rand(800, 2, generator=generator) - 1
edge = 2 * torch.rand(160, 2, generator=generator) - 1
edge[torch.arange(160), torch.arange(160) % 2] = edge[torch.arange(160), torch.arange(160) % 2].sign()
parts = {
    name: {"x": at[:, :1].double(), "y": at[:, 1:].double()} for name, at in {"inside": inside, "edge": edge}.items()
}


def make_problem(net):
    return weft.Problem(
        weft.Node(net, ["x", "y"], ["u"], name="net").on(*parts),
        [
            weft.residual(
                lambda u, x, y: d(d(u, x), x) + d(d(u, y), y) + 2 * torch.pi**2 * solution(x, y),
                part="inside",
                weight=0.02,
                name="equation",
            ),
            weft.residual(lambda u: u, part="edge", name="edge"),
        ],
        grad_inference=True,  # the loss is made of derivatives, in evaluations too
    )


# %% [markdown]
# ## Three ways to end
#
# Each begins with the same steps of Adam.

# %%
side = torch.linspace(-1, 1, 60, dtype=torch.float64)
x, y = torch.meshgrid(side, side, indexing="ij")
points, truth = torch.stack([x.flatten(), y.flatten()], 1), solution(x, y)


def error_of(net):
    with torch.no_grad():
        return float((net(points).reshape(x.shape) - truth).norm() / truth.norm())


adam = {"optimizer": lambda params: torch.optim.Adam(params, lr=5e-3)}
begin = weft.Phase(epochs=10 if SMALL else 500, **adam)
ends = {
    "Adam": weft.Phase(epochs=10 if SMALL else 1500, **adam),
    "L-BFGS": weft.Phase(
        epochs=2 if SMALL else 40,
        optimizer=lambda params: torch.optim.LBFGS(params, max_iter=25, line_search_fn="strong_wolfe"),
    ),
    "natural gradient": weft.Phase(epochs=3 if SMALL else 160, optimizer=weft.optim.NaturalGradient),
}
curves, nets = {}, {}
for name, end in ends.items():
    net = nets[name] = make_net()
    curve = curves[name] = []
    trainer = weft.Trainer(
        phases=[begin, end],
        precision="64-true",
        monitor_metric="train_loss",
        progress=False,
        seed=0,
        hooks={"on_epoch_end": lambda trainer, metrics, net=net, curve=curve: curve.append(error_of(net))},
    )
    result = trainer.fit(make_problem(net), weft.Data(parts, inputs_require_grad=["inside.x", "inside.y"]))
    print(f"{name}: relative L2 error {error_of(net):.1e} after {result.epochs} epochs, {result.seconds:.0f} s")

# %% [markdown]
# ## What is left
#
# Errors by epoch (one of L-BFGS has up to 25 iterations), and where the best network still errs.

# %%
_, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for name, curve in curves.items():
    left.semilogy(curve, label=f"then {name}")
left.set(xlabel="epoch", ylabel="relative $L_2$ error")
left.legend()
with torch.no_grad():
    wrong = nets["natural gradient"](points).reshape(x.shape) - truth
picture = right.pcolormesh(x, y, wrong, cmap="RdBu", shading="gouraud", vmin=-wrong.abs().max(), vmax=wrong.abs().max())
plt.colorbar(picture, ax=right, label="u - solution, after natural gradient")
right.set(xlabel="x", ylabel="y", aspect="equal")
plt.show()

# %%
figures = {name.lower().replace("-", "_").replace(" ", "_"): error_of(net) for name, net in nets.items()}
