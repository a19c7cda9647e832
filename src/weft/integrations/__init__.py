"""Other libraries' ways of training, as thin layers over `weft.Trainer`. Each is imported when it is first used.

    weft.integrations.neuromancer.Trainer(problem, train_loader, dev_loader)     # NeuroMANCER's base trainer
    weft.LitTrainer(epochs=200)                                                  # NeuroMANCER's Lightning trainer
    weft.Trainer(epochs=3).fit(module, datamodule=dm)                            # a LightningModule as it is

None of them imports the library it stands in for; what a problem or a hook is, the names of its classes tell.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

MODULES = {
    "neuromancer": "scripts made for NeuroMANCER's Trainer and LitTrainer",
    "lightning": "LightningModules, their data modules and callbacks",
}
"""The integrations by module name, and whom each is for."""


def __getattr__(name: str) -> ModuleType:
    if name in MODULES:
        return import_module(f"weft.integrations.{name}")
    raise AttributeError(f"weft.integrations has no {name!r}; there are {', '.join(MODULES)}.")


def __dir__() -> list[str]:
    return list(MODULES)
