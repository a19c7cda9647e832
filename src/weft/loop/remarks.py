"""What a fit says of its options before it trains: one line, at most."""

from __future__ import annotations

from collections.abc import Iterator

from weft.step.state import RunState


def tell_of_options(state: RunState, stops_itself: bool = False) -> None:
    """Warn once of the options that were given and have no effect in this fit, each with the reason.

    `stops_itself`: the problem has other ways than patience to end training.
    """
    if hasattr(state.problem, "own_output"):  # Supervised
        from weft.loop.mistakes import tell_of_one_batch

        tell_of_one_batch(state)
    if found := [f"{name} ({why})" for name, why in _without_effect(state, stops_itself)]:
        state.warn_once(f"No effect in this fit: {'; '.join(found)}.")


def _without_effect(state: RunState, stops_itself: bool) -> Iterator[tuple[str, str]]:
    config, given, data = state.config, state.trainer.options, state.feed.data
    is_patient = config.patience is not None or any(phase.patience for phase in state.training.phases)
    writes = state.kept.run_dir is not None or bool(config.fast_dev_run)
    logs = writes or given["loggers"] not in (None, False) or any(hasattr(hook, "loggers") for hook in state.hooks)
    slices = [getattr(source, "resident", False) for source in state.feed.splits.values() if source is not None]
    no_patience = "nothing stops early: there is no patience"
    no_folder = "nothing is written: there is no root_dir, checkpoint or logger"
    table = (
        ("min_epochs", config.min_epochs and not (is_patient or stops_itself), no_patience),
        ("monitor_metric", config.monitor_metric is False and is_patient, "patience looks at the loss"),
        ("warmup", config.warmup and not is_patient, no_patience),
        ("min_delta", config.min_delta and not is_patient, no_patience),
        ("clip_algorithm", config.clip_algorithm != "norm" and config.clip is None, "nothing is clipped: clip=None"),
        ("validate_every", config.validate_every != 1 and not state.has("dev"), "there is no dev data"),
        ("dev_metric", config.dev_metric != "dev_loss" and not state.has("dev"), "there is no dev data"),
        ("strict_data", config.strict_data and not any(slices), "only tensors are looked at before training"),
        ("num_workers", data.num_workers and all(slices), "the data are tensors, which are sliced without workers"),
        ("run_name", config.run_name is not None and not writes, no_folder),
        ("log_every", config.log_every and not logs, no_folder),
        ("timeout", config.timeout is not None and state.processes.world == 1, "there is one process"),
    )
    for name, is_idle, why in table:
        if is_idle:
            yield name, why
