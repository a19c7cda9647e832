"""What weft refuses of LightningModules: older forms, shapes and options without effect; each with today's form."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule
from torch import nn
from torch.nn import functional as F

import weft
from tests.helpers.bitwise import same, weights
from tests.helpers.lightning_tools import (
    LIGHTNING_WARNINGS,
    LineModule,
    both,
    line,
    loaders,
    point_loader,
    weft_trainer,
)

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]


def module_with(**members: Any) -> Any:
    return type("Old", (LineModule,), members)()


@pytest.mark.parametrize(
    ("members", "today"),
    [
        ({"validation_epoch_end": lambda self, outputs: None}, r"on_validation_epoch_end\(self\)"),
        ({"training_epoch_end": lambda self, outputs: None}, r"on_train_epoch_end\(self\)"),
        ({"test_epoch_end": lambda self, outputs: None}, r"on_test_epoch_end\(self\)"),
        ({"training_step_end": lambda self, outputs: None}, "on_train_batch_end"),
        ({"on_epoch_end": lambda self: None}, r"on_train_epoch_end\(self\)"),
        ({"training_step": lambda self, batch, batch_idx, optimizer_idx: None}, r"self\.optimizers\(\)"),
        ({"training_step": lambda self, batch, batch_idx, hiddens: None}, "keep the hidden state in self"),
        ({"training_step": lambda self, dataloader_iter: None}, "take `batch`"),
        ({"truncated_bptt_steps": 2}, "automatic_optimization = False"),
    ],
)
def test_forms_of_older_lightning_are_refused_with_todays_form(members: dict[str, Any], today: str) -> None:
    with pytest.raises(NotImplementedError, match=today):
        weft_trainer(max_epochs=1).fit(module_with(**members), **loaders())


def test_a_returned_log_dict_is_named_with_todays_form() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = F.mse_loss(self(batch[0]), batch[1])
        return {"loss": loss, "log": {"train_loss": loss}}

    with pytest.warns(UserWarning, match=r"Today: self\.log_dict\(\{'train_loss': \.\.\.\}\)"):
        weft_trainer(max_epochs=1).fit(module_with(training_step=step), **loaders())
    old = module_with(validation_step=lambda self, batch, batch_idx: {"progress_bar": {"a": 1.0}})
    with pytest.warns(UserWarning, match="validation_step returned 'progress_bar'.*prog_bar=True"):
        weft_trainer(max_epochs=1).fit(old, **loaders())


@pytest.mark.parametrize(
    ("configure", "error", "message"),
    [
        (lambda m: "adam", TypeError, "returned 'adam'; expected an optimizer, a list"),
        (lambda m: {"optimiser": sgd_of(m)}, ValueError, "unknown key 'optimiser'; did you mean 'optimizer'"),
        (lambda m: {"lr_scheduler": None}, ValueError, "has no 'optimizer'"),
        (lambda m: [sgd_of(m), sgd_of(m)], RuntimeError, "takes manual optimization"),
        (lambda m: [{"optimizer": sgd_of(m), "frequency": 2}], NotImplementedError, "a form of Lightning 1"),
        (lambda m: ([o := sgd_of(m)], [plateau_of(o)]), ValueError, "needs a metric: return"),
        (
            lambda m: ([sgd_of(m)], [plateau_of(sgd_of(m))]),
            ValueError,
            "needs a metric|another|belongs to an optimizer",
        ),
        (
            lambda m: ([o := sgd_of(m)], [{"scheduler": steps(o), "interval": "batch"}]),
            ValueError,
            "expected 'step' or 'epoch'",
        ),
        (lambda m: ([o := sgd_of(m)], [{"scheduler": steps(o), "freq": 1}]), ValueError, "unknown key 'freq'"),
        (lambda m: ([sgd_of(m)], [steps(sgd_of(m))]), ValueError, "belongs to an optimizer that was not returned"),
    ],
)
def test_what_configure_optimizers_must_not_return(configure: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        weft_trainer(max_epochs=1).fit(module_with(configure_optimizers=configure), **loaders())


def sgd_of(module: Any) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def plateau_of(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def steps(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize(
    "configure",
    [
        lambda m: sgd_of(m),
        lambda m: [sgd_of(m)],
        lambda m: {"optimizer": sgd_of(m)},
        lambda m: {"optimizer": (o := sgd_of(m)), "lr_scheduler": steps(o)},
        lambda m: {"optimizer": (o := sgd_of(m)), "lr_scheduler": plateau_of(o), "monitor": "val_loss"},
        lambda m: {"optimizer": (o := sgd_of(m)), "lr_scheduler": {"scheduler": steps(o), "interval": "step"}},
        lambda m: ([o := sgd_of(m)], steps(o)),
        lambda m: ([o := sgd_of(m)], [steps(o), {"scheduler": plateau_of(o), "monitor": "val_loss", "frequency": 2}]),
        lambda m: [{"optimizer": (o := sgd_of(m)), "lr_scheduler": steps(o)}],
    ],
)
def test_every_shape_of_configure_optimizers_trains_as_in_lightning(configure: Any) -> None:
    theirs, _, ours, _ = both(lambda: (module_with(configure_optimizers=configure), loaders()), max_epochs=3)
    assert same(weights(ours), weights(theirs))


def test_a_metric_that_a_scheduler_waits_for_must_be_logged() -> None:
    def configure(module: Any, strict: bool = True) -> Any:
        optimizer = sgd_of(module)
        return [optimizer], [{"scheduler": plateau_of(optimizer), "monitor": "vall_loss", "strict": strict}]

    with pytest.raises(ValueError, match="monitors 'vall_loss', which was not logged.*did you mean 'val_loss'"):
        weft_trainer(max_epochs=1).fit(module_with(configure_optimizers=configure), **loaders())
    lenient = module_with(configure_optimizers=lambda m: configure(m, strict=False))
    with pytest.warns(UserWarning, match="the learning rate is left as it is"):
        weft_trainer(max_epochs=1).fit(lenient, **loaders())


@pytest.mark.parametrize(
    ("options", "given", "error", "message"),
    [
        ({"optimizer": torch.optim.SGD}, {}, TypeError, r"\['optimizer'\] have no effect with a LightningModule"),
        ({"training_step": lambda t, b: None}, {}, TypeError, "have no effect with a LightningModule"),
        ({"compile": True}, {}, NotImplementedError, "compile=True"),
        ({}, {"datamodule": BoringDataModule()}, TypeError, "loaders and a data module"),
        ({}, {"ckpt_path": "x.ckpt"}, TypeError, "ckpt_path.*resume"),
        ({}, {"train_dataloaders": weft.DictDataset({"x": [1.0]})}, TypeError, "takes loaders"),
        ({}, {"train_dataloaders": 3}, TypeError, "train_dataloader: found 3; expected a DataLoader"),
        ({}, {"train_dataloaders": None}, TypeError, "has no train_dataloader"),
        ({"resume": "last", "root_dir": "other", "run_name": "a"}, {}, ValueError, "not of a LightningModule"),
    ],
)
def test_options_and_data_that_do_not_fit_are_refused(
    options: dict[str, Any], given: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "resume" in options:
        plain = weft_trainer(max_epochs=1, root_dir="other", run_name="a", checkpoint=True)
        plain.fit(
            weft.Problem([weft.Node(nn.Linear(1, 1), ["x"], ["y"])], [weft.objective(lambda y: y**2)]),
            weft.DictDataset({"x": torch.ones(4, 1)}),
        )
    with pytest.raises(error, match=message):
        weft_trainer(max_epochs=1, **options).fit(line(), **{**loaders(), **given})


def test_manual_optimization_refuses_what_it_must_do_itself() -> None:
    module = line()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="accumulate and clip have no effect"):
        weft_trainer(max_epochs=1, clip=0.1).fit(module, **loaders())


def test_modules_without_what_training_needs_are_refused() -> None:
    class Bare(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

    with pytest.raises(TypeError, match="Bare has no training_step"):
        weft_trainer(max_epochs=1).fit(Bare(), point_loader(4))
    with pytest.raises(ValueError, match="no dev data"):
        weft_trainer().validate(Bare(), point_loader(4))
