# %% [markdown]
# # A GAN: two optimizers that take turns
#
# The generator turns noise into samples, the discriminator tells them from real ones. Each has its optimizer, and they
# step # in turn, so the update is written out: `self.backward(loss)` and `self.step("name")` are its tools. Real
# samples come # from two Gaussians, so the distance between both distributions can be measured (Wasserstein distance,
# scipy).

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch.nn.functional import softplus

import weft

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.manual_seed(0)
torch.set_num_threads(1)


def mlp(inputs):
    linear, act = torch.nn.Linear, torch.nn.LeakyReLU
    return torch.nn.Sequential(linear(inputs, 32), act(0.2), linear(32, 32), act(0.2), linear(32, 1))


class GAN(torch.nn.Module):
    """Two networks; there is no loss to call it for, `update` knows both."""

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = mlp(4), mlp(1)

    def forward(self, batch):
        return {"sample": self.generator(batch["noise"])}


def real(n, seed):
    g = torch.Generator().manual_seed(seed)
    centre = torch.where(torch.rand(n, 1, generator=g) < 0.4, -1.5, 1.0)
    return centre + 0.4 * torch.randn(n, 1, generator=g)


def noise(n, seed):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


# %% [markdown]
# ## The update
#
# Non-saturating losses with a penalty on the discriminator's gradient at real samples (R1, arXiv:1801.04406). What is
# returned is logged by name.


# %%
class GANTrainer(weft.Trainer):
    def update(self, batch):
        gan, sample = self.problem, batch["sample"].clone().requires_grad_()
        fake = gan.generator(torch.randn(len(sample), 4))
        score = gan.discriminator(sample)
        slope = torch.autograd.grad(score.sum(), sample, create_graph=True)[0]
        told = softplus(-score).mean() + softplus(gan.discriminator(fake.detach())).mean()
        self.backward(told + 0.02 * slope.square().mean())
        self.step("discriminator")

        fooled = softplus(-gan.discriminator(gan.generator(torch.randn(len(sample), 4)))).mean()
        self.backward(fooled)
        self.step("generator")
        return {"train_discriminator": told, "train_generator": fooled, "train_loss": fooled}


def adam(rate):
    return lambda params: torch.optim.Adam(params, lr=rate, betas=(0.5, 0.99))


def to_zero(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)


dev, held_out = ({"sample": real(20_000, seed), "noise": noise(20_000, seed + 1)} for seed in (5, 7))


def distance(gan, batch):
    with torch.no_grad():
        return wasserstein_distance(batch["sample"][:, 0], gan.generator(batch["noise"])[:, 0])


# %% [markdown]
# No loss says which weights are best, so the distance itself is what a validation step returns, and what is monitored.
# Other # samples, held out, tell how good they are. The 2048 samples that it learns from are themselves not quite the
# distribution: # their distance to it is as near as one can hope to come.


# %%
def validation_step(trainer, batch):
    return {"distance": torch.tensor(distance(trainer.problem, batch))}


problem, epochs = GAN(), 3 if SMALL else 1200
untrained = distance(problem, held_out)
trainer = GANTrainer(
    epochs=epochs,
    seed=0,
    progress=False,
    monitor_metric="dev_distance",
    validation_step=validation_step,
    optimizer={"generator": adam(1e-3), "discriminator": adam(2e-3)},
    scheduler={"generator": to_zero, "discriminator": to_zero},
)
sizes = {"train": 64 if SMALL else 512, "dev": 20_000}
result = trainer.fit(
    problem, weft.Data(weft.DictDataset({"sample": real(2048, 1)}), weft.DictDataset(dev), batch_size=sizes)
)
print(result)
trained = distance(problem, held_out)
floor = wasserstein_distance(real(2048, 1)[:, 0], held_out["sample"][:, 0])
print(f"Wasserstein distance to held-out real samples: {untrained:.3f} before, {trained:.3f} after")
print(
    f"of the samples it learned from: {floor:.3f}; "
    f"standard deviation of the real ones: {float(held_out['sample'].std()):.3f}"
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name in ("train_discriminator", "train_generator", "dev_distance"):
    left.plot(result.history[name], label=name.split("_")[1])
left.set(xlabel="epoch", ylabel="losses; Wasserstein distance")
left.legend(fontsize="small", loc=(0.62, 0.64))
bins = np.linspace(-3.5, 3, 60)
right.hist(held_out["sample"][:, 0].numpy(), bins, density=True, alpha=0.4, label="real")
right.hist(
    trainer.predict({"noise": held_out["noise"]})["sample"][:, 0].numpy(),
    bins,
    density=True,
    histtype="step",
    color="k",
    label="generated",
)
right.set(xlabel="value", ylabel="density")
right.legend(fontsize="small")
plt.show()

# %%
figures = {
    "distance_before": float(untrained),
    "distance_after": float(trained),
    "distance_of_training_samples": float(floor),
    "standard_deviation": float(held_out["sample"].std()),
}
