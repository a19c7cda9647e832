"""The same module, the same seed: losses, weights and metrics equal those of lightning.pytorch.Trainer bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, GradientAccumulationScheduler
from lightning.pytorch.demos.boring_classes import (
    BoringDataModule,
    BoringDataModuleNoLen,
    BoringModel,
    DemoModel,
    ManualOptimBoringModel,
    RandomDataset,
)
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.helpers.bitwise import same, weights
from tests.helpers.lightning_tools import LIGHTNING_WARNINGS, both, weft_trainer
from weft.devices.seeding import seed_everything

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]


class Recorded:
    """Keeps every loss and learning rate of training; a base in front of the module's own class."""

    losses: list[float]
    rates: list[float]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        vars(self).setdefault("losses", []).append(outputs["loss"].item() if outputs else None)
        trainer = vars(self)["_trainer"]
        vars(self).setdefault("rates", []).append([g["lr"] for o in trainer.optimizers for g in o.param_groups])


def recorded(base: type) -> type:
    return type(base.__name__, (Recorded, base), {})


def series(n: int, width: int = 4, seed: int = 0) -> TensorDataset:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sin().sum(1, keepdim=True))


def series_loader(n: int = 26, batch_size: int = 4, shuffle: bool = True, seed: int = 0) -> DataLoader:
    return DataLoader(series(n, seed=seed), batch_size=batch_size, shuffle=shuffle)


class Training(pl.LightningModule):
    """A small network with dropout (it draws random numbers) and a loss that is logged in several ways."""

    def __init__(self, optimizer: Callable[..., Any] = torch.optim.Adam, lr: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"largest": y.max(), "plain": 3.0}, on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def configure_optimizers(self) -> Any:
        return self.hparams["optimizer"](self.parameters(), lr=self.hparams["lr"])


class RegressionModule(Training):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))


def regression_fit(**data: Any) -> tuple[Any, dict[str, Any]]:
    loaders = {"train_dataloaders": series_loader(), "val_dataloaders": series_loader(10, 3, shuffle=False, seed=1)}
    return recorded(RegressionModule)(), {**loaders, **data}


class Scheduled(RegressionModule):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedulers = torch.optim.lr_scheduler
        return [optimizer], [
            {"scheduler": schedulers.ExponentialLR(optimizer, 0.97), "interval": "step", "frequency": 2},
            {"scheduler": schedulers.StepLR(optimizer, 1, 0.8), "interval": "epoch", "frequency": 2},
            {"scheduler": schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.7), "monitor": "val_loss"},
        ]


class OneCycle(RegressionModule):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        steps = self.trainer.estimated_stepping_batches
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class TwoValidationSets(RegressionModule):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("val_loss", loss, on_step=True, on_epoch=True)
        self.log(f"own_{dataloader_idx}", loss, add_dataloader_idx=False)

    def on_validation_epoch_end(self) -> None:
        self.log("n", 2.0)


class Nested(RegressionModule):
    """Batches that are dicts of tuples and lists; a dict is returned, with further keys."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, (y, extra) = batch["x"], batch["rest"]
        loss = F.mse_loss(self.net(x), y) + extra["c"].mean()
        self.log("loss", loss)
        return {"loss": loss, "further": loss.detach() * 2}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch["x"]), batch["rest"][0]))


def nested_collate(rows: list[Any]) -> Any:
    x, y = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
    return {"x": x, "rest": (y, {"c": y * 0.1, "name": ["a"] * len(rows)})}


def nested_batches() -> tuple[Any, dict[str, Any]]:
    made = [DataLoader(series(14), batch_size=4, shuffle=s, collate_fn=nested_collate) for s in (True, False)]
    return recorded(Nested)(), {"train_dataloaders": made[0], "val_dataloaders": made[1]}


class Noise(IterableDataset):
    """Data without a length that draws from the global random state, like the dropout of the network."""

    def __iter__(self) -> Any:
        for _ in range(18):
            x = torch.randn(4)
            yield x, x.sin().sum(0, keepdim=True)


class Batches:
    """An iterable of batches that is no DataLoader."""

    def __iter__(self) -> Any:
        return iter(list(series_loader(12)))


class TwoParts(RegressionModule):
    """A backbone that a callback freezes at first, and later adds to the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.net = nn.Sequential(self.backbone, nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def workers() -> DataLoader:
    return DataLoader(series(20), batch_size=4, shuffle=True, num_workers=1, multiprocessing_context="fork")


class GanModule(pl.LightningModule):
    """Two optimizers that take turns, as in Lightning's example; each is toggled, their schedulers are stepped here."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0]
        opt_g, opt_d = self.optimizers()
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        loss = F.binary_cross_entropy_with_logits
        self.toggle_optimizer(opt_g)
        g_loss = loss(self.discriminator(self.generator(torch.randn(len(real), 3))), ones)
        self.log("g_loss", g_loss, prog_bar=True)
        opt_g.zero_grad()
        self.manual_backward(g_loss)
        self.clip_gradients(opt_g, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        opt_g.step()
        self.untoggle_optimizer(opt_g)
        with opt_d.toggle_model():
            fake = self.generator(torch.randn(len(real), 3)).detach()
            d_loss = (loss(self.discriminator(real), ones) + loss(self.discriminator(fake), zeros)) / 2
            self.log("d_loss", d_loss, on_epoch=True)
            opt_d.zero_grad()
            self.manual_backward(d_loss)
            opt_d.step()
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=0.01, betas=(0.5, 0.999))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=0.01)
        return [opt_g, opt_d], [torch.optim.lr_scheduler.StepLR(opt_d, 3)]


class ManualClosures(RegressionModule):
    """Manual optimization with closures, and gradients that are collected over two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()

        def closure() -> Any:
            loss = super(ManualClosures, self).training_step(batch, batch_idx)
            self.manual_backward(loss / 2)
            return loss

        if batch_idx % 2:
            optimizer.step(closure=closure)
            optimizer.zero_grad()
        else:
            closure()


class Digits(pl.LightningModule):
    """scikit-learn's digits with torchmetrics, as objects and as values."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 10))
        self.train_accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)
        self.val_metrics = torchmetrics.MetricCollection(
            [
                torchmetrics.Accuracy(task="multiclass", num_classes=10),
                torchmetrics.F1Score(task="multiclass", num_classes=10, average="macro"),
            ],
            prefix="val_",
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x)
        self.train_accuracy(logits, y)
        self.log("train_accuracy", self.train_accuracy, on_step=True, on_epoch=True)
        return F.cross_entropy(logits, y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.val_metrics.update(logits, batch[1])
        self.log_dict(self.val_metrics)
        self.log("val_loss", F.cross_entropy(logits, batch[1]), prog_bar=True, batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class DigitsData(pl.LightningDataModule):
    def prepare_data(self) -> None:
        from sklearn.datasets import load_digits

        load_digits()

    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        full = TensorDataset(torch.tensor(x[:300] / 16, dtype=torch.float32), torch.tensor(y[:300]))
        self.train, self.val = torch.utils.data.random_split(full, [240, 60])

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, batch_size=32)


def text(path: Path) -> None:
    """A text in place of the one that the demo language models download; they take it if it is there."""
    path.parent.mkdir(exist_ok=True)
    words = [f"w{i * i % 37}" for i in range(1000)]
    path.write_text("\n".join(" ".join(words[i : i + 20]) for i in range(0, 1000, 20)))


def transformer() -> tuple[Any, dict[str, Any]]:
    text(Path("data/wikitext-2.txt"))
    module = recorded(LightningTransformer)(vocab_size=40)
    module.model = Transformer(vocab_size=40, ninp=8, nhead=2, nhid=8, nlayers=1)
    return module, {}


def lstm() -> tuple[Any, dict[str, Any]]:
    text(Path("data/wikitext-2.txt"))
    module = recorded(LightningLSTM)(vocab_size=40)
    module.model = SimpleLSTM(vocab_size=40, ninp=8, nhid=8, nlayers=2)
    return module, {}


class Skipping(RegressionModule):
    """Some steps return None, one epoch is cut short, one hook changes the gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 3 == 1 else loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if self.current_epoch == 1 and batch_idx == 3 else None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad *= 0.5


class OwnSteps(RegressionModule):
    """Its own optimizer_step (a warmup), zero_grad, clipping, backward and scheduler step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min(1.0, (self.trainer.global_step + 1) / 5)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.2, gradient_clip_algorithm="norm")

    def backward(self, loss: Any) -> None:
        loss.backward(retain_graph=True)


class Frozen(RegressionModule):
    """A part stays in eval mode, a parameter without gradient, a buffer that is counted up."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2].eval()
        self.net[0].bias.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen += len(batch[0])


class Transferred(RegressionModule):
    """Hooks on the way of a batch; one draws random numbers."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 1.5, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] + 0.01 * torch.randn_like(batch[0]), batch[1]) if self.trainer.training else batch


class PerPart(Training):
    """Two loaders at once: the batch is a dict; the shorter one starts over."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)


def per_part(mode: str | None = None) -> tuple[Any, dict[str, Any]]:
    given: Any = {"a": series_loader(12), "b": series_loader(26, 5)}
    return recorded(PerPart)(), {"train_dataloaders": CombinedLoader(given, mode) if mode else given}


def lbfgs_module(**options: Any) -> Callable[[], Any]:
    return lambda: (recorded(Training)(functools.partial(torch.optim.LBFGS, max_iter=4, **options), 0.5), no_val())


def no_val() -> dict[str, Any]:
    return {"train_dataloaders": series_loader(20, 10)}


def boring(kind: type, datamodule: Any = None) -> Callable[[], Any]:
    return lambda: (recorded(kind)(), {"datamodule": datamodule()} if datamodule else {})


def demo() -> Any:
    return recorded(DemoModel)(out_dim=3), {"train_dataloaders": DataLoader(RandomDataset(32, 12), batch_size=4)}


TWO = {
    "val_dataloaders": lambda: [series_loader(6, 3, shuffle=False, seed=2), series_loader(9, 4, shuffle=False, seed=3)]
}
MODULES: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], dict[str, Any]]] = {
    "boring": (boring(BoringModel), {}),
    "boring with a data module": (boring(BoringModel, BoringDataModule), {}),
    "boring, data without length": (boring(BoringModel, BoringDataModuleNoLen), {"max_epochs": 1}),
    "boring, manual": (boring(ManualOptimBoringModel), {}),
    "demo": (demo, {}),
    "transformer": (transformer, {"max_epochs": 1}),
    "LSTM": (lstm, {"max_epochs": 1}),
    "regression": (regression_fit, {}),
    "accumulation with a short tail": (regression_fit, {"accumulate_grad_batches": 3}),
    "clipping by norm": (regression_fit, {"gradient_clip_val": 0.3}),
    "clipping by value": (regression_fit, {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}),
    "schedulers by step, epoch and monitor": (lambda: (recorded(Scheduled)(), regression_fit()[1]), {"max_epochs": 4}),
    "schedulers while accumulating": (
        lambda: (recorded(Scheduled)(), regression_fit()[1]),
        {"max_epochs": 3, "accumulate_grad_batches": 2},
    ),
    "one cycle over the estimated steps": (
        lambda: (recorded(OneCycle)(), regression_fit()[1]),
        {"max_epochs": 3, "accumulate_grad_batches": 2},
    ),
    "two validation loaders": (
        lambda: (
            recorded(TwoValidationSets)(),
            {"train_dataloaders": series_loader(), **{k: v() for k, v in TWO.items()}},
        ),
        {},
    ),
    "nested batches": (nested_batches, {}),
    "iterable data": (lambda: regression_fit(train_dataloaders=DataLoader(Noise(), batch_size=4)), {}),
    "any iterable of batches": (lambda: regression_fit(train_dataloaders=Batches()), {}),
    "torchmetrics on digits": (lambda: (recorded(Digits)(), {"datamodule": DigitsData()}), {}),
    "LBFGS": (lbfgs_module(), {}),
    "LBFGS with line search": (lbfgs_module(line_search_fn="strong_wolfe"), {"gradient_clip_val": 0.5}),
    "64-bit": (regression_fit, {"precision": "64-true"}),
    "64-bit, data made in the run": (boring(BoringModel), {"precision": "64-true"}),
    "bf16-mixed": (regression_fit, {"precision": "bf16-mixed"}),
    "GAN with two optimizers": (lambda: (GanModule(), {"train_dataloaders": series_loader(16)}), {"max_epochs": 3}),
    "manual closures": (lambda: (ManualClosures(), regression_fit()[1]), {}),
    "steps that are left out": (lambda: (recorded(Skipping)(), regression_fit()[1]), {"max_epochs": 3}),
    "its own optimizer_step, clipping, backward": (lambda: (recorded(OwnSteps)(), regression_fit()[1]), {}),
    "frozen parts": (lambda: (recorded(Frozen)(), regression_fit()[1]), {}),
    "hooks on the way of a batch": (lambda: (recorded(Transferred)(), regression_fit()[1]), {}),
    "two training loaders": (per_part, {}),
    "two training loaders, min_size": (lambda: per_part("min_size"), {}),
    "accumulation that grows": (
        regression_fit,
        {"callbacks": lambda: [GradientAccumulationScheduler({0: 1, 1: 3})], "max_epochs": 3},
    ),
    "a backbone that joins later": (
        lambda: (recorded(TwoParts)(), regression_fit()[1]),
        {"callbacks": lambda: [BackboneFinetuning(1)], "max_epochs": 3},
    ),
    "averaged weights": (regression_fit, {"callbacks": lambda: [EMAWeightAveraging(decay=0.8)], "max_epochs": 3}),
    "with a sanity check": (regression_fit, {"num_sanity_val_steps": 2}),
    "torchmetrics, with a sanity check": (
        lambda: (recorded(Digits)(), {"datamodule": DigitsData()}),
        {"num_sanity_val_steps": 2},
    ),
    "worker processes": (lambda: regression_fit(train_dataloaders=workers()), {}),
    "at most so many steps": (lambda: (recorded(Training)(), no_val()), {"max_steps": 5, "max_epochs": 5}),
}


@pytest.mark.parametrize("name", MODULES)
def test_losses_weights_and_metrics_equal_lightnings_bit_for_bit(name: str) -> None:
    make, options = MODULES[name]
    theirs, their_trainer, ours, _ = both(make, **{"max_epochs": 2, **options})
    assert same(getattr(ours, "losses", None), getattr(theirs, "losses", None))
    assert getattr(ours, "rates", None) == getattr(theirs, "rates", None)
    assert same(weights(ours), weights(theirs))
    assert ours.trainer.global_step == their_trainer.global_step
    assert ours.trainer.current_epoch == their_trainer.current_epoch
    for metrics in ("callback_metrics", "logged_metrics"):
        ours_, theirs_ = dict(getattr(ours.trainer, metrics)), dict(getattr(their_trainer, metrics))
        assert same(dict(sorted(ours_.items())), dict(sorted(theirs_.items()))), metrics
    assert {k: v for k, v in ours.trainer.progress_bar_metrics.items()} == their_trainer.progress_bar_metrics
    states = [
        {str(k): v for k, v in t.optimizers[0].state_dict()["state"].items()} for t in (ours.trainer, their_trainer)
    ]
    assert same(*states)


@pytest.mark.parametrize("name", MODULES)
def test_the_comparison_can_fail(name: str) -> None:
    make, options = MODULES[name]
    trained = []
    for seed in (3, 4):
        seed_everything(seed)
        module, data = make()
        chosen = {k: v() if k == "callbacks" else v for k, v in options.items() if k != "num_sanity_val_steps"}
        weft_trainer(**{"max_epochs": 1, **chosen, "max_steps": 2}).fit(module, **data)
        trained.append(weights(module))
    assert not same(*trained)


def test_history_holds_what_lightning_would_have_told_its_callbacks() -> None:
    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.end = {k: float(v) for k, v in trainer.callback_metrics.items()}

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    watchers: list[Watch] = []

    def watch() -> list[Any]:
        watchers.append(Watch())
        return [watchers[-1]]

    *_, our_trainer = both(regression_fit, max_epochs=3, callbacks=watch)
    history, (theirs, ours) = our_trainer.run.history.values, watchers
    assert theirs.seen == ours.seen
    for name in ("loss", "val_loss", "largest", "plain"):
        assert history[name] == [*(seen[name] for seen in theirs.seen[1:]), theirs.end[name]]
