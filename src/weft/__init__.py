"""weft: trains scientific machine-learning problems in an explicit loop on Lightning Fabric.

problem = weft.Problem([weft.Node(net, ["p"], ["x"])], objectives=[weft.objective(lambda x, p: (x - p) ** 2, name="f")])
result = weft.Trainer(epochs=100).fit(problem, weft.DictDataset({"p": p}), weft.DictDataset({"p": p_dev}))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# every public name and the module it lives in; a module is imported when a name of it is first used
_HOME = {
    "weft.problem.nodes": ("Node", "Rollout"),
    "weft.problem.problem": ("Problem",),
    "weft.problem.terms": ("equal", "greater_equal", "less_equal", "objective"),
    "weft.problem.losses": ("BarrierLoss", "PenaltyLoss"),
    "weft.problem.lagrangian": ("AugmentedLagrangian",),
    "weft.data.datasets": ("DictDataset", "windows"),
    "weft.data.data": ("Data",),
    "weft.config": ("CheckpointConfig", "DataConfig", "TrainerConfig"),
    "weft.events": ("Hook",),
    "weft.step.phase": ("Phase",),
    "weft.step.optimizers": ("Schedule",),
    "weft.checkpoint.weights_files": ("load_weights", "save_weights"),
    "weft.checkpoint.archive": ("CheckpointError",),
    "weft.loop.result": ("FitResult", "load_result"),
    "weft.loop.run": ("Run",),
    "weft.loop.trainer": ("Trainer",),
    "weft.integrations.neuromancer.littrainer": ("LitTrainer",),
    "weft.sweeps.sweep": ("sweep",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_MODULES = {"hooks": "weft.hooks", "plot": "weft.plots", "integrations": "weft.integrations"}
__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from weft import hooks
    from weft import plots as plot
    from weft.checkpoint.archive import CheckpointError
    from weft.checkpoint.weights_files import load_weights, save_weights
    from weft.config import CheckpointConfig, DataConfig, TrainerConfig
    from weft.data.data import Data
    from weft.data.datasets import DictDataset, windows
    from weft.events import Hook
    from weft.integrations.neuromancer.littrainer import LitTrainer
    from weft.loop.result import FitResult, load_result
    from weft.loop.run import Run
    from weft.loop.trainer import Trainer
    from weft.problem.lagrangian import AugmentedLagrangian
    from weft.problem.losses import BarrierLoss, PenaltyLoss
    from weft.problem.nodes import Node, Rollout
    from weft.problem.problem import Problem
    from weft.problem.terms import equal, greater_equal, less_equal, objective
    from weft.step.optimizers import Schedule
    from weft.step.phase import Phase
    from weft.sweeps.sweep import sweep


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'weft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "hooks", "plot", "__version__"]
