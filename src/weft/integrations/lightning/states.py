"""What a checkpoint holds for a LightningModule besides the core's state, and checkpoints in Lightning's format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import Metric

from weft.checkpoint.weights import load_into
from weft.integrations.lightning.log import Logged
from weft.integrations.lightning.names import is_a, lightning_class, package_of

if TYPE_CHECKING:
    from weft.integrations.lightning.context import Context

STANDARD = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "state_dict",
    "loops",
    "callbacks",
    "optimizer_states",
    "lr_schedulers",
    "hparams_name",
    "hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hyper_parameters",
)


def state_of(run: Context) -> dict[str, Any]:
    """Schedulers, callbacks, data module, what was logged in the open epoch, and where the loaders stand."""
    own = {}
    run.hooks_of.call_module("on_save_checkpoint", as_seen := {**head(run), "state_dict": run.module.state_dict()})
    for key, value in as_seen.items():
        if key not in STANDARD:
            own[key] = value
    in_epoch = run.progress.batch > 0
    return {
        "schedulers": [config.scheduler.state_dict() for config in run.schedulers.configs],
        "callbacks": {c.state_key: state for c in run.callbacks if (state := c.state_dict())},
        "datamodule": run.datamodule.state_dict() if run.datamodule is not None else {},
        "module": own,
        "began": run.began,
        "loader_generators": run.tape.own_states() if run.began else [],
        "loader_starts": list(run.tape.states) if in_epoch else [],
        "read_ahead": run.tape.ahead if in_epoch else None,
        "logged": [_entry_state(run, e) for e in run.results_of_training.entries.values()] if in_epoch else [],
        "metrics": _metric_states(run) if in_epoch else {},
        "should_stop": run.view._should_stop,
    }


def resume_module(run: Context, state: dict[str, Any], weights: dict[str, Any]) -> None:
    """Weights, callbacks and data module, before optimizers are made; the module's on_load_checkpoint comes first."""
    seen = {**head(run), "state_dict": dict(weights), **state["module"]}
    run.hooks_of.call_module("on_load_checkpoint", seen)
    load_into(run.module, seen["state_dict"], source="the checkpoint")
    if run.datamodule is not None and state["datamodule"]:
        run.datamodule.load_state_dict(state["datamodule"])
    known = {c.state_key: c for c in run.callbacks}
    if missing := [key for key in state["callbacks"] if key not in known]:
        raise ValueError(f"The checkpoint holds the state of callbacks {missing}, which are not among the hooks now.")
    for key, callback_state in state["callbacks"].items():
        known[key].load_state_dict(callback_state)


def resume_training(run: Context, state: dict[str, Any]) -> None:
    """The rest of `state_of`, when training goes on."""
    if run.renews:
        run.schedulers.renew(run.renews, state["schedulers"])
    else:
        for config, scheduler in zip(run.schedulers.configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(scheduler)
    run.tape.states = list(state["loader_starts"])
    run.tape.ahead = state["read_ahead"]
    run.generators_to_resume = list(state["loader_generators"])
    metrics = {name: m for name, m in run.module.named_modules() if isinstance(m, Metric)}
    for saved in state["logged"]:
        fx, name, loader = saved["key"]
        entry = Logged(fx, name, loader, tuple(saved["args"]), tuple(saved["levels"]))
        entry.reduce = saved["reduce"]
        if saved["metric"] is not None:
            entry.metric, entry.last = metrics[saved["metric"]], saved["last"]
        else:
            entry.load_state_dict(saved["values"])
        run.results_of_training.entries[fx, name, loader] = entry
    for name, values in state["metrics"].items():
        _set_metric(metrics[name], values)
    run.view._should_stop = state["should_stop"]


def _entry_state(run: Context, entry: Logged) -> dict[str, Any]:
    """A logged name of the open epoch: how it was logged, and its values, or the name of its metric object."""
    args = [a if isinstance(a, bool | str | None) else entry.reduce for a in entry.args]  # a function is saved by name
    state = {
        "key": [entry.fx, entry.name, entry.loader],
        "args": args,
        "levels": [entry.on_step, entry.on_epoch],
        "reduce": entry.reduce,
        "metric": None,
        "last": None,
        "values": {},
    }
    if entry.metric is None:
        return state | {"values": entry.state_dict()}
    name = next(name for name, m in run.module.named_modules() if m is entry.metric)
    return state | {"metric": name, "last": entry.last}


def _metric_states(run: Context) -> dict[str, Any]:
    """The states of all metric objects of the module; they are not part of its state dict."""
    found = {}
    for name, metric in run.module.named_modules():
        if isinstance(metric, Metric):
            values = {key: _plain(getattr(metric, key)) for key in metric._defaults}
            found[name] = {"values": values, "updates": metric._update_count}
    return found


def _plain(value: Any) -> Any:
    return [v.detach().clone() for v in value] if isinstance(value, list) else value.detach().clone()


def _set_metric(metric: Metric, state: dict[str, Any]) -> None:
    for key, value in state["values"].items():
        setattr(
            metric, key, [v.to(metric.device) for v in value] if isinstance(value, list) else value.to(metric.device)
        )
    metric._update_count, metric._computed = state["updates"], None


def head(run: Context) -> dict[str, Any]:
    """The keys that stand in every Lightning checkpoint."""
    version = sys.modules[package_of(run.module)].__version__
    return {"epoch": run.progress.epoch, "global_step": run.progress.step, "pytorch-lightning_version": version}


def save_lightning_checkpoint(run: Context, path: Any, weights_only: bool) -> None:
    """Write what `LightningModule.load_from_checkpoint` reads: weights, hyperparameters, states of optimizers, ..."""
    module, datamodule = run.module, run.datamodule
    state: dict[str, Any] = {**head(run), "state_dict": module.state_dict(), "loops": _loops(run)}
    if not weights_only:
        state["callbacks"] = {c.state_key: found for c in run.callbacks if (found := c.state_dict())}
        state["optimizer_states"] = [o.state_dict() for o in run.strategy.optimizers]
        state["lr_schedulers"] = [config.scheduler.state_dict() for config in run.schedulers.configs]
    for owner in (module, datamodule):
        if owner is not None and owner.hparams:
            if hasattr(owner, "_hparams_name"):
                state[owner.CHECKPOINT_HYPER_PARAMS_NAME] = owner._hparams_name
            state[owner.CHECKPOINT_HYPER_PARAMS_KEY] = dict(owner.hparams)
    if datamodule is not None and (found := datamodule.state_dict()):
        state[type(datamodule).__qualname__] = found
    if not weights_only:
        for callback in run.callbacks:
            callback.on_save_checkpoint(run.view, module, state)
    run.hooks_of.call_module("on_save_checkpoint", state)
    if run.fabric.is_global_zero:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
    run.fabric.barrier()


def _loops(run: Context) -> dict[str, Any]:
    """Lightning's own counters as they would stand at this moment, so that its Trainer goes on from the file."""
    epoch, batch, hook = run.progress.epoch, run.progress.batch, run.module._current_fx_name
    outer = lightning_class(run.module, "loops.fit_loop._FitLoop")(run.view)
    inner, steps = outer.epoch_loop, run.progress.step
    automatic, by_hand = inner.automatic_optimization.optim_progress.optimizer.step, inner.manual_optimization
    for count in (outer.epoch_progress.current, outer.epoch_progress.total):
        count.ready = count.started = epoch + (batch > 0)
        count.processed, count.completed = epoch + (hook == "on_train_epoch_end"), epoch
    of_all = batch + (epoch * run.view.num_training_batches if epoch else 0)
    for count, number in ((inner.batch_progress.current, batch), (inner.batch_progress.total, of_all)):
        count.ready = count.started = count.processed = number
        count.completed = number - (hook == "on_train_batch_end")
    inner.batch_progress.is_last_batch = run.is_last_batch
    count = automatic.total if run.module.automatic_optimization else by_hand.optim_step_progress.total
    count.ready = count.completed = steps
    inner._batches_that_stepped = steps - (hook != "on_train_epoch_end")
    return {"fit_loop": outer.state_dict()}


def is_idle(run: Context, callback: Any) -> bool:
    """Whether a callback of Lightning's own has no effect here, which is said once.

    Raises NotImplementedError for one that would change what is trained.
    """
    name, way = type(callback).__name__, "`from weft.integrations.lightning import Trainer` runs it as it is"
    if is_a(callback, "StochasticWeightAveraging"):
        raise NotImplementedError(f"{name} changes Lightning's loops, which weft.Trainer does not have; {way}.")
    reasons = {
        "LearningRateMonitor": "learning rates are always logged",
        "ProgressBar": "weft has its own line",
        "DeviceStatsMonitor": "it reads Lightning's accelerator",
        "ThroughputMonitor": "it reads Lightning's loops",
    }
    why = next((why for kind, why in reasons.items() if is_a(callback, kind)), None)
    if why is not None:
        run.state.warn_once(f"{name} has no effect with weft.Trainer: {why}. {way}.")
    return why is not None
