"""Other libraries' ways of training, as thin layers over `weft.Trainer`. Each is imported when it is first used.

    weft.integrations.neuromancer.Trainer(problem, train_loader, dev_loader)     # NeuroMANCER's base trainer
    weft.LitTrainer(epochs=200)                                                  # NeuroMANCER's Lightning trainer
    weft.Trainer(epochs=3).fit(module, datamodule=dm)                            # a LightningModule as it is

None of them imports the library it stands in for; what a problem or a hook is, the names of its classes tell.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.run import Run

MODULES = {
    "neuromancer": "scripts made for NeuroMANCER's Trainer",
    "litneuromancer": "scripts made for NeuroMANCER's LitTrainer",
    "lightning": "LightningModules, their data modules and callbacks",
    "configs": "config files written for Lightning or physicsml",
}
"""The integrations by module name, and whom each is for."""

_LIGHTNING = ("lightning.pytorch.", "pytorch_lightning.")


def __getattr__(name: str) -> ModuleType:
    if name in MODULES:
        return import_module(f"weft.integrations.{name}")
    raise AttributeError(f"weft.integrations has no {name!r}; there are {', '.join(MODULES)}.")


def __dir__() -> list[str]:
    return list(MODULES)


def adapter_for(problem: Any) -> type[Run] | None:
    """The kind of `Run` that trains this problem, None for a plain one."""
    if _has_base(getattr(problem, "_orig_mod", None), "LightningModule"):
        raise NotImplementedError("torch.compile(module) hides a LightningModule; call module.compile() or compile its parts.")
    if _has_base(problem, "LightningModule"):
        from weft.integrations.lightning import LightningRun

        return LightningRun
    return None


def split_hooks(hooks: Any) -> tuple[Any, list[Any]]:
    """(The `hooks` option without them, the Lightning Callbacks that were in it)."""
    listed = hooks if isinstance(hooks, list | tuple) else [] if hooks is None else [hooks]
    callbacks = [h for h in listed if _has_base(h, "Callback")]
    return [h for h in listed if not any(h is c for c in callbacks)], callbacks


def _has_base(thing: Any, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith(_LIGHTNING) for c in type(thing).__mro__)
