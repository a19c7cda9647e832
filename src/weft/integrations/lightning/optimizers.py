"""What `configure_optimizers` returns, in every shape, and when its schedulers step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from weft.integrations.lightning.names import lightning_class, overrides
from weft.types import suggest

if TYPE_CHECKING:
    from torch import nn

    from weft.integrations.lightning.context import Context

SHAPES = (
    "an optimizer, a list of optimizers, ([optimizers], [schedulers]), "
    '{"optimizer": ..., "lr_scheduler": ..., "monitor": ...}, a list of such dicts, or None'
)


def configured(run: Context) -> tuple[list[Optimizer], list[Any]]:
    """The optimizers and the scheduler configurations of a module. Raises for what is not one of `SHAPES`."""
    module, returned = run.module, run.hooks_of.call_module("configure_optimizers")
    if returned is None:
        run.state.warn_once(
            f"{type(module).__name__}.configure_optimizers returned None: nothing is updated in this fit."
        )
        return [], []
    optimizers, schedulers, monitor = _sorted_out(module, returned)
    if module.automatic_optimization and len(optimizers) > 1:
        raise RuntimeError(
            f"{type(module).__name__} has {len(optimizers)} optimizers, which takes manual optimization: set "
            "self.automatic_optimization = False in __init__, and in training_step `a, b = self.optimizers()`."
        )
    configs = [_config(run, s, monitor) for s in schedulers]
    for config in configs:
        owner = getattr(config.scheduler, "optimizer", None)
        if owner is not None and all(owner is not o for o in optimizers):
            raise ValueError(f"{type(config.scheduler).__name__} belongs to an optimizer that was not returned.")
    return optimizers, configs


def _sorted_out(module: nn.Module, returned: Any) -> tuple[list[Optimizer], list[Any], str | None]:
    """(Optimizers, schedulers, the monitor of a single dict)."""
    if _is_optimizer(returned):
        return [returned], [], None
    if isinstance(returned, Mapping):
        _check_keys(returned)
        return (
            [returned["optimizer"]],
            [returned["lr_scheduler"]] if "lr_scheduler" in returned else [],
            returned.get("monitor"),
        )
    if isinstance(returned, list | tuple):
        if len(returned) == 2 and isinstance(returned[0], list) and all(map(_is_optimizer, returned[0])):
            schedulers = returned[1] if isinstance(returned[1], list) else [returned[1]]
            return list(returned[0]), schedulers, None
        if all(isinstance(item, Mapping) for item in returned):
            for item in returned:
                _check_keys(item)
            found = [item["lr_scheduler"] for item in returned if "lr_scheduler" in item]
            return [item["optimizer"] for item in returned], found, None
        if all(map(_is_optimizer, returned)):
            return list(returned), [], None
    raise TypeError(f"{type(module).__name__}.configure_optimizers returned {returned!r}; expected {SHAPES}.")


def _is_optimizer(thing: Any) -> bool:
    return isinstance(thing, Optimizer) or all(
        hasattr(thing, n) for n in ("step", "zero_grad", "param_groups", "state_dict")
    )


def _check_keys(returned: Mapping[str, Any]) -> None:
    known = ("optimizer", "lr_scheduler", "monitor")
    if "frequency" in returned:
        raise NotImplementedError(
            "configure_optimizers: 'frequency' beside 'optimizer' is a form of Lightning 1. Today: "
            "self.automatic_optimization = False, and in training_step decide which optimizer steps."
        )
    if unknown := [k for k in returned if k not in known]:
        raise ValueError(
            f"configure_optimizers: unknown key {unknown[0]!r}{suggest(unknown[0], known)}; known: {known}."
        )
    if "optimizer" not in returned:
        raise ValueError(f"configure_optimizers: the dict with {list(returned)} has no 'optimizer'.")


def _config(run: Context, given: Any, monitor: str | None) -> Any:
    """The configuration of a scheduler: the scheduler itself, or a dict with 'scheduler' and when it steps."""
    module = run.module
    config_class = lightning_class(module, "utilities.types.LRSchedulerConfig")
    given = dict(given) if isinstance(given, Mapping) else {"scheduler": given, "monitor": monitor}
    known = [f.name for f in fields(config_class)]
    if unknown := [k for k in given if k not in known]:
        raise ValueError(
            f"configure_optimizers: unknown key {unknown[0]!r}{suggest(unknown[0], known)}; known: {known}."
        )
    if "scheduler" not in given:
        raise ValueError(f"configure_optimizers: the lr_scheduler dict with {list(given)} has no 'scheduler'.")
    scheduler = given["scheduler"]
    plateau = isinstance(scheduler, ReduceLROnPlateau)
    config = config_class(**{**given, "reduce_on_plateau": given.get("reduce_on_plateau", plateau)})
    if not module.automatic_optimization:
        if said := [k for k in ("reduce_on_plateau", "strict") if k in given] + ["monitor"] * (
            given.get("monitor") is not None
        ):
            run.state.warn_once(f"The lr_scheduler's {said} have no effect in manual optimization: step it yourself.")
        return config_class(**{k: v for k, v in given.items() if k not in ("reduce_on_plateau", "monitor", "strict")})
    if config.interval not in ("step", "epoch"):
        raise ValueError(f"configure_optimizers: interval={config.interval!r}; expected 'step' or 'epoch'.")
    if config.reduce_on_plateau and config.monitor is None:
        raise ValueError(
            f"{type(scheduler).__name__} needs a metric: return "
            '{"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}.'
        )
    if isinstance(scheduler, OneCycleLR) and config.interval == "epoch":
        run.state.warn_once("OneCycleLR steps once an epoch here; 'interval': 'step' in its dict is the usual choice.")
    if not isinstance(scheduler, LRScheduler | ReduceLROnPlateau) and not overrides(module, "lr_scheduler_step"):
        raise TypeError(
            f"{type(scheduler).__name__} is no torch scheduler; {type(module).__name__} needs lr_scheduler_step."
        )
    return config


class Schedulers:
    """When schedulers step. In manual optimization never: the module steps them."""

    def __init__(self, run: Context, configs: Iterable[Any]) -> None:
        self.run, self.configs = run, list(configs)
        self._fresh: list[Any] = []
        if run.renews:
            from weft.loop.renewal import Fresh

            self._fresh = [Fresh(config.scheduler) for config in self.configs]
        self._own_step = run.hooks_of.bind("lr_scheduler_step", callbacks=False)

    def step(self, interval: str, plateau: bool) -> None:
        """Step those of an interval ("step", "epoch"), of the kind that reads a metric (`plateau`) or of the other.

        A frequency counts batches, or epochs, from the first of the epoch, or of the fit.
        """
        run = self.run
        if not self.configs or not run.module.automatic_optimization:
            return
        number = (run.batch_idx if interval == "step" else run.progress.epoch) + 1
        for config in self.configs:
            if config.interval != interval or bool(config.reduce_on_plateau) != plateau or number % config.frequency:
                continue
            metric = None
            if plateau:
                metric = run.view.callback_metrics.get(config.monitor)
                if metric is None:
                    self._is_missing(config)
                    continue
            if self._own_step is not None:
                self._own_step(config.scheduler, metric)
            elif metric is None:
                config.scheduler.step()
            else:
                config.scheduler.step(metric)

    def renew(self, renews: tuple[str, ...], saved: list[dict[str, Any]]) -> None:
        """Go on from a checkpoint with what is new of the module's optimizers, which have their options already, and
        of its schedulers, which are stepped to where they would be."""
        from weft.loop.renewal import begin_at_base, rebase

        if "scheduler" not in renews:
            for config, state in zip(self.configs, saved, strict=True):
                config.scheduler.load_state_dict(state)
                rebase(config.scheduler)
            return
        progress, history = self.run.progress, self.run.state.history.values
        for optimizer in {id(f.optimizer): f.optimizer for f in self._fresh}.values():
            begin_at_base(optimizer)
        for number, (config, fresh) in enumerate(zip(self.configs, self._fresh, strict=True)):
            fresh.put_back()
            count = progress.step if config.interval == "step" else progress.epoch
            if number < len(saved) and len(saved) == len(self.configs):  # as often as the one in the checkpoint
                count = saved[number].get("last_epoch", count // config.frequency)
            else:
                count //= config.frequency
            if config.reduce_on_plateau:
                column = history.get(config.monitor, [])
                for value in column[max(0, len(column) - count) :]:
                    config.scheduler.step(value)
            else:
                for _ in range(count):
                    config.scheduler.step()

    def _is_missing(self, config: Any) -> None:
        found = sorted(self.run.view.callback_metrics)
        message = (
            f"{type(config.scheduler).__name__} monitors {config.monitor!r}, which was not logged; logged: {found}"
        )
        if config.strict:
            raise ValueError(f"{message}{suggest(config.monitor, found)}. ('strict': False goes on without it.)")
        self.run.state.warn_once(f"{message}; the learning rate is left as it is.")
