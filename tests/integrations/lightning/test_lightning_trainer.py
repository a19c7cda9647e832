"""Scripts that change one import: everything that Lightning's Trainer leaves, weft's leaves too, bit for bit."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as cb
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers import trainer_table
from tests.helpers.lightning_tools import LIGHTNING_WARNINGS
from tests.helpers.trainer_table import BEGIN, END, OTHER, OURS, PAGE
from tests.helpers.twin_modules import (
    QUIET,
    Adversaries,
    Classifier,
    Data,
    Logs,
    NoLength,
    Order,
    Thorough,
    class_loader,
    two_classes,
)
from tests.helpers.twins import Script, differing, twins
from weft.integrations.lightning import Trainer
from weft.integrations.lightning.fitting import FitRun, strategy_of

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

BEST: Callable[[], Any] = lambda: cb.ModelCheckpoint(monitor="val_loss", save_last=True, save_top_k=2)
CSV: Callable[[], Any] = lambda: CSVLogger("logs", name="run", version="a")


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


def ends_alike(script: Script, folder: Path) -> None:
    theirs, ours = twins(script, folder)
    assert not differing(theirs, ours)


def whole_script(schedule: str | None = None, **options: Any) -> Script:
    """fit, validate, test and predict with a data module; objects among the options are made anew for each trainer."""

    def script(kind: Any) -> Any:
        chosen = {"max_epochs": 2, "log_every_n_steps": 2, **QUIET, **options}
        more = [make() for make in chosen.pop("callbacks", [])]
        chosen = {name: value() if callable(value) else value for name, value in chosen.items()}
        order, module, data = Order(), Classifier(schedule=schedule), Data()
        trainer = kind(callbacks=[order, *more], **chosen)
        trainer.fit(module, datamodule=data)
        found = [trainer.validate(module, datamodule=data, verbose=False), trainer.test(model=module, datamodule=data)]
        found.append(trainer.predict(module, data))
        if trainer.checkpoint_callback is not None and trainer.checkpoint_callback.best_model_path:
            found.append(trainer.test(ckpt_path="best", datamodule=data, verbose=False))
        return trainer, module, found, order.calls, data.notes, trainer.log_dir

    return script


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "steps": {"max_steps": 7, "max_epochs": -1},
    "minimum": {"min_epochs": 1, "min_steps": 3, "max_epochs": 3},
    "no epochs": {"max_epochs": 0},
    "time": {"max_time": {"hours": 5}, "logger": False, "enable_checkpointing": False},
    "limits": {
        "limit_train_batches": 3,
        "limit_val_batches": 0.5,
        "limit_test_batches": 1,
        "limit_predict_batches": 1,
    },
    "no training": {"limit_train_batches": 0},
    "no validation": {"limit_val_batches": 0},
    "every second epoch": {"check_val_every_n_epoch": 2, "max_epochs": 3},
    "twice an epoch": {"val_check_interval": 0.5, "callbacks": [BEST]},
    "every third batch": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "no sanity check": {"num_sanity_val_steps": 0},
    "all sanity checks": {"num_sanity_val_steps": -1},
    "accumulation": {"accumulate_grad_batches": 2, "max_steps": 5},
    "clipping": {"gradient_clip_val": 0.1},
    "clipping by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "csv": {"logger": CSV, "log_every_n_steps": 1, "callbacks": [BEST, cb.LearningRateMonitor]},
    "two loggers": {"logger": lambda: [CSV(), TensorBoardLogger("boards")], "enable_autolog_hparams": False},
    "nothing written": {"logger": False, "enable_checkpointing": False, "default_root_dir": "elsewhere"},
    "development run": {"fast_dev_run": 2},
    "half precision": {"precision": "bf16-mixed"},
    "double precision": {"precision": "64-true", "inference_mode": False},
    "determinism": {"deterministic": True, "benchmark": False, "detect_anomaly": True},
    "one device": {"devices": "auto", "num_nodes": 1, "strategy": "auto", "use_distributed_sampler": False},
    "loaders anew": {"reload_dataloaders_every_n_epochs": 1},
    "overfitting": {"overfit_batches": 2},
    "profiled": {"profiler": "simple", "sync_batchnorm": True, "plugins": None, "model_registry": None},
    "bare": {"barebones": True, "log_every_n_steps": None, "enable_progress_bar": None, "enable_model_summary": None},
    "shown": {"enable_progress_bar": True, "enable_model_summary": True, "callbacks": [cb.RichModelSummary]},
    "patience": {"callbacks": [lambda: cb.EarlyStopping("val_loss", patience=0, min_delta=1.0)], "max_epochs": 9},
    "averaged": {"callbacks": [lambda: cb.StochasticWeightAveraging(0.01)], "max_epochs": 4},
    "moving average": {"callbacks": [cb.EMAWeightAveraging]},
    "scheduled accumulation": {"callbacks": [lambda: cb.GradientAccumulationScheduler({0: 2, 1: 3})]},
    "files by step": {"callbacks": [lambda: cb.ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)]},
}
SCHEDULES = ("step", "plateau", "plateau by step", "one cycle", "lbfgs")


@pytest.mark.parametrize("named", OPTIONS)
def test_with_these_keywords_a_script_leaves_what_lightnings_trainer_leaves(named: str, tmp_path: Path) -> None:
    ends_alike(whole_script(**OPTIONS[named]), tmp_path)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_this_schedule_a_script_leaves_what_lightnings_trainer_leaves(schedule: str, tmp_path: Path) -> None:
    ends_alike(whole_script(schedule, logger=CSV, callbacks=[BEST, cb.LearningRateMonitor]), tmp_path)


def test_the_comparison_sees_another_seed_and_weft_has_run_the_loop(tmp_path: Path) -> None:
    def script(kind: Any) -> Any:
        if kind is Trainer:
            torch.manual_seed(1)
        module, trainer = Classifier(), kind(max_epochs=2, logger=False, enable_checkpointing=False, **QUIET)
        trainer.fit(module, class_loader(), class_loader(8))
        if kind is Trainer:
            run = trainer.weft_run
            assert isinstance(run, FitRun) and run.result.steps == 12 and len(run.result.history["val_loss"]) == 2
        return trainer, module

    found = differing(*twins(script, tmp_path))
    assert any("weights" in d for d in found) and not any("counters" in d for d in found)


def test_tensorboard_gets_the_same_rows(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def script(kind: Any) -> Any:
        logger = TensorBoardLogger("boards", version="a")
        trainer = kind(max_epochs=2, log_every_n_steps=2, logger=logger, **QUIET)
        module, order = Classifier(), cb.LearningRateMonitor("step")
        trainer.callbacks.append(order)
        trainer.fit(module, class_loader(), class_loader(8))
        trainer.test(module, class_loader(8))
        read = EventAccumulator(logger.log_dir).Reload()
        scalars = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
        assert {"accuracy_step", "accuracy_epoch", "val_loss", "test_loss", "epoch", "lr-AdamW"} <= set(scalars)
        assert "quiet" not in scalars
        return trainer, module, scalars

    ends_alike(script, tmp_path)


# ------------------------------------------------------------------ styles of modules


def one_fit(make: Callable[[], Any], *data: Callable[[], Any], **options: Any) -> Script:
    """One fit with these loaders, and the order of all calls."""

    def script(kind: Any) -> Any:
        order, module = Order(), make()
        chosen = {"max_epochs": 2, "logger": CSV(), **QUIET, **options}
        trainer = kind(callbacks=[order, *chosen.pop("callbacks", [])], **chosen)
        trainer.fit(module, *[make_data() for make_data in data])
        return trainer, module, order.calls

    return script


class NoGrad(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        torch.optim.SGD.step(self)
        return loss


class OfTwoLoaders(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = batch.values() if isinstance(batch, dict) else batch
        return sum(self.shared(part)[0] for part in parts)


def boring_with(**members: Any) -> Callable[[], Any]:
    return lambda: type("Boring", (BoringModel,), members)()


def scaled_loss(module: Any, batch: Any, batch_idx: int, factor: float = 1.0) -> Any:
    return BoringModel.training_step(module, batch, batch_idx)["loss"] * factor


def with_log(module: Any, batch: Any, batch_idx: int) -> Any:
    loss = scaled_loss(module, batch, batch_idx)
    return {"loss": loss, "log": {"a": loss}, "progress_bar": {"a": loss}}


def without_validation_step() -> Any:
    module = BoringModel()
    module.validation_step = None  # type: ignore[method-assign,assignment]
    return module


def stopping_at_third(module: Any, batch: Any, batch_idx: int) -> Any:
    if module.global_step == 2:
        raise StopIteration  # of an iterator of the module's own
    return scaled_loss(module, batch, batch_idx)


class FrozenBackbone(Classifier):
    """A part that is not trained stays in eval mode, and the weights saved are the others."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.net.eval().requires_grad_(False)

    def forward(self, x: Any) -> Any:
        return self.head(self.net(x))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.trainer.callbacks[0].calls.append("state_dict")  # type: ignore[attr-defined]
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "head" in name}


class TwoModes(torch.optim.SGD):
    """As schedule-free ones: it steps in the mode that the script has put it into."""

    slow = 1.0

    def train(self) -> None:
        self.slow = 1.0

    def eval(self) -> None:
        self.slow = 0.25

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for p in self.param_groups[0]["params"]:
            p.data -= self.slow * 0.1 * p.grad
        return loss


class InStages(Classifier):
    """Makes its optimizers anew, exchanges its step and its hooks, and adds a callback, while it trains."""

    def on_train_start(self) -> None:
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)
            self.trainer.strategy.setup_optimizers(self.trainer)
            self.trainer.callbacks.append(Order())  # type: ignore[attr-defined]
        if self.current_epoch == 2:
            self.training_step = self.another_step  # type: ignore[method-assign]
            self.on_train_batch_end = lambda *args: self.log("ended", 1.0)  # type: ignore[method-assign]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 8:
            self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=0.2)]

    def another_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 14:  # counts from the next batch on
            self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), lr=0.3)]
        return self.shared(batch)[0] * 2


class StagesByHand(InStages):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.shared(batch)[0]
        self.manual_backward(loss)
        if batch_idx % 2:
            self.optimizers().step()  # type: ignore[union-attr]
            self.zero_grad()
        return loss

    another_step = training_step


def with_gradients() -> Any:
    module = StagesByHand()
    module.net[4].weight.grad = torch.ones(2, 16)
    return module


SCRIPTS: dict[str, Script] = {
    "a frozen part": one_fit(FrozenBackbone, class_loader, class_loader),
    "an optimizer of two modes": one_fit(
        boring_with(
            configure_optimizers=lambda self: TwoModes(self.parameters(), lr=0.1),
            on_train_epoch_start=lambda self: self.trainer.optimizers[0].eval() if self.current_epoch == 0 else None,
        ),
        limit_train_batches=3,
    ),
    "in stages": one_fit(InStages, class_loader, class_loader, max_epochs=4, log_every_n_steps=1),
    "in stages by hand": one_fit(StagesByHand, class_loader, max_epochs=4, log_every_n_steps=1),
    "gradients from before": one_fit(with_gradients, class_loader),
    "an iterator that ends": one_fit(boring_with(training_step=stopping_at_third), limit_train_batches=4),
    "manual optimization": one_fit(Adversaries, class_loader, class_loader, log_every_n_steps=1),
    "manual, to a step": one_fit(Adversaries, class_loader, max_steps=7, log_every_n_steps=1),
    "every place to log": one_fit(Logs, limit_train_batches=4, limit_val_batches=3, log_every_n_steps=1),
    "one process of ddp": one_fit(Classifier, class_loader, class_loader, strategy="ddp", devices=1),
    "every hook": one_fit(
        lambda: Thorough(schedule="step"), class_loader, class_loader, gradient_clip_val=0.2, max_epochs=3
    ),
    "several validation loaders": one_fit(Classifier, class_loader, lambda: [class_loader(8), class_loader(12, 1)]),
    "a dict of loaders": one_fit(OfTwoLoaders, lambda: {"a": class_loader(), "b": class_loader(8, 3, shuffle=True)}),
    "a CombinedLoader": one_fit(OfTwoLoaders, lambda: CombinedLoader([class_loader(), class_loader(8, 3)], "min_size")),
    "data without length": one_fit(
        Classifier,
        lambda: DataLoader(NoLength(), batch_size=3),
        lambda: DataLoader(NoLength(), 4),
        val_check_interval=2,
    ),
    "persistent workers": one_fit(Classifier, lambda: class_loader(8, num_workers=1, persistent_workers=True)),
    "no validation_step": one_fit(without_validation_step, limit_train_batches=3),
    "an optimizer under no_grad": one_fit(
        boring_with(configure_optimizers=lambda self: NoGrad(self.parameters(), lr=0.1)), limit_train_batches=3
    ),
    "an infinite loss": one_fit(
        boring_with(training_step=lambda self, batch, batch_idx: scaled_loss(self, batch, batch_idx, float("inf"))),
        limit_train_batches=3,
    ),
    "a returned log": one_fit(boring_with(training_step=with_log), limit_train_batches=3),
    "some steps without a loss": one_fit(
        boring_with(
            training_step=lambda self, batch, batch_idx: scaled_loss(self, batch, batch_idx) if batch_idx else None
        ),
        limit_train_batches=3,
    ),
    "no batches": one_fit(boring_with(train_dataloader=lambda self: DataLoader([]))),
    "no optimizer": one_fit(boring_with(configure_optimizers=lambda self: None), limit_train_batches=3),
    "an early look": one_fit(
        boring_with(setup=lambda self, stage: setattr(self, "seen", list(self.trainer.lr_scheduler_configs))),
        limit_train_batches=3,
    ),
    "stopped by hand": one_fit(
        boring_with(on_train_batch_end=lambda self, *args: setattr(self.trainer, "should_stop", self.global_step == 5)),
        limit_train_batches=4,
        max_epochs=3,
    ),
}


@pytest.mark.parametrize("named", SCRIPTS)
def test_a_module_of_this_style_ends_where_lightnings_trainer_ends(named: str, tmp_path: Path) -> None:
    ends_alike(SCRIPTS[named], tmp_path)


def test_an_optimizer_step_without_its_closure_is_named() -> None:
    module = boring_with(optimizer_step=lambda self, epoch, batch_idx, optimizer, closure: optimizer.step())()
    trainer = Trainer(max_epochs=1, limit_train_batches=1, logger=False, enable_checkpointing=False, **QUIET)
    with pytest.raises(RuntimeError, match=r"did not execute the closure: it trains by `optimizer\."):
        trainer.fit(module)


# ------------------------------------------------------------------ resuming, and fits after fits


def test_fits_go_on_from_their_checkpoints_alike(tmp_path: Path) -> None:
    def script(kind: Any) -> Any:
        kept = {"logger": False, **QUIET}
        first = kind(max_epochs=2, callbacks=[cb.ModelCheckpoint("files", save_last=True)], **kept)
        first.fit(Classifier(schedule="step"), class_loader(shuffle=True), class_loader(8))
        second = kind(max_epochs=4, callbacks=[cb.ModelCheckpoint("files", save_last=True)], **kept)
        second.fit(
            Classifier(schedule="step"), class_loader(shuffle=True), class_loader(8), ckpt_path="files/last.ckpt"
        )
        third, module = kind(max_epochs=5, callbacks=[cb.ModelCheckpoint("files")], **kept), Classifier(schedule="step")
        third.fit(module, class_loader(shuffle=True), class_loader(8), ckpt_path="last")
        return third, module, second.callback_metrics

    ends_alike(script, tmp_path)


@pytest.mark.parametrize("others", [pl.Trainer, Trainer])
def test_a_checkpoint_of_one_trainer_is_gone_on_from_by_the_other(others: Any, tmp_path: Path) -> None:
    """From the end of an epoch, from its middle (no place in a loader is kept), and from a validation."""

    def saved_by(kind: Any) -> None:
        files = cb.ModelCheckpoint("files", every_n_train_steps=1, filename="{step}", save_top_k=-1)
        during = cb.ModelCheckpoint("during", monitor="val_loss", filename="{step}", save_top_k=-1)
        trainer = kind(max_epochs=2, callbacks=[files, during], val_check_interval=3, logger=False, **QUIET)
        trainer.fit(Classifier(schedule="one cycle"), class_loader(), class_loader(8))

    def script(kind: Any) -> Any:
        torch.manual_seed(1)
        saved_by(others if kind is Trainer else pl.Trainer)
        ends = []
        for path in ("files/step=6.ckpt", "files/step=8.ckpt", "during/step=9.ckpt", "during/step=6.ckpt"):
            order, module = Order(), Classifier(schedule="one cycle")
            trainer = kind(max_epochs=2, callbacks=[order], logger=CSV(), val_check_interval=3, **QUIET)
            trainer.fit(module, class_loader(), class_loader(8), ckpt_path=path)
            ends.append((module.state_dict(), order.calls))
        return trainer, module, ends

    ends_alike(script, tmp_path)


def test_checkpoints_are_named_and_found_alike(tmp_path: Path) -> None:
    def script(kind: Any) -> Any:
        best = cb.ModelCheckpoint(
            "best", "m-{epoch:02d}-{val_loss:.3f}", "val_loss", mode="max", save_weights_only=True, save_top_k=2
        )
        last = cb.ModelCheckpoint("last", save_last="link")
        trainer, module = kind(max_epochs=3, callbacks=[best, last], logger=False, **QUIET), Classifier()
        trainer.fit(module, class_loader(), class_loader(8))
        found = trainer.validate(ckpt_path="best", dataloaders=class_loader(8), verbose=False)
        return (
            trainer,
            module,
            found,
            best.best_k_models,
            best.best_model_score,
            best.best_model_path,
            last.last_model_path,
        )

    ends_alike(script, tmp_path)


def test_a_second_fit_counts_on_to_the_total(tmp_path: Path) -> None:
    def script(kind: Any) -> Any:
        trainer, module = kind(max_epochs=2, logger=CSV(), **QUIET), Classifier(schedule="step")
        trainer.fit(module, class_loader(), class_loader(8))
        trainer.fit(module, class_loader(), class_loader(8))
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, class_loader(), class_loader(8))
        other = Classifier()
        trainer.fit_loop.max_epochs = 4
        trainer.fit(other, class_loader(), class_loader(8))
        return trainer, other, module.state_dict()

    ends_alike(script, tmp_path)


def test_weights_of_a_checkpoint_serve_evaluation(tmp_path: Path) -> None:
    def script(kind: Any) -> Any:
        trainer, module = kind(max_epochs=1, logger=False, **QUIET), Classifier(lr=0.3)
        trainer.fit(module, class_loader(), class_loader(8))
        trainer.save_checkpoint("all.ckpt")
        trainer.save_checkpoint("weights.ckpt", weights_only=True)
        other, loaded = kind(logger=False, **QUIET), Classifier.load_from_checkpoint("all.ckpt")
        found = [
            other.validate(loaded, class_loader(8)),
            other.test(Classifier(), class_loader(8), ckpt_path="weights.ckpt"),
        ]
        return trainer, loaded, found, dict(loaded.hparams)

    ends_alike(script, tmp_path)


# ------------------------------------------------------------------ what stands around a fit


def test_an_own_trainer_with_attributes_is_what_the_module_sees(tmp_path: Path) -> None:
    class Points(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

        def train_dataloader(self) -> Any:
            return class_loader(8)

    class Solver(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.trainer.batch_size == 7 and self.trainer.solver is self  # type: ignore[attr-defined]
            return super().training_step(batch, batch_idx)

    def script(kind: Any) -> Any:
        class Own(kind):
            def __init__(self, solver: Any, batch_size: int, **kwargs: Any) -> None:
                super().__init__(**kwargs)
                self.solver, self.batch_size = solver, batch_size

            def train(self) -> None:
                super().fit(self.solver, datamodule=Points())

        module = Solver()
        trainer = Own(module, 7, max_epochs=1, logger=False, **QUIET)
        trainer.train()
        return trainer, module

    ends_alike(script, tmp_path)


def test_errors_and_interrupts_reach_callbacks_and_loggers(tmp_path: Path) -> None:
    def script(kind: Any) -> Any:
        notes: list[Any] = []

        class Notes(CSVLogger):
            def finalize(self, status: str) -> None:
                notes.append(status)
                super().finalize(status)

        class Fails(BoringModel):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if batch_idx == 2:
                    raise ValueError("in training")
                return super().training_step(batch, batch_idx)

            def test_step(self, batch: Any, batch_idx: int) -> Any:
                raise ValueError("in a test")

        order, module = Order(), Fails()
        trainer = kind(max_epochs=2, logger=Notes("."), callbacks=[order, cb.OnExceptionCheckpoint("failed")], **QUIET)
        for call in (trainer.fit, trainer.test):
            with pytest.raises(ValueError) as found:
                call(module)
            notes.append(str(found.value))
        return trainer, module, notes, order.calls

    ends_alike(script, tmp_path)


def test_the_tuner_finds_the_same(tmp_path: Path) -> None:
    class Tuned(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.lr, self.batch_size = 0.02, 2

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

        def train_dataloader(self) -> Any:
            return DataLoader(two_classes(64), batch_size=self.batch_size)

        def val_dataloader(self) -> Any:
            return class_loader(8)

    def script(kind: Any) -> Any:
        trainer, module = kind(max_epochs=1, logger=CSV(), **QUIET), Tuned()
        found = Tuner(trainer).lr_find(module, num_training=20)
        size = Tuner(trainer).scale_batch_size(module, max_trials=2)
        trainer.fit(module)
        return trainer, module, found.results, found.suggestion(), size, module.lr  # type: ignore[union-attr]

    ends_alike(script, tmp_path)


def test_writers_get_rows_and_predictions(tmp_path: Path) -> None:
    class Writer(cb.BasePredictionWriter):
        def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, rows: Any, *rest: Any) -> None:
            kept.append((prediction, rows))

        def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, rows: Any) -> None:
            kept.append((predictions, rows))

    kept: list[Any] = []

    def script(kind: Any) -> Any:
        kept.clear()
        trainer, module = kind(logger=False, callbacks=[Writer("batch_and_epoch")], **QUIET), Classifier()
        found = trainer.predict(module, class_loader(10), return_predictions=True)
        return trainer, module, found, list(kept)

    ends_alike(script, tmp_path)


def test_a_finetuning_callback_adds_parameters(tmp_path: Path) -> None:
    class Thaw(cb.BaseFinetuning):
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.net[0])

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net[0], optimizer)

    class Part(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    ends_alike(lambda kind: one_fit(Part, class_loader, class_loader, callbacks=[Thaw()], max_epochs=3)(kind), tmp_path)


def test_lightnings_command_line_takes_it(tmp_path: Path) -> None:
    args = ["fit", "--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.accelerator=cpu"]
    args += ["--trainer.callbacks+=LearningRateMonitor", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=."]
    args += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]

    def script(kind: Any) -> Any:
        done = LightningCLI(BoringModel, BoringDataModule, trainer_class=kind, save_config_callback=None, args=args)
        return done.trainer, done.model

    ends_alike(script, tmp_path)


def test_the_module_stands_for_lightnings_package() -> None:
    import weft.integrations.lightning as ours

    assert ours.LightningModule is pl.LightningModule and ours.callbacks is cb and ours.Trainer is Trainer
    with pytest.raises(AttributeError, match=r"no attribute 'Trainr', and lightning\.pytorch has none either"):
        ours.Trainr  # noqa: B018


@pytest.mark.long
@pytest.mark.parametrize("first", [True, False])
def test_the_older_package_may_be_imported_before_or_after(first: bool) -> None:
    lines = ["from weft.integrations.lightning import Trainer", "import pytorch_lightning as pl"]
    script = lines if first else lines[::-1]
    script += ["from abc import ABC", "from pytorch_lightning.demos.boring_classes import BoringModel"]
    script += [
        "class Own(Trainer): pass",
        "class Abstract(Trainer, ABC): pass",
        f"options = {QUIET | {'logger': False}!r}",
    ]
    script += ["for kind in (Trainer, Own, Trainer, Abstract):", "    trainer = kind(max_steps=3, **options)"]
    script += ["    trainer.fit(BoringModel())", "    assert isinstance(trainer, pl.Trainer) and trainer.weft_run"]
    script += ["assert type(trainer) is Abstract and trainer.global_step == 3", "print('trained')"]
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("trained"), done.stderr


ATTRIBUTES = (
    "current_epoch",
    "global_step",
    "max_epochs",
    "max_steps",
    "min_epochs",
    "log_dir",
    "default_root_dir",
    "is_global_zero",
    "world_size",
    "num_devices",
    "device_ids",
    "global_rank",
    "local_rank",
    "node_rank",
    "num_nodes",
    "precision",
    "strategy",
    "accelerator",
    "logger",
    "loggers",
    "callbacks",
    "checkpoint_callback",
    "checkpoint_callbacks",
    "early_stopping_callback",
    "progress_bar_callback",
    "progress_bar_metrics",
    "callback_metrics",
    "logged_metrics",
    "ckpt_path",
    "training",
    "validating",
    "testing",
    "predicting",
    "evaluating",
    "sanity_checking",
    "should_stop",
    "is_last_batch",
    "enable_validation",
    "num_training_batches",
    "num_val_batches",
    "train_dataloader",
    "val_dataloaders",
    "datamodule",
    "model",
    "lightning_module",
    "optimizers",
    "lr_scheduler_configs",
    "scaler",
    "profiler",
    "fast_dev_run",
    "barebones",
    "received_sigterm",
)


def test_attributes_are_there_before_and_after_a_fit(tmp_path: Path) -> None:
    def script(kind: Any) -> Any:
        def seen() -> list[Any]:
            plain = (int, float, str, dict, type(None))
            values = [getattr(trainer, name) for name in ATTRIBUTES]
            return [value if isinstance(value, plain) else type(value).__name__ for value in values]

        trainer, module = kind(max_epochs=1, limit_train_batches=2, logger=CSV(), **QUIET), BoringModel()
        before = seen()
        trainer.fit(module)
        return trainer, module, before, seen()

    ends_alike(script, tmp_path)


def test_the_table_says_of_every_keyword_and_member_what_is_so() -> None:
    keywords = {name for name in inspect.signature(pl.Trainer.__init__).parameters if name != "self"}
    shown = keywords & {name for options in (QUIET, *OPTIONS.values()) for name in options}
    assert shown == keywords  # what the table calls the same is compared above
    own = {name for name in vars(Trainer) if not name.startswith("_")}
    assert own == set(OURS)  # every other member is Lightning's own code
    assert trainer_table.table() == PAGE.read_text().split(BEGIN)[1].split(END)[0]
    assert set(OTHER) <= keywords | set(dir(pl.Trainer(barebones=True, logger=False)))


def test_what_weft_cannot_do_is_refused_by_name() -> None:
    class OfAnIterator(BoringModel):
        def training_step(self, dataloader_iter: Any) -> Any: ...

    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, **QUIET)
    with warnings.catch_warnings(), pytest.raises(NotImplementedError, match="'dataloader_iter'"):
        warnings.simplefilter("ignore")
        trainer.fit(OfAnIterator())

    run = type("Run", (), {"view": type("View", (), {"strategy": object(), "precision_plugin": None})})
    with pytest.raises(NotImplementedError, match="strategy=object: with weft's loop a module trains as a whole"):
        strategy_of(run)  # type: ignore[arg-type]
