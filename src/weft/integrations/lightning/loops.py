"""The loops of validation, test and prediction, with every hook in Lightning's order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.integrations.lightning.data import STEPS, Source, Transfer
from weft.integrations.lightning.names import is_a, names_explicitly, overrides, takes, tell_of_log_dict
from weft.integrations.lightning.update import step_of
from weft.problem.reading import needs_grad_in_eval

if TYPE_CHECKING:
    from weft.integrations.lightning.context import Context

EVENTS = {"dev": "validation", "test": "test", "predict": "predict"}


def evaluate(run: Context, source: Source) -> dict[str, float]:
    """What the module logged over all loaders of the dev or test set, as floats by name.

    Without gradients unless the module asks for them (`grad_inference`); modes of submodules are as before after it.
    """
    event, results, hooks = EVENTS[source.split], run.results, run.hooks_of
    with torch.set_grad_enabled(needs_grad_in_eval(run.module.modules())):
        source.load()
        if sum(source.limits) == 0:
            return {}
        stream, several = source.open(), _several(run, source)
        modes, run.at_epoch_end = _to_eval(run, event), True
        hooks.call(f"on_{event}_start")
        hooks.call(f"on_{event}_epoch_start")
        step, transfer = step_of(run, STEPS[source.split]), Transfer(run)
        on_start, on_end = hooks.bind(f"on_{event}_batch_start"), hooks.bind(f"on_{event}_batch_end")
        logged: dict[str, Tensor] = {}
        last_loader = 0
        for batch, number, loader in stream:
            if loader != last_loader:
                logged |= _taken(run)
                last_loader = loader
            run.at_epoch_end = False
            if transfer.is_needed:
                batch = transfer(batch, loader)
            which = (loader,) if several else ()
            results.loader = loader if several else None
            results.start_batch(batch)
            if on_start is not None:
                on_start(batch, number, *which)
            output = step(batch, number, *which)
            if isinstance(output, dict):
                tell_of_log_dict(run, output, STEPS[source.split])
            if on_end is not None:
                on_end(output, batch, number, *which)
            results.end_batch()
        logged |= _taken(run)
        results.loader = None
        hooks.call(f"on_{event}_epoch_end")
        logged |= _taken(run)
        hooks.call(f"on_{event}_end")
        results.reset()
        _to_train(run, event, modes)
    return {name: float(value) for name, value in logged.items()}


def _taken(run: Context) -> dict[str, Tensor]:
    """What was logged over the batches of a loader, reduced; from here on callbacks see it."""
    if not run.at_epoch_end:
        run.view.take()  # what was logged for the last step
        run.at_epoch_end = True
    run.view.take()
    return run.results.by_name()


def predict(run: Context, source: Source) -> list[Any]:
    """What `predict_step` returned for each batch, on the CPU; with several loaders a list of such lists."""
    hooks = run.hooks_of
    if writers := [type(c).__name__ for c in run.callbacks if is_a(c, "BasePredictionWriter")]:
        raise NotImplementedError(
            f"{writers} ask the trainer for the rows of each batch, which weft.Trainer does not track; "
            "`from weft.integrations.lightning import Trainer` runs them as they are."
        )
    with torch.set_grad_enabled(needs_grad_in_eval(run.module.modules())):
        source.load()
        stream, several = source.open(), _several(run, source)
        modes = _to_eval(run, "predict")
        hooks.call("on_predict_start")
        hooks.call("on_predict_epoch_start")
        step, transfer = step_of(run, "predict_step"), Transfer(run)
        on_start, on_end = hooks.bind("on_predict_batch_start"), hooks.bind("on_predict_batch_end")
        found: list[list[Any]] = [[] for _ in source.flat]
        for batch, number, loader in stream:
            if transfer.is_needed:
                batch = transfer(batch, loader)
            which = (loader,) if several else ()
            if on_start is not None:
                on_start(batch, number, *which)
            output = step(batch, number, *which)
            if on_end is not None:
                on_end(output, batch, number, *which)
            found[loader].append(on_cpu(output))
        hooks.call("on_predict_epoch_end")
        hooks.call("on_predict_end")
        restore_modes(modes)
    return found if several else found[0]


def on_cpu(value: Any) -> Any:
    """A prediction with its tensors on the CPU."""
    from lightning.fabric.utilities import move_data_to_device

    return move_data_to_device(value, torch.device("cpu"))


def restore_modes(modes: dict[Any, bool]) -> None:
    """Put each module back into the mode it was in."""
    for module, training in modes.items():
        module.training = training


def _to_eval(run: Context, event: str) -> dict[Any, bool]:
    modes = {module: module.training for module in run.module.modules()}
    run.hooks_of.call_module(f"on_{event}_model_eval")
    return modes


def _to_train(run: Context, event: str, modes: dict[Any, bool]) -> None:
    if overrides(run.module, f"on_{event}_model_train"):
        run.hooks_of.call_module(f"on_{event}_model_train")
    else:
        restore_modes(modes)


def _several(run: Context, source: Source) -> bool:
    """Whether steps and hooks get the number of the loader; raises RuntimeError if their arguments do not fit."""
    event, name = EVENTS[source.split], type(run.module).__name__
    several = len(source.flat) > 1 and source.combined is None
    for hook in (STEPS[source.split], f"on_{event}_batch_start", f"on_{event}_batch_end"):
        function = getattr(run.module, hook)
        if several and not takes(function, "dataloader_idx"):
            raise RuntimeError(
                f"{name}.{hook} needs the argument dataloader_idx=0: there are {len(source.flat)} loaders."
            )
        if not several and names_explicitly(function, "dataloader_idx") and _is_required(function, "dataloader_idx"):
            raise RuntimeError(f"{name}.{hook} takes dataloader_idx, but there is one loader; give it a default of 0.")
    return several


def _is_required(function: Any, argument: str) -> bool:
    import inspect

    parameter = inspect.signature(function).parameters.get(argument)
    return parameter is not None and parameter.default is inspect.Parameter.empty
