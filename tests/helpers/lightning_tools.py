"""What the tests of Lightning modules share: the same module trained by Lightning's Trainer and by weft's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import weft
from weft.devices.seeding import seed_everything

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
TRANSLATED = {
    "max_epochs": "epochs",
    "accumulate_grad_batches": "accumulate",
    "gradient_clip_val": "clip",
    "gradient_clip_algorithm": "clip_algorithm",
    "check_val_every_n_epoch": "validate_every",
    "callbacks": "hooks",
}
# What Lightning warns about on a small machine; warnings of weft stay errors.
LIGHTNING_WARNINGS = (
    r"ignore:The `srun` command is available on your system but is not used.*",
    r"ignore:.*does not have many workers.*",
    r"ignore:.*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r"ignore:.*Trying to infer the `batch_size` from an ambiguous collection.*",
    r"ignore:.*You defined a `validation_step` but have no `val_dataloader`.*",
    r"ignore:.*`training_step` returned `None`.*",
    r"ignore:.*You have overridden `.*` in .*",
    r"ignore:.*Found .* module\(s\) in eval mode at the start of training.*",
)


def both(make: Callable[[], tuple[Any, dict[str, Any]]], seed: int = 3, **options: Any) -> tuple[Any, Any, Any, Any]:
    """(Lightning's module and trainer, weft's module and trainer) after a fit by each, from the same seed.

    `make` gives the module and the keywords of `fit`. `options` are named as Lightning names them.
    """
    trained = []
    for use in (lightning_trainer, weft_trainer):
        seed_everything(seed)
        module, data = make()
        chosen = {k: v() if k == "callbacks" else v for k, v in options.items()}
        trainer = use(**chosen)
        trainer.fit(module, **data)
        trained += [module, trainer]
    return tuple(trained)


def lightning_trainer(**options: Any) -> pl.Trainer:
    """Lightning's Trainer, quiet and on the CPU."""
    return pl.Trainer(**{**QUIET, **options})


def weft_trainer(**options: Any) -> weft.Trainer:
    """weft's Trainer with the same options."""
    options = {TRANSLATED.get(k, k): v for k, v in options.items() if k != "num_sanity_val_steps"}
    return weft.Trainer(**{"accelerator": "cpu", "progress": False, **options})


class LineModule(pl.LightningModule):
    """A line through points; everything that it does not need is left out."""

    def __init__(self, lr: float = 0.1, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, width)

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[1]), prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"test_loss": F.mse_loss(self(batch[0]), batch[1]), "rows": float(len(batch[0]))})

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


def point_loader(n: int, seed: int = 0) -> DataLoader:
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True) + 0.1), batch_size=4)


def loaders() -> dict[str, Any]:
    return {"train_dataloaders": point_loader(16), "val_dataloaders": point_loader(10, 1)}


def line(**kwargs: Any) -> LineModule:
    seed_everything(0)
    return LineModule(**kwargs)
