"""A LightningModule as weft runs it: evaluation, logs, callbacks, checkpoints, its trainer, what is refused."""

from __future__ import annotations

import copy
import pickle
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F

import weft
from tests.helpers.bitwise import same, weights
from tests.helpers.lightning_tools import (
    LIGHTNING_WARNINGS,
    QUIET,
    LineModule,
    both,
    lightning_trainer,
    line,
    loaders,
    point_loader,
    weft_trainer,
)
from weft.devices.seeding import seed_everything
from weft.loop.adapters import adapter_for, split_hooks

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]


# ------------------------------------------------------------------ evaluation


def test_validate_test_and_predict_give_lightnings_numbers() -> None:
    module, data = line(), point_loader(10, 1)
    theirs = lightning_trainer()
    expected = [theirs.validate(module, data, verbose=False)[0], theirs.test(module, data, verbose=False)[0]]
    predicted = theirs.predict(module, data)
    ours = weft_trainer()
    assert [ours.validate(module, data), ours.test(module, dataloaders=data)] == expected
    assert same(ours.predict(module, data), predicted)
    assert ours.validate(module, point_loader(10, 2)) != expected[0]


def test_after_a_fit_evaluation_takes_module_and_data_from_it() -> None:
    module, trainer = line(), weft_trainer(max_epochs=2)
    result = trainer.fit(module, **loaders())
    assert trainer.validate()["val_loss"] == result.history["val_loss"][-1]
    assert trainer.test(dataloaders=point_loader(5)).keys() == {"test_loss", "rows"}
    with pytest.raises(ValueError, match="no test data"):
        trainer.test()


def test_a_data_module_serves_every_stage() -> None:
    seed_everything(0)
    module, data, trainer = BoringModel(), BoringDataModule(), weft_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert trainer.test() == {} and trainer.validate(module, data) == {}
    assert len(trainer.predict(module, datamodule=data)) == 64


def test_several_loaders_are_told_apart_by_their_number() -> None:
    class Two(LineModule):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            self.log("test_loss", F.mse_loss(self(batch[0]), batch[1]))

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return dataloader_idx, self(batch[0])

    seed_everything(0)
    module, data = Two(), [point_loader(6, 1), point_loader(9, 2)]
    expected = {k: v for found in lightning_trainer().test(module, data, verbose=False) for k, v in found.items()}
    assert weft_trainer().test(module, data) == expected
    assert same(weft_trainer().predict(module, data), lightning_trainer().predict(module, data))
    with pytest.raises(RuntimeError, match="takes dataloader_idx, but there is one loader"):
        weft_trainer().test(module, data[0])
    with pytest.raises(RuntimeError, match="validation_step needs the argument dataloader_idx=0: there are 2"):
        weft_trainer().validate(LineModule(), data)


def test_evaluation_without_gradients_unless_the_module_asks() -> None:
    class Slope(LineModule):
        grad_inference = True

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x = batch[0].requires_grad_()
            (slope,) = torch.autograd.grad(self(x).sum(), x)
            self.log("slope", slope.mean())

    assert weft_trainer().validate(Slope(), point_loader(4))["slope"] != 0.0
    Slope.grad_inference = False
    with pytest.raises(RuntimeError, match="does not require grad"):
        weft_trainer().validate(Slope(), point_loader(4))


# ------------------------------------------------------------------ the fit


def test_nothing_is_monitored_unless_named_and_then_the_last_weights_stay() -> None:
    module = line(lr=1.5)  # it diverges: the first epoch is the best
    result = weft_trainer(max_epochs=3).fit(module, **loaders())
    assert result.best_metric is None and same(weights(module), dict(result.last_weights))
    module = line(lr=1.5)
    result = weft_trainer(max_epochs=3, monitor_metric="val_loss").fit(module, **loaders())
    assert result.best_epoch == 0 and result.best_metric == result.history["val_loss"][0]
    assert not same(weights(module), dict(result.last_weights))


def test_patience_stops_by_the_named_metric() -> None:
    result = weft_trainer(max_epochs=9, monitor_metric="val_loss", patience=2).fit(line(lr=1.5), **loaders())
    assert result.stop_reason == "patience" and result.epochs == 3
    with pytest.raises(ValueError, match="patience needs monitor_metric"):
        weft_trainer(patience=2).fit(line(), **loaders())
    with pytest.raises(ValueError, match="'vall_loss' never appears.*did you mean 'val_loss'"):
        weft_trainer(max_epochs=1, monitor_metric="vall_loss").fit(line(), **loaders())


def test_a_second_fit_trains_on() -> None:
    once, twice = line(), line()
    seed_everything(1)
    weft_trainer(max_epochs=4).fit(once, **loaders())
    trainer = weft_trainer(max_epochs=2)
    trainer.fit(twice, **loaders())
    assert trainer.fit(twice, **loaders()).epochs == 4
    assert same(weights(twice), weights(once))


def test_the_loop_may_be_written_by_hand() -> None:
    by_hand, by_fit, trainer = line(), line(), weft_trainer(max_epochs=2)
    with trainer.start(by_hand, **loaders()) as run:
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.update(batch)
            run.evaluate("dev")
    assert run.result is not None
    result = weft_trainer(max_epochs=2).fit(by_fit, **loaders())
    assert same(weights(by_hand), weights(by_fit)) and run.result.history == result.history


def test_weft_hooks_listen_besides_callbacks() -> None:
    steps: list[int] = []
    hooks = [{"on_step_end": lambda trainer, batch, loss: steps.append(trainer.global_step)}]
    weft_trainer(max_epochs=2, accumulate=3, hooks=hooks).fit(line(), **loaders())
    assert steps == [1, 2, 3, 4]  # 4 batches an epoch: 3 and 1


def test_numbers_that_are_not_finite_stop_the_run_before_the_weights_are_touched() -> None:
    class Bad(LineModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (float("nan") if self.global_step == 2 else 1.0)

    seed_everything(0)
    module = Bad()
    with pytest.raises(FloatingPointError, match="the loss is nan in step 2"):
        weft_trainer(max_epochs=1).fit(module, **loaders())
    assert all(bool(w.isfinite().all()) for w in weights(module).values())
    with pytest.warns(UserWarning, match="the step is skipped"):
        assert weft_trainer(max_epochs=1, max_steps=3, on_nonfinite="skip").fit(Bad(), **loaders()).steps == 3


def test_a_manual_step_with_gradients_that_are_not_finite_is_caught() -> None:
    class Bad(LineModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(super().training_step(batch, batch_idx) * float("inf"))
            self.optimizers().step()

    with pytest.raises(FloatingPointError, match="a gradient is not finite in step 0"):
        weft_trainer(max_epochs=1).fit(Bad(), **loaders())


# ------------------------------------------------------------------ logs


def test_a_module_whose_log_is_its_own_still_logs() -> None:
    class Own(LineModule):
        def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
            super().log(f"own/{name}", value, *args, **kwargs)

    seed_everything(0)
    result = weft_trainer(max_epochs=1).fit(Own(), **loaders())
    assert {"own/loss", "own/val_loss"} <= result.history.keys()


def test_logged_values_are_copies() -> None:
    class Copies(LineModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("first_weight", self.net.weight[0, 0], on_step=False, on_epoch=True, reduce_fx="sum")
            return super().training_step(batch, batch_idx)

    theirs, _, _, trainer = both(lambda: (Copies(), loaders()), max_epochs=1)
    assert trainer.run.history.values["first_weight"] == [theirs.trainer.callback_metrics["first_weight"].item()]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.log("x", torch.ones(2)), ValueError, r"'x'\): shape \(2,\); expected one number"),
        (lambda m: m.log("x", "text"), TypeError, "expected one number, got str"),
        (lambda m: m.log("x", {"a": 1.0}), TypeError, "got dict; use self.log_dict"),
        (lambda m: m.log("x", 1.0, on_step=False, on_epoch=False), ValueError, "records nothing"),
        (lambda m: m.log("x", 1.0, reduce_fx="median"), ValueError, "expected mean, sum, max or min"),
        (lambda m: m.log("x/dataloader_idx_1", 1.0), ValueError, "added for you"),
        (lambda m: (m.log("x", 1.0), m.log("x", 1.0, prog_bar=True)), ValueError, "twice in training_step"),
        (lambda m: m.log("x", torchmetrics.MeanMetric()), ValueError, "no attribute of"),
    ],
)
def test_what_cannot_be_logged_raises_with_its_name(call: Any, error: type[Exception], message: str) -> None:
    class Logs(LineModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            call(self)
            return super().training_step(batch, batch_idx)

    with pytest.raises(error, match=message):
        weft_trainer(max_epochs=1).fit(Logs(), **loaders())


def test_logging_outside_of_training_raises_with_the_place() -> None:
    class Early(LineModule):
        def on_fit_start(self) -> None:
            self.log("x", 1.0)

    with pytest.raises(RuntimeError, match="'x'.* cannot be called in on_fit_start"):
        weft_trainer(max_epochs=1).fit(Early(), **loaders())


def test_loggers_get_settings_and_what_the_module_logs(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path), name="csv", version=0)
    seen: list[Any] = []

    class Sees(LineModule):
        def on_train_start(self) -> None:
            seen.append((self.logger, self.trainer.loggers))

    weft_trainer(max_epochs=2, loggers=logger, log_every=2).fit(Sees(width=1), **loaders())
    assert seen == [(logger, [logger])]  # metrics.csv of the run's folder is none that a callback could use
    text = (tmp_path / "csv/version_0/metrics.csv").read_text()
    assert "val_loss" in text.splitlines()[0] and "loss" in text.splitlines()[0]
    assert "width: 1" in (tmp_path / "csv/version_0/hparams.yaml").read_text()


# ------------------------------------------------------------------ callbacks and checkpoints


def test_early_stopping_stops_where_lightnings_trainer_stops() -> None:
    options = {"max_epochs": 9, "callbacks": lambda: [EarlyStopping("val_loss", patience=2)]}
    theirs, their_trainer, ours, our_trainer = both(lambda: (line(lr=1.5), loaders()), **options)
    assert their_trainer.current_epoch == our_trainer.current_epoch == 3
    assert our_trainer.run.state.control.stop_reason == "should_stop" and same(weights(ours), weights(theirs))


def test_model_checkpoint_keeps_the_same_files_which_lightning_and_weft_load(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return [ModelCheckpoint(folder, monitor="val_loss", save_top_k=2, save_last=True, filename="{epoch}-{step}")]

    theirs, _, ours, _ = _with_checkpoints(callbacks)
    found = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("0", "1")]
    assert found[0] == found[1] and "last.ckpt" in found[0]
    for name in found[0]:
        files = [torch.load(tmp_path / n / name, weights_only=True) for n in ("0", "1")]
        for key in ("state_dict", "hyper_parameters", "epoch", "global_step", "optimizer_states"):
            assert same(files[1][key], files[0][key]), key
    last = tmp_path / "1/last.ckpt"
    loaded = LineModule.load_from_checkpoint(last)
    assert same(weights(loaded), weights(ours)) and loaded.hparams["lr"] == 0.1
    assert same(weights(weft.load_weights(LineModule(), tmp_path / "0/last.ckpt")), weights(theirs))


def _with_checkpoints(callbacks: Any) -> tuple[Any, Any, Any, Any]:
    trained = []
    for use in (lambda **o: pl.Trainer(**{**QUIET, "enable_checkpointing": True, **o}), weft_trainer):
        module, trainer = line(), use(max_epochs=4, callbacks=callbacks())
        trainer.fit(module, **loaders())
        trained += [module, trainer]
    return tuple(trained)


def test_a_module_adds_to_checkpoints_and_reads_it_back(tmp_path: Path) -> None:
    class Counts(LineModule):
        seen = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.seen += 1

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["seen"] = self.seen

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen = checkpoint["seen"]

    options = {"max_epochs": 2, "root_dir": str(tmp_path), "run_name": "a", "checkpoint": True}
    weft_trainer(**options).fit(Counts(), **loaders())
    again = Counts()
    weft_trainer(**options).fit(again, **loaders(), resume="last")
    assert again.seen == 8  # nothing was left to train


def test_callbacks_keep_their_state_over_a_resume(tmp_path: Path) -> None:
    options = {"root_dir": str(tmp_path), "run_name": "a", "checkpoint": True, "max_epochs": 2}
    weft_trainer(**options, callbacks=[stopping := EarlyStopping("val_loss", patience=9)]).fit(
        line(lr=1.5), **loaders()
    )
    assert stopping.wait_count == 1
    with pytest.warns(UserWarning, match="Changed since: optimizer default"):
        weft_trainer(**options, callbacks=[again := EarlyStopping("val_loss", patience=9)]).fit(
            line(), **loaders(), resume="last"
        )
    assert again.wait_count == 1 and torch.equal(again.best_score, stopping.best_score)
    with pytest.raises(ValueError, match="holds the state of callbacks .*EarlyStopping"):
        weft_trainer(**options).fit(line(), **loaders(), resume="last")


def test_configured_callbacks_replace_those_of_their_class() -> None:
    class Brings(LineModule):
        def configure_callbacks(self) -> Any:
            return EarlyStopping("val_loss", patience=1)

    trainer = weft_trainer(max_epochs=9, callbacks=[EarlyStopping("val_loss", patience=5), Timer()])
    trainer.fit(Brings(lr=1.5), **loaders())
    assert trainer.current_epoch == 2 and [type(c) for c in trainer.run.callbacks] == [Timer, EarlyStopping]


def test_callbacks_without_a_lightning_module_are_refused() -> None:
    trainer = weft_trainer(callbacks=[EarlyStopping("loss")])
    with pytest.raises(TypeError, match="EarlyStopping are Lightning Callbacks, which need a LightningModule"):
        trainer.fit(nn.Linear(1, 1), weft.DictDataset({"x": torch.zeros(2, 1)}))


def test_a_callback_without_effect_is_named_and_one_that_changes_the_loop_refused() -> None:
    with pytest.warns(UserWarning, match="LearningRateMonitor has no effect with weft.Trainer: learning rates are"):
        weft_trainer(max_epochs=1, callbacks=[LearningRateMonitor()]).fit(line(), **loaders())
    with pytest.raises(NotImplementedError, match="from weft.integrations.lightning import Trainer` runs it as it is"):
        weft_trainer(max_epochs=1, callbacks=[StochasticWeightAveraging(0.1)]).fit(line(), **loaders())


def test_a_model_checkpoint_goes_with_a_run_folder(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "theirs", monitor="val_loss")
    trainer = weft_trainer(max_epochs=1, callbacks=[callback], root_dir=str(tmp_path), checkpoint=True)
    trainer.fit(line(), **loaders())
    assert Path(callback.best_model_path).is_file() and (trainer.run.run_dir / "metrics.csv").is_file()


def test_a_failing_test_reaches_callbacks_and_loggers() -> None:
    class Fails(LineModule):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("mine")

    class Notes(CSVLogger):
        def finalize(self, status: str) -> None:
            seen.append(status)

    seen: list[Any] = []
    callback = LambdaCallback(on_exception=lambda trainer, module, error: seen.append(error.args[0]))
    with pytest.raises(KeyError, match="mine"):
        weft_trainer(callbacks=[callback], loggers=Notes("unused")).test(Fails(), point_loader(4))
    assert seen == ["mine", "failed"]


def test_an_error_reaches_the_callbacks_and_ends_the_run() -> None:
    class Fails(LineModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("mine")

    seen: list[str] = []
    callback = LambdaCallback(
        on_exception=lambda trainer, module, error: seen.append(repr(error)),
        on_fit_end=lambda *a: seen.append("fit end"),
    )
    module = Fails()
    with pytest.raises(KeyError, match="mine"):
        weft_trainer(max_epochs=1, callbacks=[callback]).fit(module, **loaders())
    assert seen == ["KeyError('mine')"] and "log" not in vars(module)


# ------------------------------------------------------------------ what the module sees


def test_the_trainer_that_a_module_reads_says_what_lightnings_says() -> None:
    read = (
        "current_epoch",
        "global_step",
        "max_epochs",
        "max_steps",
        "min_epochs",
        "estimated_stepping_batches",
        "num_training_batches",
        "num_val_batches",
        "is_global_zero",
        "global_rank",
        "local_rank",
        "node_rank",
        "world_size",
        "num_nodes",
        "num_devices",
        "accumulate_grad_batches",
        "gradient_clip_val",
        "gradient_clip_algorithm",
        "training",
        "validating",
        "testing",
        "predicting",
        "sanity_checking",
        "should_stop",
        "is_last_batch",
        "check_val_every_n_epoch",
        "fast_dev_run",
        "limit_train_batches",
        "limit_val_batches",
        "overfit_batches",
        "precision",
        "interrupted",
        "received_sigterm",
        "evaluating",
        "enable_validation",
        "barebones",
    )

    class Reads(LineModule):
        def _read(self) -> None:
            values = {name: getattr(self.trainer, name) for name in read}
            values["state"] = (self.trainer.state.fn, self.trainer.state.stage, self.trainer.state.status)
            values["lrs"] = [o.param_groups[0]["lr"] for o in self.trainer.optimizers]
            values["own"] = (self.current_epoch, self.global_step, self.device, self.global_rank)
            vars(self).setdefault("seen", []).append(values)

        def on_train_start(self) -> None:
            self._read()

        def on_train_batch_end(self, *args: Any) -> None:
            self._read()

        def on_validation_batch_end(self, *args: Any) -> None:
            self._read()

        def on_train_epoch_end(self) -> None:
            self._read()

        def on_train_end(self) -> None:
            self._read()

    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm"}
    theirs, _, ours, _ = both(lambda: (Reads(), loaders()), max_epochs=2, **options)
    for mine, expected in zip(ours.seen, theirs.seen, strict=True):
        assert mine == expected


def test_anything_else_raises_an_attribute_error_that_names_it() -> None:
    class Reads(LineModule):
        def on_train_start(self) -> None:
            assert not hasattr(self.trainer, "fit_loop")
            self.trainer.curent_epoch  # noqa: B018

    with pytest.raises(
        AttributeError, match="self.trainer has no 'curent_epoch' under weft; did you mean 'current_epoch'"
    ):
        weft_trainer(max_epochs=1).fit(Reads(), **loaders())


def test_a_module_may_stop_training_but_not_before_min_epochs() -> None:
    class Stops(LineModule):
        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.should_stop = True

    for min_epochs, steps in ((0, 1), (2, 8)):
        _, theirs, _, ours = both(lambda: (Stops(), loaders()), max_epochs=5, min_epochs=min_epochs)
        assert theirs.global_step == ours.global_step == steps


def test_a_module_can_be_copied_and_pickled_while_it_trains_and_after() -> None:
    copies: list[Any] = []
    module = line()
    callback = LambdaCallback(on_train_epoch_end=lambda trainer, m: copies.append(copy.deepcopy(m)))
    weft_trainer(max_epochs=1, callbacks=[callback]).fit(module, **loaders())
    assert same(weights(copies[0]), weights(module))
    assert same(weights(pickle.loads(pickle.dumps(module))), weights(module))


def test_batch_hooks_of_a_data_module_go_before_those_of_the_module() -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return point_loader(8)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 0, batch[1]]

    class Sees(LineModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            raise AssertionError("the data module has one")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert not batch[0].any()
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="has no val_dataloader"):
        weft_trainer(max_epochs=1).fit(Sees(), datamodule=Data())


def test_a_lightning_module_is_recognised_by_its_bases() -> None:
    class LightningModule(nn.Linear):
        """Another one's class of that name."""

    assert adapter_for(line()) is not None
    assert adapter_for(LightningModule(1, 1)) is None and adapter_for(nn.Linear(1, 1)) is None
    callback = EarlyStopping("loss")
    assert split_hooks([print, callback]) == ([print], [callback])


def test_an_interrupted_fit_goes_on_where_it_was_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Interrupts(LineModule):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1 and not seen:
                signal.raise_signal(signal.SIGINT)

    seed_everything(0)
    module = Interrupts()
    callback = LambdaCallback(on_exception=lambda trainer, module, error: seen.append(type(error).__name__))
    trainer = weft_trainer(max_epochs=4, callbacks=[callback])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(module, **loaders())
    assert seen == ["KeyboardInterrupt"] and trainer.run.result.stop_reason == "interrupted"
    assert trainer.fit(module, **loaders()).epochs == 4
    whole = line()
    weft_trainer(max_epochs=4).fit(whole, **loaders())
    assert same(weights(module), weights(whole))
