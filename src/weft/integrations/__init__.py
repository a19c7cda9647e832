"""Other libraries' ways of training, as thin layers over `weft.Trainer`. Each is imported when it is first used.

    weft.integrations.neuromancer.Trainer(problem, train_loader, dev_loader)     # NeuroMANCER's base trainer
    weft.LitTrainer(epochs=200)                                                  # NeuroMANCER's Lightning trainer
    weft.Trainer(epochs=3).fit(module, datamodule=dm)                            # a LightningModule as it is

None of them imports the library it stands in for; what a problem or a hook is, the names of its classes tell.

lightning             A LightningModule trains as it is: `weft.Trainer(epochs=3).fit(module, datamodule=dm)`.
neuromancer           Scripts made for NeuroMANCER: its base `Trainer`, and `LitTrainer`.
"""

from typing import TYPE_CHECKING

from weft import _face

if TYPE_CHECKING:
    from weft.integrations import lightning as lightning  # LightningModules, their data modules and callbacks
    from weft.integrations import neuromancer as neuromancer  # scripts made for NeuroMANCER's Trainer and LitTrainer
else:
    __getattr__, __dir__, __all__ = _face(__name__)
