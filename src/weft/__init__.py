"""weft: trains scientific machine-learning problems in an explicit loop on Lightning Fabric.

problem = weft.Problem([weft.Node(net, ["p"], ["x"])], objectives=[weft.objective(lambda x, p: (x - p) ** 2, name="f")])
result = weft.Trainer(epochs=100).fit(problem, weft.DictDataset({"p": p}), weft.DictDataset({"p": p_dev}))
"""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


class NoSuchName(AttributeError):
    """A name that a package does not have; what is close to it is looked for when it is told, not when it is tried."""

    def __str__(self) -> str:
        from weft.words.foreign import no_name

        return no_name(*self.args)


def _face(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package: the names that its TYPE_CHECKING block imports.

    Each is imported when it is first used. The block is read from the source, so that a name stands in one place, where
    type checkers and editors look for it too.
    """
    here = sys.modules[package]
    loader: Any = here.__loader__
    (block,) = (node for node in ast.parse(loader.get_source(package)).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    home = {alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names}

    def look_up(name: str) -> Any:
        if name not in home:
            raise NoSuchName(package, name, list(home))
        module, original = home[name]
        is_module = module == package
        value = import_module(f"{module}.{original}") if is_module else getattr(import_module(module), original)
        setattr(here, name, value)
        return value

    values = sorted(name for name, (module, _) in home.items() if module != package)
    return look_up, lambda: sorted({*home, *(name for name in vars(here) if name.startswith("__"))}), values


if TYPE_CHECKING:
    from weft import hooks as hooks
    from weft import integrations as integrations
    from weft import optim as optim
    from weft import plots as plot  # noqa: F401 - the one name that is not its module's
    from weft.checkpoint.archive import CheckpointError as CheckpointError
    from weft.checkpoint.weights_files import load_weights as load_weights
    from weft.checkpoint.weights_files import save_weights as save_weights
    from weft.config import CheckpointConfig as CheckpointConfig
    from weft.config import TrainerConfig as TrainerConfig
    from weft.data.data import Data as Data
    from weft.data.datasets import DictDataset as DictDataset
    from weft.data.windows import windows as windows
    from weft.events import Hook as Hook
    from weft.integrations.neuromancer.littrainer import LitTrainer as LitTrainer
    from weft.loop.result import FitResult as FitResult
    from weft.loop.run import Run as Run
    from weft.loop.trainer import Trainer as Trainer
    from weft.problem.barrier import BarrierLoss as BarrierLoss
    from weft.problem.constraints import equal as equal
    from weft.problem.constraints import greater_equal as greater_equal
    from weft.problem.constraints import less_equal as less_equal
    from weft.problem.derivatives import gradient as gradient
    from weft.problem.lagrangian import AugmentedLagrangian as AugmentedLagrangian
    from weft.problem.losses import PenaltyLoss as PenaltyLoss
    from weft.problem.nodes import Node as Node
    from weft.problem.problem import Problem as Problem
    from weft.problem.residuals import residual as residual
    from weft.problem.rollout import Rollout as Rollout
    from weft.problem.scores import whole as whole
    from weft.problem.supervised import Supervised as Supervised
    from weft.problem.terms import objective as objective
    from weft.recipes.batches import DataConfig as DataConfig
    from weft.records.comparison import compare as compare
    from weft.records.listing import runs as runs
    from weft.records.results import load_result as load_result
    from weft.slurm.submitting import submit as submit
    from weft.step.phase import Phase as Phase
    from weft.step.phase import Schedule as Schedule
    from weft.step.until import Until as Until
    from weft.sweeps.folds import cross_validate as cross_validate
    from weft.sweeps.rates import find_lr as find_lr
    from weft.sweeps.settings import SweepConfig as SweepConfig
    from weft.sweeps.sweep import sweep as sweep
else:
    __getattr__, __dir__, __all__ = _face(__name__)
