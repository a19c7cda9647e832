"""What a run does differently for the problems of another library: the places where an integration takes over.

`weft.integrations.adapter_for(problem)` names a subclass of `Run` for the problems that it knows; it overrides these
and the methods of `Run` itself. Here stands what holds for a plain problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from weft.data.data import Data, as_data, evaluation_data
from weft.devices.precision import numerics
from weft.loop.phases import begin_phases
from weft.sharded.shards import processes_of
from weft.step.evaluation import predict

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from weft.devices.processes import Processes
    from weft.loop.run import Run

_LIGHTNING = ("lightning.pytorch.", "pytorch_lightning.")


def adapter_for(problem: Any) -> type[Run] | None:
    """The kind of `Run` that trains this problem, None for a plain one."""
    if _has_base(getattr(problem, "_orig_mod", None), "LightningModule"):
        raise NotImplementedError("torch.compile(module) hides a LightningModule; call module.compile() or compile its parts.")
    if _has_base(problem, "LightningModule"):
        from weft.integrations.lightning.run import LightningRun

        return LightningRun
    return None


def split_hooks(hooks: Any) -> tuple[Any, list[Any]]:
    """(The `hooks` option without them, the Lightning Callbacks that were in it)."""
    listed = hooks if isinstance(hooks, list | tuple) else [] if hooks is None else [hooks]
    callbacks = [h for h in listed if _has_base(h, "Callback")]
    return [h for h in listed if not any(h is c for c in callbacks)], callbacks


def _has_base(thing: Any, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith(_LIGHTNING) for c in type(thing).__mro__)


class Seams:
    """The seams of a run."""

    takes_callbacks = False
    """Whether Lightning Callbacks among the hooks have something to listen to."""
    brings_data = False
    """Whether a problem may bring its own data, so that none need be given."""
    monitors_by_default = True
    """Whether the dev loss (or the training loss) is monitored without being named."""

    fabric: Fabric
    processes: Processes

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the problem itself, which loggers record beside the trainer's."""
        return {}

    def meet(self: Run) -> Processes:  # type: ignore[misc]
        """The processes of the run, as its strategy has them."""
        return processes_of(self)

    def place(self, problem: nn.Module) -> nn.Module:
        """The problem in the run's precision and on its device (one to be sharded stays where it is)."""
        problem = self.fabric._precision.convert_module(problem)
        return problem if self.processes.in_shards else problem.to(self.fabric.device)

    @contextmanager
    def in_use(self: Run) -> Iterator[None]:  # type: ignore[misc]
        """While the problem trains or is evaluated: the run's numbers, and a sharded problem in shards."""
        with numerics(self.fabric, self.config.deterministic, self.problem), self.processes.holding(self.problem):
            yield

    def data_of_fit(self, data: Any, dev: Any, datamodule: Any, setup_kwargs: Mapping[str, Any]) -> Callable[[], Data]:
        """What makes the data of a fit from what `Trainer.fit` was given."""
        if datamodule is not None:
            raise TypeError("fit: `datamodule` belongs to a LightningModule; pass `data` here.")
        return partial(as_data, data, dev, setup_kwargs)

    def data_to_evaluate(
        self, split: str, data: Any, setup_kwargs: Mapping[str, Any], last: Run | None
    ) -> Callable[[], Data]:
        """What makes the data of `Trainer.validate`, `test` or `predict`; `last` is the run of the last fit."""
        return partial(evaluation_data, split, data, setup_kwargs, last.data.batch_size if last is not None else None)

    def begin_phases(self: Run, resumed: bool) -> None:  # type: ignore[misc]
        """Put optimizers, schedules and the update of the run's phase in force."""
        begin_phases(self, resumed)

    def predict(self: Run) -> Any:  # type: ignore[misc]
        """The predictions for the predict set."""
        return predict(self, self.trainer.step_function("predict", self.problem))

