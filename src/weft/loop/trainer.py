"""Trainer: options in, the loop, a result out.

trainer = weft.Trainer(epochs=200, patience=20)
result = trainer.fit(problem, data_setup, nsim=5000)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from weft.config import Manual, TrainerConfig
from weft.devices.fabric import fabric_for_calls
from weft.events import as_hooks
from weft.loop import options as opts
from weft.loop.adapters import adapter_for, split_hooks
from weft.loop.default_hooks import hooks_from
from weft.loop.result import FitResult
from weft.loop.run import Run
from weft.loop.short import SHORT
from weft.loop.tools import Tools
from weft.step.optimizers import default_optimizer
from weft.step.phase import Phase
from weft.step.state import RunState

if TYPE_CHECKING:
    from weft.loop.signatures import TrainerOptions
else:
    TrainerOptions = type("TrainerOptions", (), {})


class Trainer(TrainerOptions, Tools):
    """Trains a problem: a module that returns a dict with a loss for a batch.

    Subclasses may override `training_step(self, batch)`, `validation_step`, `test_step`, `predict_step`,
    `configure_optimizers(self)` and `update(self, batch)`. Unknown options raise TypeError with a suggestion, wrong
    values ValueError; nothing happens before `fit`. The trainer takes any attribute of yours, and `trainer.state`
    is a dict for tensors and plain values that is checkpointed too.
    """

    monitors_by_default = names_are_apart = True
    recipe: dict[str, Any] | None = None
    """The config that describes this run, where it was made from one (weft.recipes.recipe).

    Written into the run's folder.
    """

    if not TYPE_CHECKING:  # which reads that of TrainerOptions, option by option

        def __init__(self, **options: Any) -> None:
            self._take(options)

    def _take(self, options: Mapping[str, Any]) -> None:
        if type(self) is not Trainer:
            from weft.loop.misspelt import refuse_misspelt

            refuse_misspelt(type(self), Trainer, options.get("hooks"))
        if unknown := [name for name in options if name not in opts.KNOWN]:
            raise opts.no_option(type(self), unknown, options)
        self.options = opts.objects_in(options)
        plain = {k: v for k, v in options.items() if k not in opts.OBJECTS}
        for name in ("strategy", "profiler"):  # a name is plain data, an object is not
            if isinstance(self.options[name], str):
                plain[name], self.options[name] = self.options[name], None
        self.config = TrainerConfig(**plain)
        if self.config.monitor_metric and "monitor_mode" not in plain:
            from weft.loop.mistakes import tell_of_the_mode

            tell_of_the_mode(self.config.monitor_metric)
        own, self.callbacks = split_hooks(self.options["hooks"])
        self.hooks: list[Any] = as_hooks(own)
        self.phases: list[Phase] = opts.as_phases(self.options["phases"], plain)
        self.metric_functions = opts.as_metrics(self.options["metrics"])
        for name in opts.STEPS.values():
            if (step := self.options[name]) is not None:
                from weft.words.calls import check_call

                check_call(name, step, ("trainer", "batch"))
                setattr(self, name, partial(step, self))
        self.state: dict[str, Any] = {}
        self.run: Run | None = None
        self.launched: Any = None  # the Fabric of a process that was started for this fit alone

    def __setattr__(self, name: str, value: Any) -> None:
        own = [kind for kind in type(self).__mro__ if kind not in Trainer.__mro__]
        if name in opts.FIXED and not any(name in vars(kind) for kind in own):
            more = f"fit(..., epochs={value!r}) trains so many. " if name == "epochs" else ""
            raise AttributeError(
                f"trainer.{name} = {value!r} would have no effect: {name} is an option. {more}"
                f"Make a new {type(self).__name__}({name}=...)."
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        default = TrainerConfig()
        changed = {k: v for k, v in vars(self.config).items() if v != getattr(default, k)}
        changed |= {k: v for k, v in self.options.items() if v is not None}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"

    # ------------------------------------------------------------------ fit

    def fit(
        self,
        problem: nn.Module,
        data: Any = None,
        dev: Any = None,
        *,
        datamodule: Any = None,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        resume: str | None = None,
        epochs: int | None = None,
        renew: Sequence[str] | str = (),
        **setup_kwargs: Any,
    ) -> FitResult:
        """Train `problem` and return the result; the problem then holds the best weights.

        `data`: a data setup function (called with `setup_kwargs`), a `weft.Data`, (train, dev, test, batch_size), a
        dataset, a loader or any iterable of batches (`dev` is then the other one). A second fit of the same problem
        trains on; another problem starts anew. `epochs`: how many this fit trains, instead of the option; a second fit
        so many more. `resume`: "auto", "last", "best" or a checkpoint's path. `renew`: "optimizer", "scheduler", or
        both: the options as they are now win over those in the checkpoint (learning rate, weight decay, ...; moments
        stay; a new scheduler is stepped to where it would be).
        A LightningModule comes with loaders (`train_dataloaders`, `val_dataloaders`), a `datamodule`, or its own data.
        """
        given: dict[str, Any] = {"datamodule": datamodule, "train_dataloaders": train_dataloaders}
        given["val_dataloaders"] = val_dataloaders
        if (fabric := self._fabric_for_calls()) is not None:  # ddp_spawn, ddp_fork, ddp_notebook
            from weft.loop.launch import call

            more = {"resume": resume, "epochs": epochs, "renew": renew}
            result = call(self, fabric, "fit", problem, problem, data, dev, **more, **given, **setup_kwargs)
            self.running.state.feed.make = opts.data_maker(self.running, data, dev, **given, setup_kwargs=setup_kwargs)
            return result
        given |= {"resume": resume, "epochs": epochs, "renew": renew}
        with self.start(problem, data, dev, **given, **setup_kwargs).with_data() as run:
            for _ in run.epochs():
                for batch in run.batches("train"):
                    run.update(batch)
                if run.validation_due:
                    run.evaluate("dev")
        assert run.result is not None
        return run.result

    def start(
        self,
        problem: nn.Module,
        data: Any = None,
        dev: Any = None,
        *,
        datamodule: Any = None,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        resume: str | None = None,
        epochs: int | None = None,
        renew: Sequence[str] | str = (),
        **setup_kwargs: Any,
    ) -> Run:
        """A run for a loop of your own (`with trainer.start(...) as run:`); as `fit`, and data need not be given."""
        opts.check_problem(problem)
        given = {"datamodule": datamodule, "train_dataloaders": train_dataloaders, "val_dataloaders": val_dataloaders}
        previous = self.run if self.run is not None and self.run.is_of(problem) else None
        run = self.run_of(problem, previous)
        make_data = opts.data_maker(run, data, dev, **given, setup_kwargs=setup_kwargs)
        resume = resume or (previous.state.resume_next if previous else None) or self.config.resume
        opts.check_epochs(epochs, self.phases)
        if renew:
            from weft.loop.renewal import checked

            renew = checked(renew, resume)
        with SHORT:
            run.prepare(make_data, resume, epochs, tuple(renew))
        self.run = run
        return run

    def _fabric_for_calls(self) -> Any:
        """The Fabric that runs methods in processes of their own; None where nothing does, or these are they."""
        return None if self.launched else fabric_for_calls(self.config, *map(self.options.get, ("strategy", "plugins")))

    def run_of(self, problem: nn.Module, previous: Run | None = None) -> Run:
        """A run, which goes on from a `previous` one: weft's, or that of an integration which knows such a problem."""
        run = (adapter_for(problem) or Run)(self, problem, previous)
        if self.callbacks and not run.takes_callbacks:
            names = ", ".join(type(c).__name__ for c in self.callbacks)
            raise TypeError(f"hooks: {names} are Lightning Callbacks, which need a LightningModule; use a weft.Hook.")
        return run

    def default_hooks(self, state: RunState) -> list[Any]:
        """The hooks that the options ask for: progress line, early stopping, logging, checkpoints."""
        return hooks_from(state)

    # ------------------------------------------------------------------ what subclasses override

    def training_step(self, batch: Any) -> Any:
        """The loss of a training batch, or a dict that holds it."""
        return self.problem(batch)

    def validation_step(self, batch: Any) -> Any:
        """The loss of a dev batch, or a dict that holds it; every scalar in it is reported."""
        return self.problem(batch)

    def test_step(self, batch: Any) -> Any:
        """The loss of a test batch, or a dict that holds it."""
        return self.problem(batch)

    def predict_step(self, batch: Any) -> Mapping[str, Tensor]:
        """The predictions for a batch, by key."""
        from weft.problem.outputs import forward_nodes

        return forward_nodes(self.problem)(batch)

    def configure_optimizers(self) -> Any:
        """The optimizer(s): an instance, a function of the parameters, or a dict of them by name."""
        return default_optimizer if (given := self.options["optimizer"]) is None else given

    def update(self, batch: Any) -> Any:
        """Update the parameters once from `batch` (a list of batches when accumulating).

        An override uses `self.backward(loss)` and `self.step(optimizer)`, or `super().update(batch)`; what it
        returns (a loss, a dict of scalars) is logged.
        """
        return self.running.default_update(batch)

    def overrides(self, name: str) -> bool:
        """Whether a method is not the one of `weft.Trainer`: overridden, or set on this object."""
        return name in vars(self) or getattr(type(self), name) is not getattr(Trainer, name)

    def step_function(self, split: str, problem: nn.Module) -> Callable[[Any], Any]:
        """What is called with each batch of `split`: the user's step, or the problem itself."""
        name = opts.STEPS[split]
        return getattr(self, name) if self.overrides(name) or split == "predict" else problem

    # ------------------------------------------------------------------ after training

    def validate(
        self,
        data: Any = None,
        dataloaders: Any = None,
        *,
        problem: nn.Module | None = None,
        datamodule: Any = None,
        **setup_kwargs: Any,
    ) -> dict[str, float]:
        """Means over the dev set (of the last fit, or `data`) as floats, with the history's keys.

        A problem may come first: `validate(problem, data)`; a LightningModule brings data, `dataloaders`, `datamodule`.
        """
        return self._evaluate("dev", *opts.asked(data, dataloaders, problem, datamodule), setup_kwargs)

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
        return self._evaluate("test", *opts.asked(data, dataloaders, problem, datamodule), setup_kwargs)

    def predict(
        self,
        data: Any = None,
        dataloaders: Any = None,
        *,
        problem: nn.Module | None = None,
        datamodule: Any = None,
        keys: Sequence[str] | None = None,
        **setup_kwargs: Any,
    ) -> Any:
        """What the nodes compute for each row of the predict set (or `data`), in order, on the CPU, by key.

        Inputs and losses are left out; targets may be missing, and with `keys`, whose nodes alone are run, what others
        read. Of a `weft.Supervised` (`data` may be X itself): what its net returns, one row per row. A LightningModule
        gives what its `predict_step` returned, one entry a batch (lists for several loaders). See `Trainer.validate`.
        """
        return self._evaluate("predict", *opts.asked(data, dataloaders, problem, datamodule), setup_kwargs, keys)

    def _evaluate(self, split: str, problem: Any, data: Any, setup_kwargs: Any, keys: Any = None) -> dict[str, Any]:
        if (fabric := self._fabric_for_calls()) is not None:
            from weft.loop.launch import call

            return call(self, fabric, "_evaluate", problem or self.problem, split, problem, data, setup_kwargs, keys)
        from weft.loop.evaluating import run_to_evaluate

        with SHORT, run_to_evaluate(self, problem, split, data, setup_kwargs) as run:
            if not run.has(split):
                raise ValueError(f"{split}: there is no {split} data; pass some.")
            if split == "predict":
                return run.predict(keys)
            return run.evaluate(split)

    def save_weights(self, path: Any) -> None:
        """Write the problem's weights to `path`: plain tensors, readable with `weft.load_weights`."""
        from weft.checkpoint.weights_files import save_weights
        from weft.loop.afterwards import tell_of_left_out

        save_weights(self.problem, path)
        tell_of_left_out(self.run, path)


Trainer.__init__.__signature__ = opts.signature()  # pyright: ignore[reportFunctionMemberAccess]
Trainer.__doc__ = Manual(Trainer.__doc__, TrainerConfig, "Objects")  # type: ignore[assignment]
