"""The hooks that a trainer's options ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.loop.progress_line import ProgressLine
from weft.loop.saving import Checkpointing
from weft.loop.stopping import EarlyStopping
from weft.records.describe import RunFolder

if TYPE_CHECKING:
    from weft.loop.run import Run
    from weft.loop.trainer import Trainer


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

