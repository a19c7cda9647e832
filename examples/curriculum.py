# %% [markdown]
# # A curriculum on the length of the rollout
#
# A model of a dynamical system that is fitted over long rollouts from the start meets gradients through many steps of a
# model that is still wrong. A curriculum begins with short rollouts and lengthens them: one hook, which sets
# `rollout.steps` as a function of the epoch. The truth is the simulator: a Van der Pol oscillator.

# %%
import os

import matplotlib.pyplot as plt
import torch

import weft

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.set_num_threads(1)
LONG = 8 if SMALL else 40


def simulate(x, steps, dt=0.1, substeps=5):
    """Runge-Kutta 4 for x'' = 1.5 (1 - x^2) x' - x; x: (batch, 2) -> (batch, steps + 1, 2)."""

    def slope(x):
        return torch.stack([x[:, 1], 1.5 * (1 - x[:, 0] ** 2) * x[:, 1] - x[:, 0]], dim=1)

    states, h = [x], dt / substeps
    for _ in range(steps):
        for _ in range(substeps):
            k1 = slope(x)
            k2 = slope(x + h / 2 * k1)
            k3 = slope(x + h / 2 * k2)
            k4 = slope(x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(x)
    return torch.stack(states, dim=1)


def trajectories(n, steps, seed):
    x = 4 * torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) - 2
    truth = simulate(x, steps)
    return weft.DictDataset({"x": truth[:, :1], "truth": truth})


# %% [markdown]
# ## The problem
#
# The step adds a learned increment. The objective compares as many steps as were rolled out, so its value keeps its
# meaning; what decides about the best weights is a metric that always looks at the whole horizon.


# %%
class Step(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(2, 48), torch.nn.Tanh(), torch.nn.Linear(48, 48), torch.nn.Tanh(), torch.nn.Linear(48, 2)
        )

    def forward(self, x):
        return x + 0.1 * self.net(x)


def make_problem():
    torch.manual_seed(0)
    rollout = weft.Rollout([weft.Node(Step(), ["x"], ["x"], name="step")], steps=LONG, name="rollout")
    return weft.Problem(
        [rollout], objectives=[weft.objective(lambda x, truth: (x - truth[:, : x.shape[1]]).square(), name="error")]
    )


epochs = 4 if SMALL else 600
data = weft.Data(trajectories(64 if SMALL else 300, LONG, 1), trajectories(50, LONG, 2), batch_size=50)
test = trajectories(20 if SMALL else 100, 2 * LONG, 3).datadict


def lengthen(epoch):
    return {"rollout.steps": min(LONG, 2 + int(LONG * 1.3 * epoch / epochs))}


class WholeHorizon(weft.Hook):
    """Validation always looks at the whole horizon, so that its loss means the same in every epoch."""

    def on_validation_start(self, trainer):
        self.steps, trainer.problem.nodes[0].steps = trainer.problem.nodes[0].steps, LONG

    def on_validation_end(self, trainer, metrics):
        trainer.problem.nodes[0].steps = self.steps


def train(*hooks):
    problem = make_problem()
    trainer = weft.Trainer(
        epochs=epochs,
        seed=0,
        progress=False,
        clip=1.0,
        hooks=[*hooks, WholeHorizon()],
        optimizer=lambda params: torch.optim.Adam(params, lr=5e-3, fused=True),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, 1e-4),
    )
    result = trainer.fit(problem, data)
    problem.nodes[0].steps = 2 * LONG
    x = trainer.predict({"x": test["x"]})["x"]
    error = float((x - test["truth"]).norm() / test["truth"].norm())
    print(f"{result}\nrelative error over {2 * LONG} steps of unseen trajectories: {error:.3f}")
    return result, x, error


def rolled_out(result):
    """How many steps of the model were computed, which is what the training costs."""
    lengths = result.history.get("rollout.steps", [LONG] * result.epochs)
    return int(sum(lengths)) * result.steps // result.epochs


with_curriculum, x, error = train(weft.hooks.Curriculum(lengthen))
at_once, _, error_at_once = train()
print(
    f"steps of the model in training: {rolled_out(with_curriculum)} with the curriculum, {rolled_out(at_once)} at once"
)

# %% [markdown]
# A shift of a rhythm by $\delta$ radians is a relative error of about $\delta$: an error of 0.05 over twice the trained
# horizon # is a clock that is off by less than 1 % of a period.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for name, result in (("curriculum", with_curriculum), ("full length at once", at_once)):
    left.semilogy(result.history["dev_loss"], label=name)
left.set(xlabel="epoch", ylabel=f"dev loss over {LONG} steps")
left.legend(fontsize="small")
weft.plot.phase_portrait(x[:4], right, reference=test["truth"][:4], labels=("position", "velocity"))
right.set_title(f"{2 * LONG} steps; pale: simulator")
plt.show()

# %%
figures = {
    "error": error,
    "error_at_once": error_at_once,
    "first_and_last_length": [with_curriculum.history["rollout.steps"][i] for i in (0, -1)],
    "steps_rolled_out": [rolled_out(result) for result in (with_curriculum, at_once)],
}
