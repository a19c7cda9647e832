"""A LightningModule trains as it is: `weft.Trainer(epochs=3).fit(module, datamodule=dm)`.

    names.py       recognise Lightning's classes; which hooks are overridden; legacy forms
    hooks.py       call the hooks of callbacks and module, in Lightning's order
    data.py        loaders: of the fit, the module or the data module; restarted exactly on resume
    log.py         self.log: what is kept of a value, and what it becomes at the end of an epoch
    optimizers.py  every shape that configure_optimizers returns; when schedulers step
    update.py      automatic and manual optimization
    strategy.py    what Lightning's own methods call beneath them: gradients, the optimizer's step, clipping, precision
    loops.py       the loops of evaluation and prediction
    view.py        what the module sees as self.trainer
    states.py      what a checkpoint holds besides the core's state; checkpoints in Lightning's format
    run.py         LightningRun: the order of it all

    trainer.py     `from weft.integrations.lightning import Trainer`: Lightning's own, with weft's training loop
    fitting.py     FitRun: that loop

The core knows nothing of this folder: `weft.integrations.adapter_for` names `LightningRun` for a LightningModule.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weft.integrations.lightning.names import package_in_use
from weft.integrations.lightning.run import LightningRun

if TYPE_CHECKING:
    from weft.integrations.lightning.trainer import Trainer

__all__ = ["LightningRun", "Trainer"]


def __getattr__(name: str) -> Any:
    """`Trainer`; every other name is Lightning's own, for scripts with `import weft.integrations.lightning as pl`."""
    if name == "Trainer":
        from weft.integrations.lightning.trainer import Trainer  # imports Lightning, which a weft.Trainer does not need

        return Trainer
    package = package_in_use()
    found = None if name.startswith("__") else getattr(import_module(package), name, None)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, and {package} has none either.")
    return found
