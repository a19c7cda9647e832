"""Trains in two processes: `python -m tests.helpers.twin_processes lightning|weft STRATEGY WAY FOLDER`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from lightning.pytorch import callbacks as cb
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F

from tests.helpers.twin_modules import QUIET, class_loader
from weft.integrations.lightning import Trainer

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "manual": {},
    "accumulated": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "to a step": {"max_steps": 5, "max_epochs": -1},
    "synchronised": {"sync_batchnorm": False, "use_distributed_sampler": True, "num_sanity_val_steps": 0},
}


class Shared(pl.LightningModule):
    """Batch norm, a metric object, values summed over processes and values of one, gathered tensors."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.automatic_optimization = not by_hand
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=2)

    def prepare_data(self) -> None:
        with Path("prepared").open("a") as file:
            file.write("once\n")

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("own", loss, on_epoch=True)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        out = self(batch[0])
        self.accuracy(out, batch[1])
        self.log("accuracy", self.accuracy)
        self.log("val_loss", F.cross_entropy(out, batch[1]), sync_dist=True)
        self.log("gathered", self.all_gather(out).sum())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train_in_processes(who: str, strategy: str, way: str, folder: str) -> None:
    """Train, validate and test; the first process writes what it has to `FOLDER/out.pt`."""
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    os.chdir(folder)
    pl.seed_everything(3, verbose=False)
    kind: Any = pl.Trainer if who == "lightning" else Trainer
    saves = [cb.ModelCheckpoint(monitor="val_loss", save_last=True), cb.LearningRateMonitor()]
    options = {**QUIET, "max_epochs": 2, "log_every_n_steps": 1, "logger": CSVLogger("."), **WAYS[way]}
    trainer, module = kind(devices=2, strategy=strategy, callbacks=saves, **options), Shared(way == "manual")
    data = class_loader(28, shuffle=True), class_loader(10, 1)
    trainer.fit(module, *data)
    found = [trainer.current_epoch, trainer.global_step, dict(trainer.callback_metrics)]
    found += [trainer.validate(module, data[1], verbose=False)]
    found += [trainer.test(module, class_loader(11, 2), ckpt_path="best", verbose=False)]
    if trainer.is_global_zero and os.environ.get("LOCAL_RANK", "0") == "0":
        torch.save({"weights": module.state_dict(), "found": found, "processes": trainer.world_size}, "out.pt")


if __name__ == "__main__":
    train_in_processes(*sys.argv[1:])
