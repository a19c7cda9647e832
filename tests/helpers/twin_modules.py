"""Modules in the styles of public code, for scripts that two trainers run (`tests.helpers.twins`)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def two_classes(n: int = 24, seed: int = 0) -> TensorDataset:
    """`n` points in eight dimensions, of one of two classes."""
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1) > 0).long())


def class_loader(n: int = 24, seed: int = 0, **options: Any) -> DataLoader:
    """Batches of four of them."""
    return DataLoader(two_classes(n, seed), **{"batch_size": 4, **options})


class NoLength(IterableDataset):
    """Nine points, without a length."""

    def __iter__(self) -> Any:
        for number in range(9):
            yield torch.randn(8), torch.tensor(number % 2)


class Data(pl.LightningDataModule):
    """The data of `Classifier`, with notes of what was called."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.notes: list[Any] = []

    def prepare_data(self) -> None:
        self.notes.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.notes.append(("setup", stage))
        self.parts = [two_classes(22), two_classes(10, 1), two_classes(9, 2)]

    def train_dataloader(self) -> Any:
        return DataLoader(self.parts[0], batch_size=self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.parts[1], batch_size=4)

    def test_dataloader(self) -> Any:
        return DataLoader(self.parts[2], batch_size=4)

    def predict_dataloader(self) -> Any:
        return [DataLoader(self.parts[2], batch_size=4), DataLoader(self.parts[1], batch_size=4)]

    def state_dict(self) -> dict[str, Any]:
        return {"of": "data"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.notes.append(state_dict)

    def teardown(self, stage: str) -> None:
        self.notes.append(("teardown", stage))


class Classifier(pl.LightningModule):
    """Batch norm, dropout, metric objects, every way of `self.log`, and six ways to schedule."""

    def __init__(self, lr: float = 0.01, schedule: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))
        kind: dict[str, Any] = {"task": "multiclass", "num_classes": 2}
        self.accuracy, self.val_accuracy = torchmetrics.Accuracy(**kind), torchmetrics.Accuracy(**kind)
        both = {"f1": torchmetrics.F1Score(**kind), "precision": torchmetrics.Precision(**kind)}
        self.collection = torchmetrics.MetricCollection(both, prefix="val/")

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def shared(self, batch: Any) -> tuple[Any, Any]:
        out = self(batch[0])
        return F.cross_entropy(out, batch[1]), out

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, out = self.shared(batch)
        self.accuracy(out, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True, prog_bar=True)
        rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        self.log_dict({"train_loss": loss, "lr": rate}, prog_bar=True)
        self.log("quiet", loss, logger=False, on_epoch=True)
        return {"loss": loss, "out": out.detach()}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss, out = self.shared(batch)
        self.val_accuracy.update(out, batch[1])
        self.collection(out, batch[1])
        self.log("val_loss", loss, sync_dist=True, prog_bar=True)
        self.log("val_steps", loss, on_step=True, on_epoch=True)
        self.log("val_accuracy", self.val_accuracy)
        self.log_dict(self.collection, on_epoch=True)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss, out = self.shared(batch)
        self.log("test_loss", loss)
        return out

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        if self.hparams["schedule"] == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), max_iter=3)
        optimizer, named = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"]), self.hparams["schedule"]
        schedules = torch.optim.lr_scheduler
        if named == "step":
            return [optimizer], [schedules.StepLR(optimizer, 1, 0.5)]
        if named == "plateau":
            plateau = schedules.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        if named == "plateau by step":
            config = {"monitor": "train_loss", "interval": "step", "frequency": 2}
            config |= {"scheduler": schedules.ReduceLROnPlateau(optimizer, patience=0)}
            return {"optimizer": optimizer, "lr_scheduler": config}
        if named == "one cycle":
            total = int(self.trainer.estimated_stepping_batches)
            cycle = schedules.OneCycleLR(optimizer, 0.1, total_steps=total)
            return [optimizer], [{"scheduler": cycle, "interval": "step", "name": "cycle"}]
        return optimizer


class Adversaries(pl.LightningModule):
    """Two networks that take turns, by manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.judge = nn.Linear(3, 8), nn.Linear(8, 1)
        self.register_buffer("fixed", torch.randn(2, 3))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        of_maker, of_judge = self.optimizers()  # type: ignore[misc]
        noise = torch.randn(len(batch[0]), 3)
        self.toggle_optimizer(of_maker)
        loss = F.softplus(-self.judge(self.maker(noise))).mean()
        self.log("maker", loss, prog_bar=True)
        self.manual_backward(loss)
        self.clip_gradients(of_maker, 0.5, "norm")
        of_maker.step()
        of_maker.zero_grad()
        self.untoggle_optimizer(of_maker)
        fake, real = self.judge(self.maker(noise).detach()), self.judge(batch[0])
        loss = F.softplus(fake).mean() + F.softplus(-real).mean()
        self.log("judge", loss, on_epoch=True)
        of_judge.zero_grad()
        self.manual_backward(loss)
        of_judge.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def on_validation_epoch_end(self) -> None:
        for logger in self.loggers:
            logger.log_metrics({"drawn": float(self.maker(self.fixed).sum())}, step=self.global_step)

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        of_maker, of_judge = torch.optim.Adam(self.maker.parameters()), torch.optim.Adam(self.judge.parameters())
        return [of_maker, of_judge], [torch.optim.lr_scheduler.StepLR(of_maker, 1)]


class Thorough(Classifier):
    """Overrides what can be overridden around a step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if self.current_epoch == 1 and batch_idx == 2 else None

    def optimizer_step(self, epoch: Any, batch_idx: Any, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:  # a warm-up by hand
            group["lr"] = 0.001 * min(1 + self.trainer.global_step, 5)
        optimizer.step(closure=optimizer_closure)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, kwargs["gradient_clip_val"], kwargs["gradient_clip_algorithm"])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("norm", sum(p.grad.norm() for p in self.parameters() if p.grad is not None))

    def optimizer_zero_grad(self, epoch: Any, batch_idx: Any, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["mine"] = 3

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]

    def configure_callbacks(self) -> Any:
        return [pl.callbacks.EarlyStopping("val_loss"), pl.callbacks.ModelCheckpoint(monitor="val_loss")]

    def on_train_epoch_end(self) -> None:
        self.log("of the epoch", torch.tensor(3.0))

    def on_validation_epoch_end(self) -> None:
        self.log("of the validation", 2.0, prog_bar=True)


class Logs(BoringModel):
    """Logs wherever one may, also under names of columns and by the logger itself; some of its weights are hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = [nn.Linear(2, 2)]

    def on_train_start(self) -> None:
        self.log("start", 1.0)

    def on_train_epoch_start(self) -> None:
        self.log("time", 2.0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("batch", batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.outside[0](self.layer(batch)).sum()
        self.log("a/b", loss, on_step=True, on_epoch=True, batch_size=3, reduce_fx="min")
        self.logger.log_metrics({"own": float(loss.detach())}, step=self.global_step)  # type: ignore[union-attr]
        self.logger.experiment.log_metrics({"raw": 1.0}, step=5)  # type: ignore[union-attr]
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.log("largest", args[-1], on_epoch=True, reduce_fx="max")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("step", torch.tensor(10.0 * self.current_epoch))

    def on_validation_batch_end(self, *args: Any) -> None:
        self.log("sum", float(args[2]), reduce_fx=torch.sum)


class Order(Callback):
    """Every hook that is called, and what the trainer says at that moment."""

    def __init__(self) -> None:
        self.calls: list[Any] = []


def _noting(name: str) -> Any:
    def note(self: Order, trainer: Any, *args: Any, **kwargs: Any) -> None:
        stepped, stage = trainer.fit_loop.epoch_loop._batches_that_stepped, str(trainer.state.stage)
        self.calls.append((name, trainer.current_epoch, trainer.global_step, stage, trainer.is_last_batch, stepped))

    return note


for _name in dir(Callback):
    if _name.startswith("on_") and "checkpoint" not in _name or _name in ("setup", "teardown"):
        setattr(Order, _name, _noting(_name))
