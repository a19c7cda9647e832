"""Lightning's Trainer with weft's training loop.

from weft.integrations.lightning import Trainer     # the one line of a script that changes
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from weft.integrations.lightning.fitting import FitRun
from weft.integrations.lightning.names import OfTheScript, package_in_use

PACKAGE = package_in_use()

if TYPE_CHECKING:
    from lightning.pytorch import Trainer as TheirTrainer
    from lightning.pytorch.loops.fit_loop import _FitLoop
else:
    TheirTrainer = resolve_name(f"{PACKAGE}:Trainer")
    _FitLoop = resolve_name(f"{PACKAGE}.loops.fit_loop:_FitLoop")


class FitLoop(_FitLoop):
    """Lightning's counters, limits and loaders of a fit; the loop over epochs and batches is weft's."""

    def run(self) -> None:
        """Train until `done`."""
        self.setup_data()
        if self.skip:
            return
        self.reset()
        self.on_run_start()
        trainer: Any = self.trainer
        trainer.weft_run = run = FitRun(trainer)
        with run:
            for _ in run.epochs():
                with trainer.profiler.profile("run_training_epoch"):
                    for batch in run.batches("train"):
                        run.update(batch)
        self._restarting = False
        self.on_run_end()


class Trainer(TheirTrainer, metaclass=OfTheScript):
    """Lightning's Trainer: its keywords, defaults, methods, attributes and files; the training loop is weft's.

    It is a subclass, so callbacks, loggers, `LightningCLI` and a script's own subclasses take it for what it is.
    """

    weft_run: Any = None
    """weft's run of the last fit: `trainer.weft_run.result` has the history by epoch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plain = self.fit_loop
        self.fit_loop = FitLoop(self, plain.min_epochs, plain.max_epochs)
        self.fit_loop.epoch_loop = plain.epoch_loop
