"""What a module, a data module and callbacks see as `trainer`: what they commonly read, and nothing else.

An attribute that is not here raises an AttributeError that names it.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from weft.integrations.lightning.names import is_a, lightning_class
from weft.types import suggest

if TYPE_CHECKING:
    from weft.integrations.lightning.context import Context


class _NoProfiler:
    """Lightning's profiler for modules that time their own actions: here it does nothing."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def start(self, action_name: str) -> None: ...

    def stop(self, action_name: str) -> None: ...


class _Connector:
    """What Lightning's own `LightningModule.log` asks its connectors: here always no."""

    is_distributed = False

    def should_reset_tensors(self, fx: str) -> bool:
        return False


class TrainerView:
    """Lightning's trainer as far as it is read: counters, limits, data, metrics, loggers, the stage.

    What may be set: `should_stop`, `accumulate_grad_batches`, `optimizers`, and attributes of your own.
    """

    barebones = sanity_checking = received_sigterm = interrupted = False
    overfit_batches = reload_dataloaders_every_n_epochs = num_sanity_val_steps = 0
    val_check_interval, min_steps, ckpt_path = 1.0, None, None
    profiler = _NoProfiler()
    _logger_connector = _accelerator_connector = _Connector()

    def __init__(self, run: Context) -> None:
        config = run.state.config
        self._run, self._should_stop = run, False
        self.lightning_module = self.model = run.module
        self.accumulate_grad_batches, self.gradient_clip_val = config.accumulate, config.clip
        algorithm = lightning_class(run.module, "utilities.GradClipAlgorithmType")
        self.gradient_clip_algorithm = algorithm(config.clip_algorithm) if config.clip is not None else None
        self.check_val_every_n_epoch, self.fast_dev_run = config.validate_every, config.fast_dev_run
        self.log_every_n_steps, self.precision = config.log_every or 0, config.precision
        self.min_epochs, self.num_nodes = config.min_epochs, config.num_nodes
        self.default_root_dir = config.root_dir or "."
        self.state = lightning_class(run.module, "trainer.states.TrainerState")()
        self._fns = lightning_class(run.module, "trainer.states.TrainerFn")
        self._stages = lightning_class(run.module, "trainer.states.RunningStage")
        self._status = lightning_class(run.module, "trainer.states.TrainerStatus")
        self._callback_metrics: dict[str, Tensor] = {}
        self._logged_metrics: dict[str, Tensor] = {}
        self._progress_bar_metrics: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        known = sorted(n for n in {*dir(type(self)), *vars(self)} if n[0] != "_")
        raise AttributeError(
            f"self.trainer has no {name!r} under weft{suggest(name, known)}; it has {', '.join(known)}. "
            "The run itself is self.trainer.weft_run."
        )

    @property
    def weft_run(self) -> Context:
        """The run of weft that trains the module."""
        return self._run

    # ------------------------------------------------------------------ where training is

    @property
    def current_epoch(self) -> int:
        """The number of the epoch, from 0."""
        return self._run.progress.epoch

    @property
    def global_step(self) -> int:
        """Steps of optimizers so far (of all of them)."""
        return self._run.progress.step

    @property
    def max_epochs(self) -> int:
        """The number of epochs at which this fit ends."""
        run = self._run
        return run.progress.last_epoch or (1 if run.state.config.fast_dev_run else run.state.config.epochs)

    @property
    def max_steps(self) -> int:
        """The number of optimizer steps at which this fit ends, -1: no limit."""
        last = self._run.progress.last_step
        return -1 if last is None else last

    @property
    def is_last_batch(self) -> bool:
        """Whether this is the last training batch of the epoch."""
        return self._run.is_last_batch

    @property
    def should_stop(self) -> bool:
        """Whether training ends after this batch (and not before `min_epochs`). May be set."""
        return self._should_stop or self._run.state.control.stop_reason is not None

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self._should_stop = bool(value)

    @property
    def estimated_stepping_batches(self) -> float:
        """How often the optimizer will have stepped at the end of this fit.

        -1 or max_steps where data has no length.
        """
        total = self.num_training_batches
        if math.isinf(total):
            return self.max_steps
        steps = math.ceil(total / self.accumulate_grad_batches) * max(self.max_epochs, 1)
        return steps if self.max_steps == -1 else min(steps, self.max_steps)

    # ------------------------------------------------------------------ the stage

    def enter(self, fn: str, stage: str) -> None:
        """Say what is done: fn "fit", "validate", "test" or "predict"; stage "train", "validate", ..."""
        self.state.fn, self.state.stage, self.state.status = self._fns(fn), self._stages(stage), self._status.RUNNING

    def leave(self, status: str = "finished") -> None:
        """Say that it is over: "finished" or "interrupted"."""
        self.state.stage, self.state.status = None, self._status(status)

    @property
    def training(self) -> bool:
        """Whether a training epoch is going on (validation within a fit is not training)."""
        return self.state.stage == self._stages.TRAINING

    @property
    def validating(self) -> bool:
        """Whether validation is going on."""
        return self.state.stage == self._stages.VALIDATING

    @property
    def testing(self) -> bool:
        """Whether a test is going on."""
        return self.state.stage == self._stages.TESTING

    @property
    def predicting(self) -> bool:
        """Whether prediction is going on."""
        return self.state.stage == self._stages.PREDICTING

    @property
    def evaluating(self) -> bool:
        """Whether validation or a test is going on."""
        return self.validating or self.testing

    # ------------------------------------------------------------------ data

    @property
    def datamodule(self) -> Any:
        """The LightningDataModule, None without one."""
        return self._run.datamodule

    @property
    def train_dataloader(self) -> Any:
        """The training loader(s), None before they were asked for."""
        return self._run.sources["train"].loaders

    @property
    def val_dataloaders(self) -> Any:
        """The validation loader(s), None before they were asked for."""
        return self._run.sources["dev"].loaders

    @property
    def test_dataloaders(self) -> Any:
        """The test loader(s), None before they were asked for."""
        return self._run.sources["test"].loaders

    @property
    def predict_dataloaders(self) -> Any:
        """The prediction loader(s), None before they were asked for."""
        return self._run.sources["predict"].loaders

    @property
    def num_training_batches(self) -> float:
        """Training batches of an epoch, inf where the data has no length."""
        return self._run.sources["train"].total

    @property
    def num_val_batches(self) -> list[float]:
        """Validation batches by loader."""
        return self._batches("dev")

    @property
    def num_test_batches(self) -> list[float]:
        """Test batches by loader."""
        return self._batches("test")

    @property
    def num_predict_batches(self) -> list[float]:
        """Prediction batches by loader."""
        return self._batches("predict")

    def _batches(self, split: str) -> list[float]:
        source = self._run.sources[split]
        return source.num_batches if source.is_defined else []

    @property
    def enable_validation(self) -> bool:
        """Whether there are a validation_step and data for it."""
        return self._run.sources["dev"].is_defined

    @property
    def limit_train_batches(self) -> float:
        """The limit on training batches, 1.0: none."""
        return self._limit("train")

    @property
    def limit_val_batches(self) -> float:
        """The limit on validation batches, 1.0: none."""
        return self._limit("dev")

    @property
    def limit_test_batches(self) -> float:
        """The limit on test batches, 1.0: none."""
        return self._limit("test")

    @property
    def limit_predict_batches(self) -> float:
        """The limit on prediction batches, 1.0: none."""
        return self._limit("predict")

    def _limit(self, split: str) -> float:
        limit = self._run.state.config.limit(split)
        return 1.0 if limit is None else limit

    # ------------------------------------------------------------------ optimizers

    @property
    def strategy(self) -> Any:
        """What Lightning's own methods call beneath them."""
        return self._run.strategy

    @property
    def precision_plugin(self) -> Any:
        """Clipping and precision, as Lightning's own methods call them."""
        return self._run.strategy.precision_plugin

    @property
    def scaler(self) -> Any:
        """The gradient scaler of 16-mixed, else None."""
        return self.precision_plugin.scaler

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers in the order of `configure_optimizers`."""
        return self._run.strategy.optimizers

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """The schedulers with when they step."""
        return self._run.schedulers.configs

    # ------------------------------------------------------------------ processes

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the first of all processes."""
        return self._run.fabric.is_global_zero

    @property
    def global_rank(self) -> int:
        """The number of this process among all."""
        return self._run.fabric.global_rank

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine."""
        return self._run.fabric.local_rank

    @property
    def node_rank(self) -> int:
        """The number of this machine."""
        return self._run.fabric.node_rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self._run.fabric.world_size

    @property
    def device_ids(self) -> list[int]:
        """The indices of the devices on this machine."""
        return [self._run.fabric.device.index or 0]

    @property
    def num_devices(self) -> int:
        """The number of devices on this machine."""
        return len(self.device_ids)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print in the first process of each machine."""
        if self.local_rank == 0:
            print(*args, **kwargs)

    # ------------------------------------------------------------------ callbacks, loggers, metrics

    @property
    def callbacks(self) -> list[Any]:
        """The callbacks, in the order in which they are called."""
        return self._run.callbacks

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        """The callbacks that save."""
        return [c for c in self.callbacks if is_a(c, "Checkpoint")]

    @property
    def checkpoint_callback(self) -> Any:
        """The first callback that saves, None without one."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[Any]:
        """The callbacks that stop early."""
        return [c for c in self.callbacks if is_a(c, "EarlyStopping")]

    @property
    def early_stopping_callback(self) -> Any:
        """The first callback that stops early, None without one."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> Any:
        """The progress bar among the callbacks, None without one (weft's own line is none)."""
        return next((c for c in self.callbacks if is_a(c, "ProgressBar")), None)

    @property
    def loggers(self) -> list[Any]:
        """The loggers of the run."""
        return self._run.loggers

    @property
    def logger(self) -> Any:
        """The first logger, None without one."""
        return next(iter(self.loggers), None)

    @property
    def log_dir(self) -> str | None:
        """The folder that this run writes into."""
        return str(self._run.run_dir) if self._run.run_dir is not None else self.default_root_dir

    @property
    def _results(self) -> Any:
        return None if self.state.stage is None or self.predicting else self._run.results

    def take(self) -> None:
        """Make what was logged (at the end of an epoch: reduced) part of the metrics below."""
        results, of_epoch = self._run.results, self._run.at_epoch_end
        if results.entries:
            self._logged_metrics.update(results.values("logger", of_epoch))
            self._callback_metrics.update(results.callback_values(of_epoch))
            self._progress_bar_metrics.update(_floats(results.values("prog_bar", of_epoch)))

    def _take(self) -> None:
        if self._results is not None:
            self.take()

    def reset_metrics(self) -> None:
        """Forget what was logged, before a fit or an evaluation."""
        self._callback_metrics, self._logged_metrics, self._progress_bar_metrics = {}, {}, {}

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """Everything logged, by name: what callbacks and schedulers monitor."""
        self._take()
        return self._callback_metrics

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """Everything logged, by the names under which loggers get it."""
        self._take()
        return self._logged_metrics

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """What was logged with prog_bar=True, as numbers."""
        self._take()
        return self._progress_bar_metrics

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        """Write a checkpoint in Lightning's own format: its `load_from_checkpoint` and `weft.load_weights` read it."""
        from weft.integrations.lightning.states import save_lightning_checkpoint

        if storage_options is not None:
            raise TypeError("save_checkpoint: storage_options are not supported; the file is written as it is.")
        save_lightning_checkpoint(self._run, filepath, bool(weights_only))


def _floats(values: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.item() if value.numel() == 1 else value.tolist() for name, value in values.items()}
