"""What a run tells, and what it does differently for the problems of another library.

`adapter_for(problem)` names a subclass of `Run` for the problems that one knows; it overrides the seams and the methods
of `Run` itself. Here stands what holds for a plain problem.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from weft.checkpoint.weights import state_of
from weft.data.data import Data, as_data, nothing_to_train_on
from weft.devices.precision import numerics
from weft.devices.processes import Processes
from weft.loop import feeding
from weft.step.history import Best, History, Progress
from weft.step.state import RunState, trial
from weft.step.trained import tell_of_latecomers

if TYPE_CHECKING:
    from lightning.fabric import Fabric

_LIGHTNING = ("lightning.pytorch.", "pytorch_lightning.")
ADAPTERS = {"LightningModule": ("weft.integrations.lightning.run", "LightningRun")}
"""By the name of a base class of the problem: module and name of the kind of `Run` that trains it."""


def adapter_for(problem: Any) -> Any:
    """The kind of `Run` that trains this problem, None for a plain one."""
    for base, (module, name) in ADAPTERS.items():
        if _has_base(getattr(problem, "_orig_mod", None), base):
            raise NotImplementedError(
                f"torch.compile(module) hides a {base}; call module.compile() or compile its parts."
            )
        if _has_base(problem, base):
            return getattr(import_module(module), name)
    return None


def split_hooks(hooks: Any) -> tuple[Any, list[Any]]:
    """(The `hooks` option without them, the Lightning Callbacks that were in it)."""
    listed = hooks if isinstance(hooks, list | tuple) else [] if hooks is None else [hooks]
    callbacks = [h for h in listed if _has_base(h, "Callback")]
    return [h for h in listed if not any(h is c for c in callbacks)], callbacks


def _has_base(thing: Any, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith(_LIGHTNING) for c in type(thing).__mro__)


class Told:
    """What a loop, a hook or a test may read of a run."""

    state: RunState

    @property
    def problem(self) -> nn.Module:
        """What is trained."""
        return self.state.problem

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizers by name."""
        return self.state.training.optimizers

    @property
    def fabric(self) -> Fabric:
        """Lightning Fabric: device, precision, processes."""
        return self.state.fabric

    @property
    def data(self) -> Data:
        """The data of this phase."""
        return self.state.feed.data

    @property
    def progress(self) -> Progress:
        """How far the run is; in a step that is only tried, what it is told."""
        tried = trial.get()
        return self.state.progress if tried is None else tried.progress

    @property
    def history(self) -> History:
        """What was measured, by epoch."""
        return self.state.history

    @property
    def best(self) -> Best:
        """The best value of the monitored metric, and its weights."""
        return self.state.best

    @property
    def run_dir(self) -> Path | None:
        """The folder of the run, None if nothing is written."""
        return self.state.kept.run_dir

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes files and lines: the first of all."""
        return self.state.is_global_zero

    def with_data(self) -> Self:
        """This run, if there is something to train on; a loop of one's own may do without."""
        if not self.has("train"):
            raise nothing_to_train_on(self.data)
        return self

    def is_of(self, problem: nn.Module) -> bool:
        """Whether this run trained `problem`."""
        return self.state.problem is problem

    def has(self, split: str) -> bool:
        """Whether there is data for `split`."""
        return self.state.has(split)

    def batches_of(self, split: str, start: int = 0) -> Iterable[Any]:
        """The batches of a split, at most as many as `limit_batches` says, without any of the loop's bookkeeping."""
        return self.state.batches_of(split, start)

    def step_metrics(self) -> dict[str, float]:
        """Means of the step values since the last call, as floats (with `log_every`; this reads the device)."""
        recent = self.state.epoch.recent
        metrics = recent.compute(self.state.processes.gather)
        recent.clear()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the run goes on: tensors and plain values only."""
        from weft.loop.contents import state_of_run

        return state_of_run(self.state)

    def use_data(self, data: Data) -> None:
        """Train, evaluate and predict with `data` from here on."""
        feeding.use_data(self.state, data)


class Seams:
    """The seams of a run."""

    takes_callbacks = False
    """Whether Lightning Callbacks among the hooks have something to listen to."""
    brings_data = False
    """Whether a problem may bring its own data, so that none need be given."""
    monitors_by_default = True
    """Whether the dev loss (or the training loss) is monitored without being named."""

    names_are_apart = True
    """Whether what is logged must not have the name of what the problem or a step returns."""

    state: RunState
    _manual: Any
    begin_step: Callable[[Any], None]
    end_step: Callable[[Any, Any], None]

    @property
    def manual(self) -> Any:
        """The tools of an update, or a loop, of one's own (`weft.step.manual`), made for each phase."""
        if self._manual is None:
            from weft.step.manual import Manual

            self._manual = Manual(self.state, self.begin_step, self.end_step)
        return self._manual

    def tell_of_nothing_trained(self) -> None:
        """Say so once where a loop, or an update, of the user's own has not trained in the epoch that ends, or a
        parameter came too late."""
        tell_of_latecomers(self.state)
        if self.state.epoch.steps_before == self.state.progress.step:
            from weft.step.own_loop import tell_of_no_step

            tell_of_no_step(self.state)
        elif self._manual is not None:
            self._manual.tell_of_no_move()

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the problem itself, which loggers record beside the trainer's."""
        return {}

    def meet(self) -> Processes:
        """The processes of the run, as its strategy has them."""
        state = self.state

        def interrupted() -> bool:
            return bool(state.control.interruption.asked)

        if hasattr(state.fabric.strategy, "_parallelize_fn"):
            from weft.sharded.shards import processes_in_shards

            return processes_in_shards(state, interrupted)
        if state.fabric.world_size == 1:
            return Processes(state.fabric.device)
        from weft.devices.group import Group

        return Group(state.fabric, interrupted)

    def place(self, problem: nn.Module) -> nn.Module:
        """The problem in the run's precision and on its device (one to be sharded stays where it is)."""
        state = self.state
        problem = state.fabric.strategy.precision.convert_module(problem)
        return problem if state.processes.in_shards else problem.to(state.fabric.device)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While the problem trains or is evaluated: the run's numbers, and a sharded problem in shards."""
        state = self.state

        def trained() -> Collection[Tensor]:
            from weft.step.held import to_be_trained

            return to_be_trained(state)

        numbers = numerics(state.fabric, state.config.deterministic, state.problem, trained)
        with numbers, state.processes.holding(state.problem):
            yield

    def last_weights(self) -> dict[str, Tensor]:
        """Copies of the weights as they are now."""
        return self.state.processes.whole(state_of(self.state.problem))

    def data_of_fit(self, data: Any, dev: Any, datamodule: Any, setup_kwargs: Mapping[str, Any]) -> Callable[[], Data]:
        """What makes the data of a fit from what `Trainer.fit` was given."""
        if datamodule is not None:
            raise TypeError("fit: `datamodule` belongs to a LightningModule; pass `data` here.")
        return partial(as_data, data, dev, setup_kwargs)

    def data_to_evaluate(
        self, split: str, data: Any, setup_kwargs: Mapping[str, Any], last: RunState | None
    ) -> Callable[[], Data]:
        """What makes the data of `Trainer.validate`, `test` or `predict`; `last` is the run of the last fit."""
        batch_size = last.feed.data.batch_size if last is not None else None
        from weft.data.evaluated import evaluation_data, of_x

        if split == "predict" and hasattr(self.state.problem, "own_output"):  # Supervised: X may come alone
            data = of_x(data)
        return partial(evaluation_data, split, data, setup_kwargs, batch_size)

    def predict(self, keys: Sequence[str] | None = None) -> Any:
        """The predictions for the predict set; of a `Supervised` problem what its net returns."""
        from weft.loop.predicting import predictions

        return predictions(self.state, keys)
