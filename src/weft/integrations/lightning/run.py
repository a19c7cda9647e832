"""LightningRun: a training run of a LightningModule, in Lightning's order, on the core's loop.

    fit:  prepare_data, setup, configure_model, configure_optimizers, on_fit_start
          train_dataloader, val_dataloader, on_train_start
          for epoch: on_train_epoch_start
              for batch: (see update.py)
              validation (see loops.py)
              on_train_epoch_end, schedulers that read a metric
          on_train_end, on_fit_end, teardown

There is no sanity check before training, as with `num_sanity_val_steps=0`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from weft.data.data import Data
from weft.data.datasets import DictDataset
from weft.devices import seeding
from weft.events import Hook
from weft.integrations.lightning.data import STAGES, STEPS, Source, Stream, Tape, Transfer, generators_of, is_datamodule
from weft.integrations.lightning.hooks import Hooks, with_model_callbacks
from weft.integrations.lightning.log import Results, uses_own_log
from weft.integrations.lightning.loops import evaluate, predict
from weft.integrations.lightning.names import overrides, refuse_legacy
from weft.integrations.lightning.optimizers import Schedulers, configured
from weft.integrations.lightning.states import is_idle, resume_module, resume_training, state_of
from weft.integrations.lightning.strategy import Strategy, step_context
from weft.integrations.lightning.update import make_update
from weft.integrations.lightning.view import TrainerView
from weft.loop.run import Run
from weft.step.instrument import watched, watched_batches
from weft.step.optimizers import DEFAULT
from weft.step.state import FOUND_AGAIN, RunState
from weft.step.trained import adopt

if TYPE_CHECKING:
    from weft.loop.trainer import Trainer

FNS = {"dev": "validate", "test": "test", "predict": "predict"}


class LightningRun(Run):
    """A run of a LightningModule: the core's run, with the module's steps, hooks, optimizers, loaders and logs."""

    takes_callbacks = brings_data = True
    names_are_apart = False  # what the module logs replaces the core's
    monitors_by_default = False  # nothing is monitored unless it is named
    strategy: Strategy
    schedulers: Schedulers
    training_step, skips_backward = None, False
    unsynced = staticmethod(nullcontext)
    count_zero_grad = staticmethod(lambda what: None)

    def __init__(self, trainer: Trainer, problem: nn.Module, previous: Run | None = None) -> None:
        super().__init__(trainer, problem, previous)
        refuse_legacy(problem)
        _refuse_options(trainer)
        self.module: Any = problem
        self.datamodule: Any = None
        self.callbacks: list[Any] = list(trainer.callbacks)
        self.view = TrainerView(self)
        self.hooks_of = Hooks(self.view, self.module, self.callbacks)
        self.sources = {split: Source(self, split) for split in STAGES}
        self.results_of_training, self.results_of_evaluation = Results(self, True), Results(self, False)
        self.results = self.results_of_training
        self.tape = Tape(lambda: generators_of(self.sources["train"].flat))
        self.generators_to_resume: list[Tensor] = []
        self.batch_idx, self.is_last_batch, self.skip_rest_of_epoch = 0, False, False
        self.began = self.at_epoch_end = False
        self.schedulers = Schedulers(self, [])
        self._schedules_before = previous.schedulers.configs if isinstance(previous, LightningRun) else []
        self._stream: Stream | None = None
        self._in_fit = self._is_training = self._plateau_waits = False
        self._dtype = torch.get_default_dtype()

    # ------------------------------------------------------------------ what was given

    def data_of_fit(self, data: Any, dev: Any, datamodule: Any, setup_kwargs: Mapping[str, Any]) -> Callable[[], Data]:
        """Loaders (`data`, `dev`), a `datamodule` (no `setup_kwargs`), or nothing: the module brings its own."""
        self._take_data("fit", data, datamodule, setup_kwargs, {"train": data, "dev": dev})
        return self._fit_data

    def data_to_evaluate(
        self, split: str, data: Any, setup_kwargs: Mapping[str, Any], last: RunState | None
    ) -> Callable[[], Data]:
        """`data`: loaders or a data module (no `setup_kwargs`) for a `split`, or nothing: the module brings its own."""
        self._take_data(FNS[split], data, None, setup_kwargs, {split: data})
        given: dict[str, Any] = {"train": None, split: self.sources[split]}
        return lambda: Data(**given)

    def _take_data(self, fn: str, data: Any, datamodule: Any, kwargs: Mapping[str, Any], given: dict[str, Any]) -> None:
        if kwargs:
            hint = "; weft resumes with fit(resume=...)" if "ckpt_path" in kwargs else ""
            raise TypeError(f"{fn}: unknown arguments {sorted(kwargs)} for a LightningModule{hint}.")
        if is_datamodule(data):
            if datamodule is not None:
                raise TypeError(f"{fn}: two data modules were given.")
            datamodule = data
            given = {split: None if value is data else value for split, value in given.items()}
        if datamodule is not None and any(value is not None for value in given.values()):
            raise TypeError(f"{fn}: loaders and a data module were given; pass one of them.")
        for split, value in given.items():
            if isinstance(value, Data | DictDataset) or (callable(value) and not hasattr(value, "__iter__")):
                raise TypeError(
                    f"{fn}: a LightningModule takes loaders or a LightningDataModule, got {type(value).__name__}."
                )
            self.sources[split].given = value
        self.datamodule = datamodule

    @property
    def settings(self) -> dict[str, Any]:
        """What module and data module keep by `save_hyperparameters`."""
        kept = [owner.hparams for owner in (self.datamodule, self.module) if owner is not None]
        return {str(name): value for hparams in kept for name, value in dict(hparams).items()}

    def has(self, split: str) -> bool:
        """Whether there is data for `split`, and a step."""
        return self.sources[split].is_defined

    def _fit_data(self) -> Data:
        self._begin_stage("fit", "train")
        train, dev = self.sources["train"], self.sources["dev"]
        name = type(self.module).__name__
        for method in ("training_step", "configure_optimizers"):
            if not overrides(self.module, method):
                raise TypeError(f"{name} has no {method}; training needs one.")
        if not train.is_defined:
            raise TypeError(f"{name} has no train_dataloader, and neither loaders nor a data module were given.")
        if not self.module.automatic_optimization and (
            self.state.config.accumulate > 1 or self.state.config.clip is not None
        ):
            raise ValueError(
                f"{name} optimizes manually: accumulate and clip have no effect; do both in training_step."
            )
        has_step = overrides(self.module, "validation_step")
        if has_step != dev.is_defined and (has_step or dev.given is not None):
            lacks = "val_dataloader" if has_step else "validation_step"
            self.state.warn_once(f"{name} has no {lacks}: nothing is validated.")
        return Data(train=train, dev=dev if dev.is_defined else None)

    # ------------------------------------------------------------------ a stage: fit, validate, test, predict

    def place(self, problem: nn.Module) -> nn.Module:
        """As it is: a module is moved after its setup, see `_begin_stage`."""
        return problem

    def _begin_stage(self, fn: str, stage: str) -> None:
        module, view = self.module, self.view
        if self.fabric.world_size > 1:
            raise NotImplementedError(
                "weft.Trainer trains a LightningModule in one process: devices and num_nodes must be 1. With "
                "`from weft.integrations.lightning import Trainer` it trains in several."
            )
        view.enter(fn, stage)
        view.reset_metrics()
        self.strategy = Strategy(self)
        module.trainer = view
        if self.datamodule is not None:
            self.datamodule.trainer = view
        if not uses_own_log(module):
            vars(module)["log"] = log = self.results.make_log(module)
            vars(module)["log_dict"] = self.results.make_log_dict(log)
        self.callbacks = with_model_callbacks(
            list(self.state.trainer.callbacks), self.hooks_of.call_module("configure_callbacks")
        )
        self.callbacks = [callback for callback in self.callbacks if not is_idle(self, callback)]
        for callback in self.callbacks:
            callback.log, callback.log_dict = module.log, module.log_dict
        self.hooks_of.callbacks = self.callbacks
        for part in module.modules():
            if hasattr(part, "_device"):
                part._device = self.fabric.device
        self._prepare_data()
        if self.datamodule is not None:
            self.datamodule.setup(stage=fn)
        self.hooks_of.call("setup", stage=view.state.fn)
        if overrides(module, "configure_model"):
            with self.fabric.init_tensor():
                self.hooks_of.call_module("configure_model")
        super().place(module)
        if fn == "fit" and not any(part.training for part in module.modules()):
            for name in _TRAINED.get(module, ()):  # eval mode is how the last fit has left it, not what a user wants
                module.get_submodule(name).training = True
        if fn == "fit" and self._resumed is not None:
            resume_module(self, _own_state(self._resumed), self._resumed["problem"])

    def _prepare_data(self) -> None:
        """Once per node, or once for all of them if the owner says so."""
        for owner in (self.datamodule, self.module):
            if owner is not None and overrides(owner, "prepare_data"):
                everywhere = self.fabric.local_rank == 0
                if everywhere if owner.prepare_data_per_node else self.fabric.is_global_zero:
                    self.hooks_of.call_module("prepare_data") if owner is self.module else owner.prepare_data()
                self.fabric.barrier("prepare_data")

    def _end_stage(self, fn: str, status: str = "finished") -> None:
        if status == "finished":
            if self.datamodule is not None:
                self.datamodule.teardown(stage=fn)
            self.hooks_of.call("teardown", stage=self.view.state.fn)
        for name in ("log", "log_dict"):
            vars(self.module).pop(name, None)
        self.module._current_fx_name = self.module._metric_attributes = None
        for source in self.sources.values():
            source.end_workers()
        self.view.leave(status)

    def _tell_of(self, error: BaseException) -> None:
        self.hooks_of.call_callbacks("on_exception", error)
        if self.datamodule is not None:
            self.datamodule.on_exception(error)

    def _alone(self, split: str, loop: Callable[[LightningRun, Source], Any]) -> Any:
        """An evaluation or prediction outside of a fit, from prepare_data to teardown."""
        fn, status, dtype = FNS[split], "interrupted", torch.get_default_dtype()
        self.results = self.results_of_evaluation
        self.sources[split].forget()
        torch.set_default_dtype(self._dtype)
        self._begin_stage(fn, fn)
        try:
            if split != "predict" and not overrides(self.module, STEPS[split]):
                raise TypeError(f"{type(self.module).__name__} has no {STEPS[split]}.")
            self.module.zero_grad()
            found = loop(self, self.sources[split])
            status = "finished"
        except BaseException as error:
            self._tell_of(error)
            for logger in self.loggers:
                logger.finalize("failed")
            raise
        finally:
            self._end_stage(fn, status)
            torch.set_default_dtype(dtype)
        return found

    # ------------------------------------------------------------------ the fit

    def put_in_train_mode(self) -> None:
        """Modules that were put into eval mode stay there."""

    def begin_phases(self, resumed: bool) -> None:
        """Optimizers and the update; a second fit goes on with those it has. The module's own hooks come first."""
        self.listen([Events(self), *self.state.hooks])
        torch.set_default_dtype(self._dtype)  # of 64-true: only within steps, hooks and loaders keep theirs
        if resumed or not self.optimizers:
            optimizers, self._schedules_before = configured(self)
            plain = [getattr(o, "_optimizer", o) for o in optimizers]
            self.state.training.optimizers = {DEFAULT if len(plain) == 1 else str(i): o for i, o in enumerate(plain)}
        adopt(self.state)
        self.strategy.use(list(self.optimizers.values()))
        self.schedulers = Schedulers(self, self._schedules_before)
        self.strategy.bind()
        self._in_fit = True
        self.update = make_update(self)

    def begin_data(self) -> None:
        """Ask for the loaders, in Lightning's order; the first iterator of training is started here."""
        self.began = True
        self.sources["train"].load()
        self._stream = self.sources["train"].open(self.tape)
        if self.sources["dev"].is_defined and (self.progress.epoch + 1) % self.state.config.validate_every == 0:
            self.view.enter("fit", "validate")
            self.sources["dev"].load()
            self.view.enter("fit", "train")

    def start_epoch(self) -> None:
        """What precedes the first batch of an epoch."""
        if not self._is_training:
            self._is_training = True
            self.module.zero_grad()
            if not self.began:
                self.begin_data()
            self.hooks_of.call("on_train_start")
            if self.state.kept.random_to_resume is not None and self.progress.batch == 0:
                self._put_random()
        self.at_epoch_end = self.skip_rest_of_epoch = self.is_last_batch = False
        if self.progress.batch == 0:
            self.hooks_of.call("on_train_epoch_start")

    def _put_random(self) -> None:
        self.tape.set_own(self.generators_to_resume)
        seeding.set_random_state(self.state.kept.random_to_resume or {})
        self.state.kept.random_to_resume, self.generators_to_resume = None, []

    def batches(self, split: str = "train") -> Iterator[Any]:
        """The batches of this epoch, one by one (also when accumulating), as the steps get them."""
        source = self.sources[split]
        transfer, progress = Transfer(self), self.progress
        if split != "train":
            for batch, _, loader in source.open():
                yield transfer(batch, loader)
            return
        stream = self._stream_of_epoch()  # its worker processes end with this generator
        for batch, number, _ in watched_batches(self.state.hooks, stream):
            self.batch_idx, self.is_last_batch = number, stream.is_last
            if transfer.is_needed:
                batch = transfer(batch, 0)
            progress.batch += 1
            self.announce(batch)
            yield batch
            self.state.step.batch = None
            if not self.is_accumulating:
                self._rest()
            self._heed_should_stop()
            if self.state.control.stop_reason or self.skip_rest_of_epoch:
                if self.state.control.stop_reason in FOUND_AGAIN and not (self.is_last_batch or self.is_accumulating):
                    self.leave_open()
                return
        if progress.batch == 0:
            raise ValueError("The training data yielded no batch: there is nothing to train on.")

    def _stream_of_epoch(self) -> Stream:
        """A new pass through the loaders; after a resume the old one, up to its place."""
        stream, self._stream = self._stream, None
        if self.progress.batch:
            self.tape.play(self.tape.states)
            stream = self.sources["train"].open(self.tape)
            stream.skip(self.progress.batch)
            if self.state.kept.random_to_resume is not None:
                self._put_random()
        elif stream is None:
            self.tape.states = []
            stream = self.sources["train"].open(self.tape)
        return stream

    @property
    def renews(self) -> tuple[str, ...]:
        """What of the module's optimizers and schedulers wins over the checkpoint."""
        return self._renew

    @property
    def step_context(self) -> Callable[[], Any] | None:
        """What a step is called in, in the run's precision."""
        return step_context(self.fabric)

    @property
    def is_accumulating(self) -> bool:
        """Whether the optimizer waits for further batches: it steps after every k-th, and after the last."""
        every = self.view.accumulate_grad_batches
        return every != 1 and (self.batch_idx + 1) % every != 0 and not (self.is_last_batch or self.skip_rest_of_epoch)

    def count_optimizer_step(self, what: str = "completed") -> None:
        """The step of an optimizer is `what`: "ready" or "completed"."""
        self.progress.step += what == "completed"

    def end_batch(self, batch: Any, loss: Tensor, stepped: bool) -> None:
        """What an update does last with its batch and loss: call weft's own hooks where it `stepped`, or was manual."""
        if stepped or not self.module.automatic_optimization:
            self.progress.step -= 1  # it was counted when the optimizer stepped, as the hooks in between expect
            self.end_step(batch, loss)

    def step_plateau_schedulers(self, wait: bool) -> None:
        """Schedulers that read a metric after each step; after the last batch they `wait` for validation."""
        self._plateau_waits = wait
        if not wait:
            self.schedulers.step("step", plateau=True)

    def _heed_should_stop(self) -> None:
        if self.view._should_stop and self.progress.epoch >= self.state.config.min_epochs:
            self.stop("should_stop")

    # ------------------------------------------------------------------ evaluation, end of epoch, end of fit

    @property
    def validation_due(self) -> bool:
        """As in the core, but not in an epoch that the module has cut short."""
        return not self.skip_rest_of_epoch and super().validation_due

    def evaluate(self, split: str = "dev") -> dict[str, float]:
        """What the module logged in validation within the fit; outside of it, a stage of its own. Floats by name."""
        if not (self._in_fit and split == "dev"):
            return self._alone(split, evaluate)
        if not self.sources["dev"].is_defined:
            return {}
        self.state.call("on_validation_start")
        self.view.take()
        self.view.enter("fit", "validate")
        if not self.is_accumulating:
            self.hooks_of.call_module("on_validation_model_zero_grad")
        self.results = self.results_of_evaluation
        metrics = watched(self.state.hooks, "evaluation", evaluate)(self, self.sources["dev"])
        self.results, self.at_epoch_end = self.results_of_training, False
        self.view.enter("fit", "train")
        if self._plateau_waits:
            self.step_plateau_schedulers(wait=False)
        if self.state.epoch.is_open:
            self.state.epoch.evaluated.update(metrics)
        self.state.call("on_validation_end", metrics)
        return metrics

    def predict(self, keys: Sequence[str] | None = None) -> Any:
        """What `predict_step` returned for each batch. Raises TypeError for `keys`: it has none."""
        if keys is not None:
            raise TypeError(f"predict: keys={list(keys)}; a LightningModule's predict_step says what it returns.")
        return self._alone("predict", predict)

    def _begin_epoch(self) -> bool:
        self._close_epoch()
        self._heed_should_stop()
        more = super()._begin_epoch()
        if not more:
            self._end_training()
        return more

    def _close_epoch(self) -> None:
        if self.state.epoch.is_open:
            if self._plateau_waits:
                self.step_plateau_schedulers(wait=False)
            self.view.take()
            self.at_epoch_end = True
            self.hooks_of.call_callbacks("on_train_epoch_end", monitoring=False)
            self.hooks_of.call_module("on_train_epoch_end")
            self.hooks_of.call_callbacks("on_train_epoch_end", monitoring=True)
            self.view.take()
            if self.is_last_batch or self.skip_rest_of_epoch:
                self.schedulers.step("epoch", plateau=True)
            # what the module logged becomes part of the epoch's metrics; its own train_loss replaces the core's
            self.state.epoch.logged.add(
                {name: float(value) for name, value in self.results_of_training.by_name().items()}, 1
            )
            self.results_of_training.reset()
        super()._close_epoch()

    def tell_of_nothing_trained(self) -> None:
        """Nothing: a module may step its own optimizers, or skip an epoch."""

    def step_metrics(self) -> dict[str, float]:
        """What loggers get every `log_every` steps: the core's means, and what the module logged for the step."""
        logged = {name: float(v) for name, v in self.results_of_training.values("logger", of_epoch=False).items()}
        return {**super().step_metrics(), **logged}

    def _end_training(self) -> None:
        if self._is_training:
            self._is_training = False
            self.hooks_of.call("on_train_end")

    def _finish(self, error: BaseException | None) -> None:
        if error is None:
            self._end_training()
        super()._finish(error)
        _TRAINED[self.module] = [name for name, part in self.module.named_modules() if part.training]
        self.module.eval()

    def put_in_eval_mode(self) -> None:
        """Later: Lightning's last hooks see the modes of training."""

    @property
    def loggers(self) -> list[Any]:
        """Lightning's loggers, those that were given as objects first; weft's own lack what callbacks ask of them."""
        given = self.state.trainer.options["loggers"]
        given = [g for g in (given if isinstance(given, list | tuple) else [given]) if hasattr(g, "log_metrics")]
        all_of_them = next((hook.loggers for hook in self.state.hooks if hasattr(hook, "loggers")), [])
        theirs = [logger for logger in all_of_them if hasattr(logger, "after_save_checkpoint")]
        return given + [logger for logger in theirs if not any(logger is g for g in given)]


_TRAINED: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()
"""The parts of a module that were in training mode when its last fit ended."""


class Events(Hook):
    """The module's hooks at the core's events; its state is what a checkpoint holds for Lightning."""

    def __init__(self, run: LightningRun) -> None:
        self.run = run

    def on_fit_start(self, trainer: Any) -> None:
        """The hooks of the same name; on resume also the loaders, which may draw random numbers."""
        self.run.hooks_of.call("on_fit_start")
        if self.run._resumed is not None and _own_state(self.run._resumed)["began"]:
            self.run.begin_data()
            self.run._stream = None

    def on_epoch_start(self, trainer: Any) -> None:
        """Begin training, begin the epoch."""
        self.run.start_epoch()

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        """The hooks of the same name."""
        self.run._tell_of(error)

    def on_fit_end(self, trainer: Any, result: Any) -> None:
        """After success the hooks of the same name and teardown; otherwise only what was put into the module goes."""
        run, reason = self.run, result.stop_reason
        if reason == "interrupted":
            self.on_exception(trainer, KeyboardInterrupt())
        run._in_fit = False
        if reason not in ("interrupted", "error"):
            run.hooks_of.call("on_fit_end")
        run._end_stage("fit", "finished" if reason not in ("interrupted", "error") else "interrupted")

    def state_dict(self) -> dict[str, Any]:
        return state_of(self.run)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        resume_training(self.run, state_dict)


def _own_state(resumed: Mapping[str, Any]) -> dict[str, Any]:
    """What `Events` saved in a checkpoint. Raises ValueError for a checkpoint of another kind of problem."""
    for name, state in resumed["hooks"].items():
        if name == "Events":
            return state
    raise ValueError(
        "The checkpoint is not of a LightningModule; weft.load_weights(module, path) takes its weights only."
    )


def _refuse_options(trainer: Trainer) -> None:
    """Options that a LightningModule decides itself."""
    options = ("optimizer", "scheduler", "phases", "metrics", *STEPS.values())
    if given := [name for name in options if trainer.options[name] is not None]:
        raise TypeError(
            f"Trainer: {given} have no effect with a LightningModule, which decides this itself; leave them out."
        )
    if own := [name for name in ("update", "configure_optimizers", *STEPS.values()) if trainer.overrides(name)]:
        raise TypeError(f"{type(trainer).__name__} overrides {own}, and so does the LightningModule; keep one of them.")
    if trainer.config.compile is True:
        raise NotImplementedError(
            "compile=True: the update of a LightningModule is not compiled; compile parts of it yourself."
        )
    if trainer.config.patience is not None and trainer.config.monitor_metric is None:
        raise ValueError("patience needs monitor_metric with a LightningModule: the name of what it logs.")
