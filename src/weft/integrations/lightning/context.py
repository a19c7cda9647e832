"""What the parts of this integration see of the run of a LightningModule: its state, and what Lightning adds."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from weft.step.history import Progress
from weft.step.state import RunState

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class Context(Protocol):
    """The run of a LightningModule, as its strategy, its loops, its logs and `self.trainer` know it."""

    state: RunState
    module: Any
    datamodule: Any
    callbacks: list[Any]
    view: Any
    """What the module sees as `self.trainer`."""
    hooks_of: Any
    """The hooks of module and callbacks, in Lightning's order."""
    sources: dict[str, Any]
    """The loaders by split."""
    strategy: Any
    schedulers: Any
    results: Any
    """What `self.log` writes to at the moment: one of the next two."""
    results_of_training: Any
    results_of_evaluation: Any
    tape: Any
    """The random numbers that loaders drew."""
    generators_to_resume: list[Tensor]
    batch_idx: int
    is_last_batch: bool
    skip_rest_of_epoch: bool
    began: bool
    at_epoch_end: bool
    step_context: Any
    """What a step is called in, None: nothing."""
    training_step: Any
    """What calls the module's training step, None: it is called as it is."""
    skips_backward: bool
    """Whether only forward passes are wanted."""

    @property
    def fabric(self) -> Fabric:
        """Lightning Fabric."""
        ...

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        ...

    @property
    def run_dir(self) -> Path | None:
        """The folder of the run."""
        ...

    @property
    def is_accumulating(self) -> bool:
        """Whether the optimizer waits for further batches."""
        ...

    @property
    def renews(self) -> tuple[str, ...]:
        """What of the module's optimizers and schedulers wins over the checkpoint."""
        ...

    @property
    def loggers(self) -> list[Any]:
        """The loggers of the run."""
        ...

    def unsynced(self) -> AbstractContextManager[Any]:
        """In a batch after which the optimizer does not step yet."""
        ...

    def count_zero_grad(self, what: str) -> None:
        """Clearing gradients is "ready", "started" or "completed"."""
        ...

    def begin_step(self, batch: Any) -> None:
        """What every update does first."""
        ...

    def end_batch(self, batch: Any, loss: Tensor, stepped: bool) -> None:
        """What every update does last."""
        ...

    def count_optimizer_step(self, what: str = "completed") -> None:
        """The step of an optimizer is "ready" or "completed"."""
        ...

    def step_plateau_schedulers(self, wait: bool) -> None:
        """Schedulers that read a metric after each step."""
        ...
