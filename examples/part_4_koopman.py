# %% [markdown]
# # Part 4: deep Koopman operators, watched in TensorBoard
#
# A nonlinear system becomes linear in the right coordinates: find an encoder $z = \phi(x)$ in which
# $z_{t+1} = K z_t + B u_t$, and a decoder back. First on a linear system, whose spectrum is known; then on a nonlinear
# system # that is driven from outside, which makes it *non-autonomous*, and whose exact operator is known, too.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import weft

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.manual_seed(0)
torch.set_num_threads(1)


# %% [markdown]
# ## The model
#
# One node with four outputs: what is predicted from the first state and the inputs alone, the latent states on the way,
# the lifted true states, and these decoded again. Tensors are (batch, time, features).


# %%
class Koopman(torch.nn.Module):
    """x: (batch, steps + 1, states), u: (batch, steps, inputs)."""

    def __init__(self, encoder, decoder, size, inputs):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.K = torch.nn.Linear(size, size, bias=False)
        self.B = torch.nn.Linear(inputs, size, bias=False)
        torch.nn.init.eye_(self.K.weight)

    def forward(self, x, u):
        z = [self.encoder(x[:, 0])]
        for t in range(u.shape[1]):
            z.append(self.K(z[-1]) + self.B(u[:, t]))
        z, lifted = torch.stack(z, dim=1), self.encoder(x)
        return self.decoder(z), z, lifted, self.decoder(lifted)


def make_problem(model):
    return weft.Problem(
        [weft.Node(model, ["x", "u"], ["prediction", "z", "lifted", "rebuilt"], name="koopman")],
        objectives=[
            weft.objective(lambda prediction, x: (prediction - x).square(), weight=10.0, name="prediction_error"),
            weft.objective(lambda z, lifted: (z - lifted).square(), weight=1.0, name="linearity"),
            weft.objective(lambda rebuilt, x: (rebuilt - x).square(), weight=1.0, name="reconstruction"),
        ],
        name="koopman",
    )


def adam(rate, epochs):
    return {
        "optimizer": lambda params: torch.optim.AdamW(params, lr=rate, weight_decay=0.0),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
    }


# %% [markdown]
# ## A linear system: the spectrum is known
#
# With a linear encoder and as many latent states as states, $K$ is similar to $A$: same eigenvalues.

# %%
A = torch.tensor([[0.95, 0.25], [-0.25, 0.9]])
linear_spectrum = np.linalg.eigvals(A.numpy())
rows, steps = (64, 5) if SMALL else (400, 15)
x = [2 * torch.rand(rows, 2) - 1]
for _ in range(steps):
    x.append(x[-1] @ A.T)
data = weft.DictDataset({"x": torch.stack(x, dim=1), "u": torch.zeros(rows, steps, 1)})

epochs = 5 if SMALL else 80
linear = Koopman(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False), size=2, inputs=1)
trainer = weft.Trainer(epochs=epochs, progress=False, seed=0, **adam(1e-2, epochs))
trainer.fit(make_problem(linear), weft.Data(data, batch_size=50))
spectrum = np.linalg.eigvals(linear.K.weight.detach().numpy())


def distance(found, true):
    """The largest distance of a true eigenvalue from the nearest found one."""
    return float(max(np.abs(found - value).min() for value in true))


spectrum_error = distance(spectrum, linear_spectrum)
print(f"eigenvalues {np.round(spectrum, 4)}, true {np.round(linear_spectrum, 4)}")

# %% [markdown]
# ## A driven nonlinear system whose operator is known
#
# $\dot x_1 = \mu x_1$, $\dot x_2 = \lambda (x_2 - x_1^2) + u$ with an input $u$ that changes at random. It is
# nonlinear, but # linear in $(x_1, x_2, x_1^2)$ (Brunton et al., PLoS ONE 11(2), 2016): three coordinates are enough,
# and the eigenvalues of the # exact operator over a step of $\Delta t$ are $e^{\mu \Delta t}$, $e^{2 \mu \Delta t}$ and
# $e^{\lambda \Delta t}$. The network is told # none of this but the number three. (Most systems have no such finite
# form, a pendulum for one: its frequency depends on the # amplitude. There more coordinates only come closer.)

# %%
MU, LAMBDA, DT = -0.2, -1.0, 0.2
true_spectrum = np.exp(DT * np.array([MU, 2 * MU, LAMBDA]))


def simulate(x0, u, substeps=4):
    """Runge-Kutta 4; x0: (batch, 2), u: (batch, steps, 1), held constant over each step of DT seconds."""

    def slope(x, drive):
        return torch.stack([MU * x[:, 0], LAMBDA * (x[:, 1] - x[:, 0] ** 2) + drive[:, 0]], dim=1)

    states, h = [x0], DT / substeps
    for drive in u.unbind(1):
        x = states[-1]
        for _ in range(substeps):
            k1 = slope(x, drive)
            k2 = slope(x + h / 2 * k1, drive)
            k3 = slope(x + h / 2 * k2, drive)
            k4 = slope(x + h * k3, drive)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(x)
    return torch.stack(states, dim=1)


def trajectories(n, steps, seed):
    g = torch.Generator().manual_seed(seed)
    x0 = 4 * torch.rand(n, 2, generator=g) - 2
    u = (4 * torch.rand(n, (steps + 4) // 5, 1, generator=g) - 2).repeat_interleave(5, dim=1)[:, :steps]
    return weft.DictDataset({"x": simulate(x0, u), "u": u})


def data_setup(n=2000, steps=20):
    return trajectories(n, steps, seed=1), trajectories(n // 5, steps, seed=2), None, 100


def mlp(inputs, outputs, width=48):
    linear, act = torch.nn.Linear, torch.nn.ELU
    return torch.nn.Sequential(linear(inputs, width), act(), linear(width, width), act(), linear(width, outputs))


# %% [markdown]
# ## TensorBoard by one keyword
#
# `loggers="tensorboard"` writes train and dev curves of the loss and of every term, learning rates, speeds, the
# hyperparameters with the final metric (the HParams tab), and the problem's graph. The hooks add pictures and
# histograms. # Look at it with `tensorboard --logdir runs`; here the files go to a temporary folder and are read back.


# %%
def spectrum_figure(trainer):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    weft.plot.spectrum(trainer.problem.nodes[0].fn.K.weight, ax=figure.add_subplot())
    return figure


folder = tempfile.TemporaryDirectory()
epochs = 4 if SMALL else 120
model = Koopman(mlp(2, 3), torch.nn.Linear(3, 2), size=3, inputs=1)
trainer = weft.Trainer(
    epochs=epochs,
    progress=False,
    seed=0,
    clip=1.0,
    root_dir=folder.name,
    run_name="koopman",
    loggers="tensorboard",
    hooks=[
        weft.hooks.Figures({"spectrum": spectrum_figure}, every=max(1, epochs // 4)),
        weft.hooks.WeightHistograms(every=max(1, epochs // 4)),
        weft.hooks.GradientNorms(),
    ],
    **adam(3e-3, epochs),
)
result = trainer.fit(make_problem(model), data_setup, n=100 if SMALL else 2000, steps=5 if SMALL else 30)
print(result)

# %%
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

events = EventAccumulator(str(Path(folder.name) / "koopman"), size_guidance={"scalars": 0}).Reload()
tags = events.Tags()
print("scalars:", ", ".join(tags["scalars"]))
print("images:", tags["images"], "histograms:", len(tags["histograms"]))
points = len(events.Scalars("loss/train"))

# %% [markdown]
# ## Against the known operator, and the simulator in open loop
#
# 60 steps (12 s) from the first state and the input alone, twice what it was trained on. For comparison: the best
# linear model of the states themselves (least squares, DMD with control).

# %%
test = trajectories(20 if SMALL else 200, 60, seed=3).datadict
predicted = trainer.predict({"x": test["x"], "u": test["u"]})["prediction"]
train = trajectories(500, 30, seed=1).datadict
inputs = torch.cat([train["x"][:, :-1], train["u"]], dim=2).reshape(-1, 3)
AB = torch.linalg.lstsq(inputs, train["x"][:, 1:].reshape(-1, 2)).solution.T
dmd = [test["x"][:, 0]]
for t in range(60):
    dmd.append(torch.cat([dmd[-1], test["u"][:, t]], dim=1) @ AB.T)


def relative(found):
    return float((found - test["x"]).norm() / test["x"].norm())


learned_spectrum = np.linalg.eigvals(model.K.weight.detach().numpy())
driven_spectrum_error = distance(learned_spectrum, true_spectrum)
print(f"eigenvalues {np.sort(learned_spectrum)}, true {np.sort(true_spectrum)}")
error, error_linear = relative(predicted), relative(torch.stack(dmd, dim=1))
print(f"open-loop error: {error:.4f} (linear model of the states: {error_linear:.3f})")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.0), layout="constrained", width_ratios=[1, 1.6])
weft.plot.spectrum(model.K.weight, true_spectrum, ax=left)
left.set(title="eigenvalues (part of the unit circle)", xlim=(0.75, 1.05), ylim=(-0.15, 0.15))
seconds = DT * np.arange(61)
for i in range(2):
    right.plot(seconds, test["x"][i, :, 1], color=f"C{i}", linewidth=4, alpha=0.35, label=f"simulator, {i}")
    right.plot(seconds, predicted[i, :, 1], "--", color=f"C{i}", label=f"Koopman, {i}")
right.set(xlabel="time (s)", ylabel="$x_2$", title="driven system, open loop")
right.legend(fontsize="small", ncol=2)
plt.show()

# %%
folder.cleanup()
figures = {
    "spectrum_error": spectrum_error,
    "driven_spectrum_error": driven_spectrum_error,
    "open_loop_error": error,
    "open_loop_error_linear": error_linear,
    "points_in_tensorboard": points,
    "images_in_tensorboard": len(tags["images"]),
}
