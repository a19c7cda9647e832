"""NeuroMANCER's `LitTrainer` as its README describes it, on weft.

    trainer = weft.LitTrainer(epochs=200, patience=20, custom_optimizer=optimizer, weight_name="best")
    trainer.fit(problem, data_setup_function, nsim=1000)
    problem.load_state_dict(trainer.get_weights())

The data setup function returns (train, dev, test, batch_size).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoint import archive
from weft.checkpoint.weights import state_of
from weft.checkpoint.weights_files import load_weights
from weft.data.data import Data, as_data, makes_batches
from weft.integrations.neuromancer.lithooks import Bridge, LightningHooks, LitModel, from_configure_optimizers, takes
from weft.integrations.neuromancer.weights_file import WeightsFile
from weft.loop.options import asked, refuse_own_names
from weft.loop.result import FitResult
from weft.loop.run import Run
from weft.loop.trainer import Trainer


class LitTrainer(Trainer):
    """A `weft.Trainer` that takes every keyword of NeuroMANCER's LitTrainer and of its README, and does what they say.

    epochs, train_metric, dev_metric, test_metric, patience, warmup, clip: as in `weft.TrainerConfig`.
    eval_metric, monitor_metric: the metric that decides about the best weights and patience, under either name (both,
        and different: ValueError); None: dev_metric, or train_metric without dev data. "test_loss" is evaluated each
        epoch.
    custom_optimizer: an optimizer, or a function of the parameters; None: Adam(0.001, betas=(0.0, 0.9)).
    save_weights, weight_path, weight_name: whether, into which folder and under which name the best weights are
        written, as `{"state_dict": {"problem....": tensor}}`. The name may hold `{epoch}`, `{step}` and metrics
        (`{dev_loss:.3f}`); None: "{epoch}-{step}". One file a fit, written when the weights got better.
    devices, strategy, accelerator: what Lightning Fabric knows. One device unless you ask for more.
    profiler: "simple", "pytorch", "advanced", or an object.
    custom_training_step: `fn(model, batch) -> loss`; `model` is a `LitModel`.
    custom_hooks: functions by Lightning's hook names and with its signatures.
    logger: a Lightning logger, True (TensorBoard), or a list; None and False: none.
    hparam_config: an object or dict with `learning_rate` (of the default optimizer) and `batch_size` (of the training
        and all other data), as a sweep gives it; what else it holds is left to you.
    automatic_optimization: False lets custom_training_step do its own `model.manual_backward(loss)` and
        `model.optimizers().step()`; nothing is clipped then, and it need not return the loss.
    shuffle: whether training rows come in a new order each epoch; None: yes, unless a `weft.Data` says otherwise.

    Further keywords are those of `weft.Trainer` (precision, seed, checkpoint, hooks, ...).
    """

    names_are_apart = False  # its scripts log what their steps return

    def __init__(
        self,
        epochs: int = 1000,
        train_metric: str = "train_loss",
        dev_metric: str = "dev_loss",
        test_metric: str = "test_loss",
        eval_metric: str | None = None,
        patience: int | None = None,
        warmup: int = 0,
        clip: float | None = 100.0,
        custom_optimizer: Any = None,
        save_weights: bool = True,
        weight_path: Any = "./",
        weight_name: str | None = None,
        devices: Any = 1,
        strategy: Any = "auto",
        accelerator: str = "auto",
        profiler: Any = None,
        custom_training_step: Callable[..., Any] | None = None,
        custom_hooks: Mapping[str, Callable[..., Any]] | None = None,
        logger: Any = None,
        hparam_config: Any = None,
        automatic_optimization: bool = True,
        monitor_metric: str | None = None,
        shuffle: bool | None = None,
        **options: Any,
    ) -> None:
        if None not in (eval_metric, monitor_metric) and eval_metric != monitor_metric:
            raise ValueError(
                f"eval_metric={eval_metric!r} and monitor_metric={monitor_metric!r} are two names for one option; "
                "give one."
            )
        _refuse_two_names(options, optimizer=custom_optimizer, loggers=logger, training_step=custom_training_step)
        self.lit_hooks = LightningHooks(custom_hooks or {})
        if "configure_optimizers" in self.lit_hooks and custom_optimizer is not None:
            raise ValueError("custom_optimizer and the hook configure_optimizers both give the optimizer; give one.")
        self.automatic_optimization, self.shuffle = automatic_optimization, shuffle
        self.lit_problem: LitModel | None = None
        self.stage = "fit"
        self._batch_size, rate = _entry(hparam_config, "batch_size"), _entry(hparam_config, "learning_rate")
        if rate is not None and custom_optimizer is not None:
            warnings.warn(
                f"hparam_config: learning_rate={rate} has no effect, custom_optimizer has its own.", stacklevel=2
            )
        options.setdefault("optimizer", custom_optimizer or _adam(0.001 if rate is None else float(rate)))
        options.setdefault(
            "loggers", {True: "tensorboard", False: None}[logger] if isinstance(logger, bool) else logger
        )
        super().__init__(
            epochs=epochs,
            train_metric=train_metric,
            dev_metric=dev_metric,
            test_metric=test_metric,
            patience=patience,
            monitor_metric=eval_metric or monitor_metric,
            warmup=warmup,
            clip=clip if automatic_optimization else None,
            devices=devices,
            strategy=strategy,
            accelerator=accelerator,
            profiler=profiler,
            **options,
        )
        self._custom_step = _checked_step(custom_training_step, automatic_optimization)
        if self._custom_step or "on_before_zero_grad" in self.lit_hooks or "on_before_backward" in self.lit_hooks:
            self.training_step = self._training_step
        if not automatic_optimization or "backward" in self.lit_hooks:
            if self.config.accumulate > 1:
                raise ValueError("accumulate > 1 needs the trainer's own backward; accumulate in your step instead.")
            self.update = self._update
        self.evaluates_eagerly = bool(self.lit_hooks)  # what hooks are called with, no graph gives
        self._given = {
            "eval_metric": eval_metric or monitor_metric or dev_metric,
            "save_weights": save_weights,
            "weight_path": weight_path,
            "weight_name": weight_name,
            "custom_optimizer": custom_optimizer,
            "custom_training_step": custom_training_step,
            "custom_hooks": dict(custom_hooks or {}),
            "logger": logger,
            "hparam_config": hparam_config,
        }
        self._weights = WeightsFile(Path(weight_path), weight_name or "{epoch}-{step}") if save_weights else None
        self.hooks += [*([self._weights] if self._weights is not None else []), Bridge(self)]

    # ------------------------------------------------------------------------------------------------------------ fit

    def fit(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        problem: nn.Module,
        data_setup_function: Any = None,
        dev: Any = None,
        *,
        resume: str | None = None,
        ckpt_path: str | None = None,
        **setup_kwargs: Any,
    ) -> FitResult:
        """Train `problem`, which then holds the best weights, and return the result.

        `data_setup_function(**setup_kwargs)` returns (train, dev, test, batch_size); other data as in
        `weft.Trainer.fit`. `resume`, or Lightning's name for it, `ckpt_path`: "auto", "last", "best" or a checkpoint's
        path.
        """
        resume = resume if resume is not None else ckpt_path
        if (
            self._fabric_for_calls() is not None
        ):  # ddp_spawn, ddp_fork, ddp_notebook: each of the processes comes here again
            self._set_model(problem)
            return super().fit(problem, data_setup_function, dev, resume=resume, **setup_kwargs)
        with self.start(problem, data_setup_function, dev, resume=resume, **setup_kwargs).with_data() as run:
            for _ in run.epochs():
                for batch in run.batches("train"):
                    if self._call("on_train_batch_start", batch, self.batch_index) == -1:
                        break
                    run.update(batch)
                if run.validation_due:
                    run.evaluate("dev")
                if (run.state.config.monitor_metric or "").startswith("test_"):
                    self._staged("monitor", run.evaluate, "test")
                self._call("on_train_epoch_end")
        assert run.result is not None
        return run.result

    def start(self, problem: nn.Module, data: Any = None, dev: Any = None, **options: Any) -> Run:
        """A run for a loop of your own; the arguments are those of `weft.Trainer.start`."""
        self._set_model(problem)
        self._call("setup", "fit")
        self._call("configure_model")
        named = {k: options.pop(k) for k in ("datamodule", "resume", "epochs", "renew") if k in options}
        refuse_own_names(data)
        given = {"data": data, "dev": dev}
        for ours, theirs in (("data", "train_dataloaders"), ("dev", "val_dataloaders")):
            if (loader := options.pop(theirs, None)) is not None:
                given[ours] = loader
        return super().start(problem, lambda: self._adjusted(as_data(**given, setup_kwargs=options)), **named)

    def _set_model(self, problem: nn.Module) -> None:
        if self.lit_problem is None or self.lit_problem.problem is not problem:
            self.lit_problem = LitModel(self, problem)

    def _adjusted(self, data: Data) -> Data:
        if self._batch_size is not None and not makes_batches(data.train):
            data = replace(data, batch_size=self._batch_size)
        return data if self.shuffle is None else replace(data, shuffle=self.shuffle)

    def configure_optimizers(self) -> Any:
        """What the hook `configure_optimizers` returns, or the optimizer that was given."""
        if "configure_optimizers" not in self.lit_hooks:
            return super().configure_optimizers()
        optimizers, schedules = from_configure_optimizers(self._call("configure_optimizers"))
        if schedules:
            self.options["scheduler"] = schedules
        return optimizers

    # ---------------------------------------------------------------------------------------------------------- steps

    def _call(self, name: str, *args: Any) -> Any:
        return self.lit_hooks.call(name, self.lit_problem, *args)

    def _training_step(self, batch: Any) -> Any:
        out = self._custom_step(self.lit_problem, batch) if self._custom_step else self.problem(batch)
        if not self.automatic_optimization:
            return out
        if out is None:
            raise TypeError(
                "custom_training_step returned None; it must return the loss. With automatic_optimization=False it "
                "takes "
                "care of gradients and steps itself and may return nothing."
            )
        for optimizer in self.optimizers.values():
            self._call("on_before_zero_grad", optimizer)
        self._call("on_before_backward", self._loss_in(out))
        return out

    def _loss_in(self, out: Any) -> Any:
        return out.get(self.train_metric, out.get("loss")) if isinstance(out, Mapping) else out

    def _update(self, batch: Any) -> Any:
        out = self.training_step(batch)
        if self.automatic_optimization:  # with a `backward` of the user's
            self._call("backward", self._loss_in(out))
            self.step()
        return self.running.manual.loss if out is None else out

    def step_function(self, split: str, problem: nn.Module) -> Callable[[Any], Any]:
        """What is called with each batch of `split`."""
        step = super().step_function(split, problem)
        if self.config.compile and not self.evaluates_eagerly:
            return step  # of its outputs nobody is told
        stage = {"dev": "validation", "test": "test", "predict": "predict"}.get(split)
        return step if stage is None else partial(self._evaluation_step, stage, step)

    def _evaluation_step(self, stage: str, step: Callable[[Any], Any], batch: Any) -> Any:
        assert self.lit_problem is not None
        index, name, watched = self.lit_problem.num_evaluated, f"{stage}_step", self.stage != "monitor"
        self.lit_problem.num_evaluated += 1
        if watched:
            self._call(f"on_{stage}_batch_start", batch, index)
        out = self._call(name, batch, index) if name in self.lit_hooks else step(batch)
        loss = out.get(self.dev_metric) if isinstance(out, Mapping) else out
        if stage == "validation" and isinstance(loss, Tensor):
            self.lit_problem.validation_step_outputs.append(loss.detach())
        if watched:
            self._call(f"on_{stage}_batch_end", out, batch, index)
        return out

    # ------------------------------------------------------------------------------------------------- after training

    def validate(
        self,
        data: Any = None,
        dataloaders: Any = None,
        *,
        problem: nn.Module | None = None,
        datamodule: Any = None,
        **setup_kwargs: Any,
    ) -> dict[str, float]:
        """Means over the dev set (of the last fit, or `data`) as floats; see `Trainer.validate`."""
        problem, data = asked(data, dataloaders, problem, datamodule)
        return self._evaluating_as("validation", "validate", super().validate, data, problem, setup_kwargs)

    def test(
        self,
        data: Any = None,
        dataloaders: Any = None,
        *,
        problem: nn.Module | None = None,
        datamodule: Any = None,
        **setup_kwargs: Any,
    ) -> dict[str, float]:
        """Means over the test set (of the last fit, or `data`) as floats; see `Trainer.validate`."""
        problem, data = asked(data, dataloaders, problem, datamodule)
        return self._evaluating_as("test", "test", super().test, data, problem, setup_kwargs)

    def predict(
        self,
        data: Any = None,
        dataloaders: Any = None,
        *,
        problem: nn.Module | None = None,
        datamodule: Any = None,
        **setup_kwargs: Any,
    ) -> Any:
        """What the nodes compute for each row of the predict set (or `data`), by key; see `Trainer.validate`."""
        problem, data = asked(data, dataloaders, problem, datamodule)
        return self._evaluating_as("predict", "predict", super().predict, data, problem, setup_kwargs)

    def _evaluating_as(self, stage: str, name: str, evaluate: Any, data: Any, problem: Any, kwargs: Any) -> Any:
        if problem is not None:
            self._set_model(problem)
        before = (("setup", name), ("configure_model",), (f"on_{stage}_start",), (f"on_{stage}_epoch_start",))
        for hook, *args in before:
            self._call(hook, *args)
        result = self._staged(name, evaluate, data, problem=problem, **kwargs)
        for hook, *args in ((f"on_{stage}_epoch_end",), (f"on_{stage}_end",), ("teardown", name)):
            self._call(hook, *args)
        return result

    def _staged(self, stage: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.stage = stage
        if self.lit_problem is not None:
            self.lit_problem.num_evaluated = 0
        try:
            return function(*args, **kwargs)
        finally:
            self.stage = "fit"

    def get_weights(self) -> dict[str, Any]:
        """A copy of the state dict that the problem holds: after `fit`, the best. RuntimeError before."""
        if self.lit_problem is None:
            raise RuntimeError("get_weights: nothing was trained yet; call fit first.")
        return state_of(self.lit_problem.problem)

    def load_state_dict_lightning(self, problem: nn.Module, path: Any) -> nn.Module:
        """The problem, holding the weights in `path`: a file of this class or of NeuroMANCER's LitTrainer."""
        if "on_load_checkpoint" in self.lit_hooks:
            self._call("on_load_checkpoint", archive.read(path))
        return load_weights(problem, path)

    def __getattr__(self, name: str) -> Any:
        """What scripts read of NeuroMANCER's and Lightning's trainers. To change it, make another trainer."""
        given = self.__dict__.get("_given", {})
        if name in given:
            return given[name]
        if name in _READ and given:
            return _READ[name](self)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def weights_file(self) -> Path | None:
        """Where the best weights were written."""
        return self._weights.written if self._weights is not None else None

    @property
    def batch_index(self) -> int:
        """The number of the training batch in its epoch, from 0."""
        return self.running.progress.batch - 1

    @property
    def schedulers(self) -> dict[str, Any]:
        """The schedulers by optimizer name."""
        return {name: schedule.scheduler for name, schedule in self.running.state.training.schedules.items()}

    @property
    def should_stop(self) -> bool:
        """Whether training ends after the current step; True may be assigned."""
        return self.running.state.control.stop_reason is not None

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        if value:
            self.stop("should_stop")


def _latest(trainer: Any) -> dict[str, Tensor]:
    """The metrics of the last epoch, by name."""
    history = {} if trainer.run is None else trainer.run.history.values
    return {name: torch.tensor(values[-1]) for name, values in history.items() if values}


def _best_file(trainer: Any) -> SimpleNamespace:
    """What Lightning's checkpoint callback tells: where the best weights are, and their value."""
    best = None if trainer.run is None else trainer.run.best.value
    return SimpleNamespace(
        best_model_path=str(trainer.weights_file or ""),
        best_model_score=None if best is None else torch.tensor(best),
        dirpath=str(trainer.weight_path),
        monitor=trainer.eval_metric,
    )


_READ: dict[str, Callable[[Any], Any]] = {
    **{name: (lambda t, name=name: getattr(t.config, name)) for name in ("epochs", "patience", "warmup", "clip")},
    "profiler": lambda t: t.config.profiler or t.options["profiler"],
    "max_epochs": lambda t: t.config.epochs,
    "callback_metrics": _latest,
    "logged_metrics": _latest,
    "checkpoint_callback": _best_file,
    "lit_data_module": lambda t: None if t.run is None else t.run.data,
}
"""Attributes that are read off the trainer's state."""


def _adam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.Adam(params, rate, betas=(0.0, 0.9))


def _entry(config: Any, name: str) -> Any:
    """An entry of a dict, or an attribute of any other object; None where there is none."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _refuse_two_names(options: Mapping[str, Any], **given: Any) -> None:
    theirs = {"optimizer": "custom_optimizer", "loggers": "logger", "training_step": "custom_training_step"}
    for name, value in given.items():
        if name in options and value is not None:
            raise TypeError(f"LitTrainer: {theirs[name]} and {name} are two names for one option; give one.")


def _checked_step(step: Any, automatic: bool) -> Callable[[Any, Any], Any] | None:
    if step is None:
        if not automatic:
            raise ValueError(
                "automatic_optimization=False needs a custom_training_step that takes care of the gradients."
            )
        return None
    if not callable(step) or not takes(step, 2):
        found = inspect.signature(step) if callable(step) else f" = {step!r}"
        raise TypeError(f"custom_training_step{found}: expected a function custom_training_step(model, batch).")
    return step
