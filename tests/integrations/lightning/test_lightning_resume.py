"""A LightningModule's run that was killed goes on and ends bit for bit where the uninterrupted one does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, random_split

import weft
from tests.helpers.bitwise import same, weights
from tests.helpers.crashes import in_child
from tests.helpers.lightning_tools import LIGHTNING_WARNINGS
from weft.devices.seeding import seed_everything

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]


class NetModule(pl.LightningModule):
    """Dropout, a metric over the epoch, schedulers of all kinds, values logged over the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
        self.error = torchmetrics.MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        predicted = self.net(x)
        loss = F.mse_loss(predicted, y)
        self.error(predicted, y)
        self.log("error", self.error, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        schedulers = torch.optim.lr_scheduler
        return [optimizer], [
            {"scheduler": schedulers.ExponentialLR(optimizer, 0.97), "interval": "step"},
            {"scheduler": schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.7), "monitor": "val_loss"},
        ]


class TwoOptimizers(NetModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = (self.net[0], self.net[3])
        return [torch.optim.Adam(part.parameters(), lr=0.01 * (i + 1)) for i, part in enumerate(parts)]


class Draws(IterableDataset):
    def __iter__(self) -> Any:
        for _ in range(21):
            x = torch.randn(3)
            yield x, x.sum(0, keepdim=True)


class RandomSplits(pl.LightningDataModule):
    """Everything draws random numbers: the split, the order, the loaders themselves."""

    def __init__(self, own_generator: bool = False) -> None:
        super().__init__()
        self.own_generator = own_generator

    def setup(self, stage: str) -> None:
        x = torch.randn(30, 3)
        self.train, self.val = random_split(TensorDataset(x, x.sin().sum(1, keepdim=True)), [22, 8])

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(5) if self.own_generator else None
        return DataLoader(self.train, batch_size=4, shuffle=True, generator=generator)

    def val_dataloader(self) -> Any:
        torch.randn(3)
        return [DataLoader(self.val, batch_size=4)][0]


class TwoLoaders(RandomSplits):
    """The shorter one starts over within the epoch."""

    def train_dataloader(self) -> Any:
        return [super().train_dataloader(), DataLoader(self.val, batch_size=3, shuffle=True)]


class OfTwo(NetModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx) + super().training_step(batch[1], batch_idx)


class Endless(RandomSplits):
    def train_dataloader(self) -> Any:
        return DataLoader(Draws(), batch_size=4)


CASES: dict[str, tuple[type, Callable[[], Any], dict[str, Any]]] = {
    "plain": (NetModule, RandomSplits, {}),
    "own generator": (NetModule, lambda: RandomSplits(own_generator=True), {}),
    "accumulating": (NetModule, RandomSplits, {"accumulate": 2}),
    "clipped": (NetModule, RandomSplits, {"clip": 0.1}),
    "seeded": (NetModule, RandomSplits, {"seed": 11}),
    "two loaders": (OfTwo, TwoLoaders, {}),
    "data without length": (NetModule, Endless, {}),
    "two optimizers, manual": (TwoOptimizers, RandomSplits, {}),
    "monitored": (NetModule, RandomSplits, {"monitor_metric": "val_loss"}),
}


def train_case(case: str, kill_at: int = 0, resume: str | None = None) -> Any:
    """A run that is killed without a word at step `kill_at`, with its last checkpoint one update before; or goes on.

    Without `kill_at` and `resume` it is the uninterrupted run, which saves nothing.
    """
    kind, make_data, options = CASES[case]
    seed_everything(2)

    def kill(trainer: weft.Trainer, batch: Any, loss: Any) -> None:
        if kill_at and trainer.global_step >= kill_at:
            os._exit(3)

    saved = {}
    if kill_at or resume:
        every = (kill_at or 100) - (2 if case == "two optimizers, manual" else 1)
        saved = {"root_dir": "runs", "run_name": "run", "checkpoint": {"every_n_steps": every}}
    hooks = {"on_step_end": kill}
    trainer = weft.Trainer(accelerator="cpu", progress=False, epochs=3, hooks=hooks, **saved, **options)
    module = kind()
    result = trainer.fit(module, datamodule=make_data(), resume=resume)
    return module, result, trainer


@pytest.mark.parametrize("kill_at", [4, 8], ids=["in the first epoch", "in the second epoch"])
@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_resumes_and_ends_bitwise_where_the_uninterrupted_one_does(case: str, kill_at: int) -> None:
    kill_at *= 2 if case == "two optimizers, manual" else 1
    whole, expected, trainer = train_case(case)
    assert in_child(lambda: train_case(case, kill_at)) == 3
    resumed, result, again = train_case(case, resume="last")
    assert result.steps == expected.steps and again.run.progress.epoch == trainer.run.progress.epoch
    assert same(weights(resumed), weights(whole))
    assert same(result.last_weights, expected.last_weights)
    assert same(result.history, expected.history)
    states = [[o.state_dict() for o in t.run.optimizers.values()] for t in (trainer, again)]
    assert same(*states)


def test_the_comparison_can_fail() -> None:
    whole, _, _ = train_case("plain")
    assert in_child(lambda: train_case("plain", 4)) == 3
    with pytest.warns(UserWarning, match="Changed since: clip"):
        resumed, _, _ = train_case("clipped", resume="last")
    assert not same(weights(resumed), weights(whole))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("moment", ["epoch", "validation", "after"])
@pytest.mark.parametrize("kind", [NetModule, TwoOptimizers])
def test_lightnings_trainer_goes_on_from_a_checkpoint_of_the_callback(kind: Any, moment: str, tmp_path: Path) -> None:
    """From what `ModelCheckpoint` writes under `weft.Trainer`, or the view by hand, to the bits of one long fit."""

    def module_and_loaders() -> tuple[Any, ...]:
        seed_everything(4)
        module, x = kind(), torch.linspace(0, 1, 66).reshape(22, 3)
        module.net[1] = nn.Identity()  # random numbers are no part of Lightning's files
        return module, *[DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=4) for _ in "tv"]

    def by_lightning(**kwargs: Any) -> tuple[Any, Any]:
        options = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        given, trainer = module_and_loaders(), pl.Trainer(accelerator="cpu", max_epochs=4, **options)
        trainer.fit(*given, **kwargs)
        return given[0], trainer

    monitor = "val_loss" if moment == "validation" else None
    files = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor, save_top_k=-1 if monitor else 1)
    ours = weft.Trainer(accelerator="cpu", progress=False, epochs=2, hooks=[files])
    ours.fit(*module_and_loaders())
    path = tmp_path / "epoch=1.ckpt"
    if moment == "after":
        path = tmp_path / "after.ckpt"
        ours.run.view.save_checkpoint(path)
    (whole, expected), (resumed, trainer) = by_lightning(), by_lightning(ckpt_path=path)
    assert trainer.global_step == expected.global_step and trainer.current_epoch == expected.current_epoch == 4
    assert same(weights(resumed), weights(whole)) and not same(weights(ours.problem), weights(whole))
