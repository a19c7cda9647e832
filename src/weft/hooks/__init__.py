"""Hooks that come with weft, and which of them a trainer's options ask for.

    weft.Trainer(hooks=[weft.hooks.EMA(0.999), weft.hooks.ReLoBRaLo()])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weft.hooks.checkpointing import Checkpointing
from weft.hooks.folder import RunFolder
from weft.hooks.progress import ProgressLine
from weft.hooks.stopping import EarlyStopping
from weft.types import suggest

# hooks that are asked for by name, and the module each lives in, imported when first used
_HOME = {
    "weft.hooks.averaging": ("EMA", "SWA"),
    "weft.hooks.balancing": ("GradNorm", "LearningRateAnnealing", "NTKWeights", "ReLoBRaLo", "SelfAdaptive", "SoftAdapt"),
    "weft.hooks.gradients": ("GradientNorms",),
    "weft.hooks.profiling": ("AdvancedProfiler", "PyTorchProfiler"),
    "weft.hooks.timing": ("SimpleProfiler",),
    "weft.hooks.pictures": ("Figures", "WeightHistograms"),
    "weft.hooks.parts": ("freeze", "load_node", "unfreeze"),
    "weft.hooks.sampling": ("Resample",),
    "weft.hooks.schedules": ("Curriculum",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

if TYPE_CHECKING:
    from weft.hooks.averaging import EMA, SWA  # noqa: F401
    from weft.hooks.balancing import (  # noqa: F401
        GradNorm,
        LearningRateAnnealing,
        NTKWeights,
        ReLoBRaLo,
        SelfAdaptive,
        SoftAdapt,
    )
    from weft.hooks.gradients import GradientNorms  # noqa: F401
    from weft.hooks.parts import freeze, load_node, unfreeze  # noqa: F401
    from weft.hooks.pictures import Figures, WeightHistograms  # noqa: F401
    from weft.hooks.profiling import AdvancedProfiler, PyTorchProfiler  # noqa: F401
    from weft.hooks.sampling import Resample  # noqa: F401
    from weft.hooks.schedules import Curriculum  # noqa: F401
    from weft.hooks.timing import SimpleProfiler  # noqa: F401
    from weft.run import Run
    from weft.trainer import Trainer


def hooks_from(trainer: Trainer, run: Run) -> list[Any]:
    """The hooks that the options ask for, in the order in which they listen (after the user's own)."""
    from weft.loggers import Logging, make_loggers

    config, hooks = trainer.config, []
    if (profiler := config.profiler or trainer.options["profiler"]) is not None:
        from weft.hooks.profiling import Profiling

        hooks.append(Profiling(profiler))
    if config.patience is not None or any(phase.patience for phase in run.phases):
        hooks.append(EarlyStopping(config.patience, config.min_delta, config.warmup, config.min_epochs))
    if config.progress is not False:
        hooks.append(ProgressLine())
    given = trainer.options["loggers"]
    if run.run_dir is not None and given is not False:  # a run folder always has its metrics.csv
        others = given if isinstance(given, list | tuple) else [given] if given not in (None, True) else []
        given = [*(["csv"] if "csv" not in others else []), *others]
    loggers = [] if config.fast_dev_run else make_loggers(given, run.run_dir)
    if loggers:
        hooks.append(Logging(loggers, log_every=config.log_every))
    if config.checkpointing is not None and run.run_dir is not None:
        hooks.append(Checkpointing(config.checkpointing))
    if run.run_dir is not None:
        hooks.append(RunFolder())  # last: the report reads what the loggers wrote
    return hooks


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'weft.hooks' has no attribute {name!r}{suggest(name, _MODULE_OF)}")
