# %% [markdown]
# # Your own loop in a notebook, with a live plot
#
# `trainer.start` hands you the run; the loop is yours. Below it looks at the data after each epoch, redraws one picture
# in # place, changes the learning rate when progress stalls, and breaks when it is good enough. Best weights, history,
# and # everything else keep working; the stop button ends the block cleanly.

# %%
import os

import matplotlib.pyplot as plt
import torch

import weft

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.manual_seed(0)
torch.set_num_threads(1)

net = torch.nn.Sequential(
    torch.nn.Linear(1, 48), torch.nn.Tanh(), torch.nn.Linear(48, 48), torch.nn.Tanh(), torch.nn.Linear(48, 1)
)
problem = weft.Problem(
    [weft.Node(net, ["x"], ["y"], name="net")],
    objectives=[weft.objective(lambda y, target: (y - target).square(), name="fit")],
)


def truth(x):
    return torch.sin(6 * x) * torch.exp(-x)


x = torch.rand(400, 1)
noisy = weft.DictDataset({"x": x, "target": truth(x) + 0.05 * torch.randn(400, 1)})
grid = torch.linspace(0, 1, 101)[:, None]
dev = weft.DictDataset({"x": grid, "target": truth(grid)})

# %% [markdown]
# ## The picture
#
# In a notebook one output is updated in place; in a script nothing is shown until the end.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
plt.close(figure)  # shown by hand
try:
    from IPython import display, get_ipython

    shown = display.display(figure, display_id=True) if get_ipython() else None
except ImportError:
    shown = None


def redraw(run):
    left.clear()
    right.clear()
    for split in ("train", "dev"):
        left.semilogy(run.history.values[f"{split}_loss"], label=split)
    left.set(xlabel="epoch", ylabel="mean squared error")
    left.legend(loc="upper right")
    right.plot(grid, truth(grid), color="0.7", linewidth=4, label="truth")
    right.plot(grid, net(grid).detach(), "k--", label=f"epoch {len(run.history.values['dev_loss'])}")
    right.set(xlabel="x", ylabel="y", ylim=(-0.8, 1.0))
    right.legend(loc="upper right")
    if shown is not None:
        shown.update(figure)


# %%
GOOD, MAX_EPOCHS = 1.5e-4, 10 if SMALL else 400
trainer = weft.Trainer(
    epochs=MAX_EPOCHS, optimizer=lambda params: torch.optim.AdamW(params, lr=5e-3), progress=False, seed=0
)
with trainer.start(problem, weft.Data(noisy, dev, batch_size=50)) as run:
    for epoch in run.epochs():
        for batch in run.batches("train"):
            loss = problem(batch)["train_loss"]
            run.backward(loss)
            run.step()
        error = run.evaluate("dev")["dev_loss"]
        if epoch % 20 == 19:
            trainer.optimizer.param_groups[0]["lr"] *= 0.8
            redraw(run)
        if error < GOOD:
            run.stop("good enough")
            break
print(run.result)
redraw(run)
if shown is None:
    plt.figure(figure)
    plt.show()

# %%
final = trainer.validate()["dev_loss"]
figures = {
    "dev_loss": final,
    "epochs": run.result.epochs,
    "stop_reason": run.result.stop_reason,
    "best": run.result.best_metric,
}
