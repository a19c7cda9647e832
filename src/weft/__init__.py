"""weft: trains scientific machine-learning problems in an explicit loop on Lightning Fabric.

    problem = weft.Problem([weft.Node(net, ["p"], ["x"])], objectives=[weft.objective(lambda x, p: (x - p) ** 2, name="f")])
    result = weft.Trainer(epochs=100).fit(problem, weft.DictDataset({"p": p}), weft.DictDataset({"p": p_dev}))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# every public name and the module it lives in; a module is imported when a name of it is first used
_HOME = {
    "weft.problem": ("Node", "Problem", "Rollout"),
    "weft.terms": ("equal", "greater_equal", "less_equal", "objective"),
    "weft.losses": ("AugmentedLagrangian", "BarrierLoss", "PenaltyLoss"),
    "weft.data": ("Data", "DictDataset", "windows"),
    "weft.config": ("CheckpointConfig", "DataConfig", "TrainerConfig"),
    "weft.events": ("Hook",),
    "weft.optimizers": ("Phase", "Schedule"),
    "weft.checkpoint": ("load_weights", "save_weights"),
    "weft.archive": ("CheckpointError",),
    "weft.result": ("FitResult", "load_result"),
    "weft.run": ("Run",),
    "weft.trainer": ("Trainer",),
    "weft.integrations.litneuromancer": ("LitTrainer",),
    "weft.sweeps": ("sweep",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_MODULES = {"hooks": "weft.hooks", "plot": "weft.plots"}  # weft.hooks.EMA(0.999), weft.plot.curves(result)
__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from weft import hooks
    from weft import plots as plot
    from weft.archive import CheckpointError
    from weft.checkpoint import load_weights, save_weights
    from weft.config import CheckpointConfig, DataConfig, TrainerConfig
    from weft.data import Data, DictDataset, windows
    from weft.events import Hook
    from weft.integrations.litneuromancer import LitTrainer
    from weft.losses import AugmentedLagrangian, BarrierLoss, PenaltyLoss
    from weft.optimizers import Phase, Schedule
    from weft.problem import Node, Problem, Rollout
    from weft.result import FitResult, load_result
    from weft.run import Run
    from weft.sweeps import sweep
    from weft.terms import equal, greater_equal, less_equal, objective
    from weft.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    if name == "integrations":
        return import_module("weft.integrations")
    raise AttributeError(f"module 'weft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "__version__"]
