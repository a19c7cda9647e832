# %% [markdown]
# # Constraints that hold: an augmented Lagrangian, with its multipliers
#
# A penalty alone lets a constraint be broken a little, or makes the problem stiff. An augmented Lagrangian learns a
# multiplier for every training row instead. Here the truth is known: for each $p$,
# $\min_x \tfrac12 \|x - c\|^2$ subject to $a^T x \le p$ has the multiplier $\lambda(p) = \max(0, (a^T c - p) /
# \|a\|^2)$.

# %%
import os

import matplotlib.pyplot as plt
import torch

import weft

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.set_num_threads(1)
A, C = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])


def make_problem(loss):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(1, 40), torch.nn.GELU(), torch.nn.Linear(40, 40), torch.nn.GELU(), torch.nn.Linear(40, 2)
    )
    return weft.Problem(
        [weft.Node(net, ["p"], ["x"], name="solution")],
        objectives=[weft.objective(lambda x: 0.5 * (x - C).square().sum(dim=1), name="distance")],
        constraints=[weft.less_equal(lambda x: x @ A, lambda p: p[:, 0], weight=1.0, norm=2, name="limit")],
        loss=loss,
    )


rows, EPOCHS = 16, 100 if SMALL else 20_000
p = torch.linspace(0.0, 5.0, rows)[:, None]
data = weft.Data(weft.DictDataset({"p": p}), batch_size=rows)
settings = {
    "epochs": EPOCHS,
    "seed": 0,
    "progress": False,
    "compile": not SMALL,
    "optimizer": lambda params: torch.optim.Adam(params, lr=5e-3),
    "scheduler": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, EPOCHS, 1e-6),
}

# %% [markdown]
# ## Penalty, and augmented Lagrangian
#
# Only the loss changes. The last weights are compared: no single number says which epoch is best while multipliers
# change. # `growth=1.0` keeps the penalty parameter as it is. All rows are one batch, so an epoch is one step;
# `compile=True` makes each a single graph, so twenty thousand are a matter of seconds. Every 100 steps the multipliers
# move by # what is left of the violation, and the error shrinks by a constant factor each time: it ends at the digits
# of float32.

# %%
penalty = make_problem(weft.PenaltyLoss())
result = weft.Trainer(**settings).fit(penalty, data)
penalty.load_state_dict(result.last_weights)

lagrangian = weft.AugmentedLagrangian(mu=1.0, growth=1.0, every=10 if SMALL else 100)
augmented = make_problem(lagrangian)
result = weft.Trainer(**settings).fit(augmented, data)
augmented.load_state_dict(result.last_weights)
print(result)

# %%
truth = ((A @ C - p[:, 0]) / (A @ A)).clamp(min=0)
multipliers = lagrangian.multipliers[:, 0]
error = float((multipliers - truth).abs().mean())


def broken(problem):
    return float((problem.step({"p": p})["x"].detach() @ A - p[:, 0]).clamp(min=0).max())


print(f"multipliers differ from the closed form by {error:.1e} on average (largest true one: {truth.max():.2f})")
print(f"largest violation: {broken(penalty):.4f} with the penalty, {broken(augmented):.1e} with multipliers")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.plot(p, truth, color="C3", linewidth=4, alpha=0.35, label="closed form")
left.plot(p, multipliers, "kx", label="augmented Lagrangian")
left.set(xlabel="parameter p", ylabel="multiplier of the limit")
left.legend(fontsize="small")
for name, problem in (("penalty", penalty), ("augmented Lagrangian", augmented)):
    right.plot(p, problem.step({"p": p})["x"].detach() @ A - p[:, 0], label=name)
right.axhline(0, color="0.5", linestyle="--")
right.set(xlabel="parameter p", ylabel="$a^T x - p$ (above 0: broken)")
right.legend(fontsize="small")
plt.show()

# %%
figures = {"multiplier_error": error, "violation": broken(augmented), "violation_with_penalty": broken(penalty)}
