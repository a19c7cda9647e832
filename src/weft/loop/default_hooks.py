"""The hooks that a trainer's options ask for."""

from __future__ import annotations

from typing import Any

from weft.step.state import RunState

OF_THIS_PROCESS: list[Any] = []
"""Functions that make hooks for every run of this process: a job that has to leave in time."""


def hooks_from(state: RunState) -> list[Any]:
    """The hooks that the options ask for, in the order in which they listen (after the user's own)."""
    config, hooks, options, run_dir = state.config, [], state.trainer.options, state.kept.run_dir
    if (profiler := config.profiler or options["profiler"]) is not None:
        from weft.hooks.profiling import Profiling

        hooks.append(Profiling(profiler))
    if config.patience is not None or any(phase.patience for phase in state.training.phases):
        from weft.loop.stopping import EarlyStopping

        hooks.append(EarlyStopping(config.patience, config.min_delta, config.warmup, config.min_epochs))
    if any(phase.until for phase in state.training.phases):
        from weft.loop.until import Ending

        hooks.append(Ending())
    if config.progress is not False:
        from weft.loop.progress_line import ProgressLine

        hooks.append(ProgressLine())
    given = options["loggers"]
    if run_dir is not None and given is not False:  # a run folder always has its metrics.csv
        others = given if isinstance(given, list | tuple) else [given] if given not in (None, True) else []
        given = [*(["csv"] if "csv" not in others else []), *others]
    if given not in (None, False) and not config.fast_dev_run:
        from weft.loggers import Logging, make_loggers

        if loggers := make_loggers(given, run_dir):
            hooks.append(Logging(loggers, log_every=config.log_every))
    if config.checkpointing is not None and run_dir is not None:
        from weft.loop.saving import Checkpointing

        hooks.append(Checkpointing(config.checkpointing))
    if run_dir is not None:
        from weft.records.describe import RunFolder

        hooks.append(RunFolder())  # last: the report reads what the loggers wrote
    return hooks + [make() for make in OF_THIS_PROCESS]
