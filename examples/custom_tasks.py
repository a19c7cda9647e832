# %% [markdown]
# # Sixteen tasks that the default loop does not do
#
# Each is written by documented means, as short as it gets, and measured: `figures` holds one number for each, which the
# test suite compares with what it must be.

# %%
import copy

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

import weft

torch.set_num_threads(1)
figures = {}
X = torch.linspace(-1, 1, 64)[:, None]
Y = 2 * X + 0.5


def line(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(1, 1)


def quiet(epochs, rate=0.1, cls=weft.Trainer, **options):
    options.setdefault("optimizer", lambda params: torch.optim.SGD(params, lr=rate))
    return cls(epochs=epochs, progress=False, **options)


def off(net):
    """How far a line is from y = 2 x + 1/2."""
    return float(((net.weight - 2).abs().max() + (net.bias - 0.5).abs().max()).detach())


# %% [markdown]
# ## 1. A GAN: two optimizers that take turns


# %%
class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.critic = nn.Linear(1, 1), nn.Linear(1, 1, bias=False)


class TakeTurns(weft.Trainer):
    def update(self, batch):
        gan = self.problem
        gap = lambda: gan.critic(batch["x"]).mean() - gan.critic(gan.generator(torch.randn(64, 1))).mean()
        self.backward(-gap() + gan.critic.weight.square().sum() / 2)
        self.step("critic")
        self.backward(gap())
        self.step("generator")
        return gan.critic.weight.square().sum()  # what is monitored: it has nothing to say where both are alike


torch.manual_seed(0)
gan = Gan()
sgd = lambda params: torch.optim.SGD(params, lr=0.1)
quiet(300, cls=TakeTurns, optimizer={"generator": sgd, "critic": sgd}).fit(gan, {"x": 3 + 0.1 * torch.randn(64, 1)})
figures["gan"] = abs(float(gan.generator.bias.detach()) - 3)  # the mean of what it imitates

# %% [markdown]
# ## 2. MAML: the loss after one step of each task, all tasks at once


# %%
def after_one_step(trainer, batch):
    net, params = trainer.problem, dict(trainer.problem.named_parameters())
    loss = lambda p, slope: (functional_call(net, p, X) - slope * X).square().mean()

    def of_task(slope):
        gradient = grad(loss)(params, slope)
        return loss({k: p - 0.1 * gradient[k] for k, p in params.items()}, slope)

    return vmap(of_task)(batch["slope"]).mean()


net = line()
slopes = torch.tensor([1.0, 1.5, 2.0, 3.5])
quiet(300, training_step=after_one_step).fit(net, {"slope": slopes})
figures["maml"] = abs(float(net.weight.detach()) - float(slopes.mean()))  # the best start is their mean

# %% [markdown]
# ## 3. Alternating optimization


# %%
class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        return (self.a * self.b * batch["x"] - 3 * batch["x"]).square().mean()


class Alternate(weft.Trainer):
    def update(self, batch):
        loss = self.problem(batch)
        self.backward(loss)
        self.step("a" if self.global_step % 2 else "b")
        return loss


product = Product()
quiet(100, cls=Alternate, optimizer={"a": sgd, "b": sgd}).fit(product, {"x": X})
figures["alternating"] = abs(float((product.a * product.b).detach()) - 3)

# %% [markdown]
# ## 4. Adversarial sampling: inputs are moved uphill before each step


# %%
def uphill(trainer, batch):
    x = batch["x"].requires_grad_()
    (slope,) = torch.autograd.grad((trainer.problem(x) - 2 * x - 0.5).square().sum(), x)
    x = (x + 0.1 * slope.sign()).detach()
    return (trainer.problem(x) - 2 * x - 0.5).square().mean()


result = quiet(1, rate=0.0, training_step=uphill).fit(net := line(), {"x": X})
figures["adversarial"] = result.history["train_loss"][0] / float((net(X) - Y).square().mean().detach())  # harder

# %% [markdown]
# ## 5. PCGrad: of two gradients that conflict, each loses its part against the other


# %%
class PCGrad(weft.Trainer):
    def update(self, batch):
        params = list(self.problem.parameters())
        losses = [(self.problem(X) - y).square().mean() for y in (Y, -Y)]
        grads = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]) for loss in losses]
        dot = torch.dot(*grads)
        if dot < 0:
            grads = [g - dot / other.dot(other) * other for g, other in zip(grads, grads[::-1])]
        for p, g in zip(params, sum(grads).split([p.numel() for p in params])):
            p.grad = g.view_as(p).clone()
        self.step()
        return sum(losses)


net = nn.Linear(1, 1)
quiet(100, cls=PCGrad).fit(net, {"x": X})
figures["pcgrad"] = abs(float((net.weight - 4 * net.bias).detach()))  # between 2 x + 1/2 and its negative

# %% [markdown]
# ## 6. Weights of single rows: one more key

# %%
y, w = Y.clone(), torch.ones(64, 1)
y[::8], w[::8] = 9.0, 0.0  # outliers that do not count
node = weft.Node(net := line(), ["x"], ["yhat"])
weighted = weft.Problem([node], [weft.objective(lambda yhat, y, w: w * (yhat - y) ** 2, name="fit")])
quiet(300).fit(weighted, {"x": X, "y": y, "w": w})
figures["row weights"] = off(net)

# %% [markdown]
# ## 7. Two datasets of different lengths, with batches of their own

# %%
net = line()
nodes = [weft.Node(net, [f"{part}.x"], [f"{part}.yhat"], name=part) for part in ("many", "few")]
fit = [weft.objective(lambda yhat, y: (yhat - y) ** 2, part=part, name=part) for part in ("many", "few")]
both = weft.Data({"many": {"x": X, "y": Y}, "few": {"x": X[:10], "y": Y[:10]}}, batch_size={"many": 16, "few": 5})
result = quiet(60).fit(weft.Problem(nodes, fit), both)
figures["two datasets"] = off(net) + abs(result.steps - 60 * 4)

# %% [markdown]
# ## 8. Teacher and student: a moving average that the student is compared with


# %%
class Distilled(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = line()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, batch):
        yhat = self.student(batch["x"])
        return (yhat - batch["y"]).square().mean() + 0.1 * (yhat - self.teacher(batch["x"])).square().mean()


def average(trainer, batch, loss):
    for t, s in zip(trainer.problem.teacher.parameters(), trainer.problem.student.parameters()):
        t.data.lerp_(s.data, 0.05)


quiet(400, hooks={"on_step_end": average}).fit(problem := Distilled(), {"x": X, "y": Y})
figures["teacher"] = off(problem.teacher)

# %% [markdown]
# ## 9. Reinforcement learning: no data, each step plays


# %%
policy = nn.Linear(1, 1)
with quiet(200).start(policy) as run:
    for epoch in run.epochs():
        for _ in range(4):
            state = torch.rand(32, 1)
            reward = -(policy(state) - 2 * state - 0.5).square().mean()
            run.backward(-reward)
            run.step()
figures["rl"] = off(policy)

# %% [markdown]
# ## 10. Five folds, each with a problem of its own

# %%
sgd = lambda params: torch.optim.SGD(params, lr=0.1)
make_problem = lambda: weft.Supervised(line(), nn.MSELoss())
found = weft.cross_validate(make_problem, (X, Y), folds=5, epochs=200, optimizer=sgd, progress=False)
figures["folds"] = max(found.scores)

# %% [markdown]
# ## 11. and 12. Eight seeds: one after the other, and all in one `vmap`


# %%
class Eight(nn.Module):
    """Eight lines as one module: their parameters are stacked, and one call of `vmap` runs all."""

    def __init__(self, nets):
        super().__init__()
        stacked, _ = stack_module_state(nets)
        self.stacked = nn.ParameterDict({k.replace(".", "_"): v.detach() for k, v in stacked.items()})
        self.one = [copy.deepcopy(nets[0]).to("meta")]  # its code alone

    def forward(self, batch):
        run = vmap(lambda params: functional_call(self.one[0], params, batch["x"]))
        return (run(dict(self.stacked)) - batch["y"]).square().mean(dim=(1, 2)).sum()


singles = [line(seed) for seed in range(8)]
stacked = Eight([copy.deepcopy(net) for net in singles])
for net in singles:
    quiet(20).fit(weft.Supervised(net, nn.MSELoss()), (X, Y))
figures["seeds"] = float(torch.stack([net.weight.detach() for net in singles]).std())  # far apart, after 20 steps
quiet(20).fit(stacked, {"x": X, "y": Y})
apart = stacked.stacked["weight"].detach() - torch.stack([net.weight.detach() for net in singles])
figures["seeds at once"] = float(apart.abs().max())

# %% [markdown]
# ## 13. A learning rate finder: the rate grows each step until the loss does

# %%
found = weft.find_lr(weft.Supervised(line(), nn.MSELoss()), (X, Y), low=1e-3, high=100.0, optimizer=sgd)
figures["largest rate"] = found.rates[found.losses.index(min(found.losses))]

found.plot()
plt.show()

# %% [markdown]
# ## 14. Accumulation by hand: four batches, one step

# %%
by_hand, in_one = line(), line()
with quiet(10).start(weft.Supervised(by_hand, nn.MSELoss()), weft.Data((X, Y), batch_size=16)) as run:
    for epoch in run.epochs():
        for batch in run.batches():
            run.backward(run.problem(batch)["loss"] / 4)
        run.step()
quiet(10).fit(weft.Supervised(in_one, nn.MSELoss()), (X, Y))
figures["accumulated"] = float((by_hand.weight - in_one.weight).abs().max().detach())

# %% [markdown]
# ## 15. Validation by another problem

# %%
trained, judge = weft.Supervised(net := line(), nn.MSELoss()), weft.Supervised(net, nn.L1Loss())
result = quiet(5, validation_step=lambda trainer, batch: judge(batch)["loss"]).fit(trained, (X, Y), dev=(X, Y))
measured = float((net(X) - Y).abs().mean().detach())  # the best weights, which are the last
figures["another problem"] = abs(result.history["dev_loss"][-1] - measured)

# %% [markdown]
# ## 16. Classification with accuracy

# %%
labels = (X[:, 0] > 0.2).long()
problem = weft.Supervised(nn.Linear(1, 2), nn.CrossEntropyLoss(), metrics=["accuracy"])
result = quiet(300, rate=1.0).fit(problem, (X, labels))
figures["accuracy"] = result.history["train_accuracy"][-1]

# %%
for task, figure in figures.items():
    print(f"{task:16} {figure:.3g}")
