# %% [markdown]
# # Four ways of custom training logic, on one problem
#
# The same idea, written from the lightest to the heaviest way: besides the problem's loss, the squared weights shall
# count # (a penalty of 0.01). All four train with checkpoints, logs, devices and resuming as ever, and end at the same
# weights.

# %%
import os

import matplotlib.pyplot as plt
import torch

import weft

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.set_num_threads(1)
PENALTY = 0.01


def make_problem():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    return weft.Problem(
        [weft.Node(net, ["x"], ["y"], name="net")],
        objectives=[weft.objective(lambda x, y: (y - torch.sin(3 * x)).square(), name="fit")],
    )


rows = weft.DictDataset({"x": torch.linspace(-1, 1, 64)[:, None]})
data = weft.Data(rows, rows, batch_size=16)
settings = {
    "epochs": 5 if SMALL else 200,
    "seed": 0,
    "progress": False,
    "optimizer": lambda params: torch.optim.Adam(params, lr=1e-2),
}


def squares(problem):
    return sum(p.square().sum() for p in problem.parameters())


# %% [markdown]
# ## 1. A step
#
# A function of the trainer and a batch that returns the loss, or a dict that holds it.


# %%
def step(trainer, batch):
    return trainer.problem(batch)[trainer.train_metric] + PENALTY * squares(trainer.problem)


by_step = make_problem()
weft.Trainer(training_step=step, **settings).fit(by_step, data)

# %% [markdown]
# ## 2. A hook
#
# A hook does not see the loss being made, but it sees the gradients before they are used: the penalty's is $2 \cdot
# 0.01\,w$.


# %%
class Penalty(weft.Hook):
    def on_before_optimizer_step(self, trainer, optimizer):
        for p in trainer.problem.parameters():
            p.grad.add_(p.detach(), alpha=2 * PENALTY)


by_hook = make_problem()
weft.Trainer(hooks=Penalty(), **settings).fit(by_hook, data)

# %% [markdown]
# ## 3. A subclass
#
# `update` is the whole update: what happens to a batch, from loss to optimizer step.


# %%
class Penalised(weft.Trainer):
    def update(self, batch):
        loss = self.problem(batch)[self.train_metric] + PENALTY * squares(self.problem)
        self.backward(loss)
        self.step()
        return loss


by_subclass = make_problem()
Penalised(**settings).fit(by_subclass, data)

# %% [markdown]
# ## 4. Your own loop
#
# `fit` itself is written like this.

# %%
by_loop = make_problem()
with weft.Trainer(**settings).start(by_loop, data) as run:
    for epoch in run.epochs():
        for batch in run.batches("train"):
            loss = by_loop(batch)["train_loss"] + PENALTY * squares(by_loop)
            run.backward(loss)
            run.step()
        run.evaluate("dev")
print(run.result)

# %% [markdown]
# ## The same weights
#
# To the last bit where the arithmetic is the same; the hook adds the gradient in another order.


# %%
def apart(one, other):
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


plain = make_problem()
weft.Trainer(**settings).fit(plain, data)
figures = {
    "hook": apart(by_step, by_hook),
    "subclass": apart(by_step, by_subclass),
    "loop": apart(by_step, by_loop),
    "without_penalty": apart(by_step, plain),
}
print("largest difference of a weight to way 1:", figures)

# %%
x = torch.linspace(-1.5, 1.5, 200)[:, None]
figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
ax.plot(x, torch.sin(3 * x), color="0.7", linewidth=4, label="sin 3x")
for name, problem in (("without penalty", plain), ("with penalty", by_step)):
    ax.plot(x, problem.step({"x": x})["y"].detach(), label=name)
ax.set(xlabel="x", ylabel="y")
ax.legend(loc=(0.5, 0.04))
plt.show()
