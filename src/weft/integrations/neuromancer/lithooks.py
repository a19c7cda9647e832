"""What the functions given to `weft.LitTrainer` meet: Lightning's hook names and signatures, and one object as `self`.

def on_train_epoch_end(self):
    self.log("spread", torch.stack(self.training_step_outputs).std())

weft.LitTrainer(custom_hooks={"on_train_epoch_end": on_train_epoch_end})
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.events import Hook
from weft.step.optimizers import DEFAULT
from weft.step.phase import Schedule
from weft.types import suggest

_BATCH = ("batch", "batch_idx", "dataloader_idx=0")
_OUTPUTS = ("outputs", *_BATCH)
HOOKS: dict[str, tuple[str, ...]] = {
    "setup": ("stage",),
    "configure_model": (),
    "configure_optimizers": (),
    "on_fit_start": (),
    "on_train_start": (),
    "on_train_epoch_start": (),
    "on_train_batch_start": ("batch", "batch_idx"),
    "on_before_zero_grad": ("optimizer",),
    "on_before_backward": ("loss",),
    "backward": ("loss",),
    "on_after_backward": (),
    "on_before_optimizer_step": ("optimizer",),
    "on_train_batch_end": ("outputs", "batch", "batch_idx"),
    "on_validation_start": (),
    "on_validation_epoch_start": (),
    "on_validation_batch_start": _BATCH,
    "validation_step": ("batch", "batch_idx"),
    "on_validation_batch_end": _OUTPUTS,
    "on_validation_epoch_end": (),
    "on_validation_end": (),
    "on_train_epoch_end": (),
    "on_train_end": (),
    "on_fit_end": (),
    "on_test_start": (),
    "on_test_epoch_start": (),
    "on_test_batch_start": _BATCH,
    "test_step": ("batch", "batch_idx"),
    "on_test_batch_end": _OUTPUTS,
    "on_test_epoch_end": (),
    "on_test_end": (),
    "on_predict_start": (),
    "on_predict_epoch_start": (),
    "on_predict_batch_start": _BATCH,
    "predict_step": ("batch", "batch_idx"),
    "on_predict_batch_end": _OUTPUTS,
    "on_predict_epoch_end": (),
    "on_predict_end": (),
    "on_save_checkpoint": ("checkpoint",),
    "on_load_checkpoint": ("checkpoint",),
    "teardown": ("stage",),
}
"""Lightning's hooks in the order in which they are called, and their arguments after `self` (lightning 2.6)."""

INSTEAD = {
    "training_step": "custom_training_step",
    "forward": "custom_training_step",
    "optimizer_step": "automatic_optimization=False",
    "optimizer_zero_grad": "automatic_optimization=False",
    "lr_scheduler_step": "the option scheduler",
    "configure_gradient_clipping": "clip and clip_algorithm",
    "configure_callbacks": "the option hooks",
    "transfer_batch_to_device": "the data setup function",
    "on_before_batch_transfer": "the data setup function",
    "on_after_batch_transfer": "the data setup function",
    "prepare_data": "the data setup function",
    "train_dataloader": "the data setup function",
    "val_dataloader": "the data setup function",
    "test_dataloader": "the data setup function",
    "predict_dataloader": "the data setup function",
}
"""Hooks of Lightning that are not called, and what to use for them."""


def signature_of(name: str) -> str:
    """How hook `name` is written: "on_train_batch_end(self, outputs, batch, batch_idx)"."""
    return f"{name}({', '.join(('self', *HOOKS[name]))})"


class LightningHooks:
    """The functions by Lightning's hook names, checked. `hooks.call(name, model, ...)` calls one if it is there.

    Raises TypeError for a name that is never called and for a function that cannot take the hook's arguments; both
    show the right name and signature. Argument names and annotations are free; `dataloader_idx` may be left out.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self.functions = dict(functions)
        self._want_loader: set[str] = set()
        for name, function in self.functions.items():
            if name not in HOOKS:
                instead = f"; use {INSTEAD[name]} instead" if name in INSTEAD else suggest(name, HOOKS)
                right = [signature_of(known) for known in HOOKS if f"'{known}'" in instead]
                raise TypeError(f"custom_hooks: {name!r} is never called{instead}. {' '.join(right)}".rstrip())
            if not callable(function):
                raise TypeError(f"custom_hooks: {name!r} is {function!r}; expected a function {signature_of(name)}.")
            takes_all = takes(function, 1 + len(HOOKS[name]))
            if not takes_all and not takes(function, 1 + len(_required(name))):
                found = inspect.signature(function)
                raise TypeError(f"custom_hooks: {name}{found} has the wrong signature; expected {signature_of(name)}.")
            if takes_all and "dataloader_idx=0" in HOOKS[name]:
                self._want_loader.add(name)

    def __contains__(self, name: str) -> bool:
        return name in self.functions

    def __bool__(self) -> bool:
        return bool(self.functions)

    def call(self, name: str, model: Any, *args: Any) -> Any:
        """What the function for `name` returns, None if there is none."""
        function = self.functions.get(name)
        if function is None:
            return None
        return function(model, *args, 0) if name in self._want_loader else function(model, *args)  # there is one loader


def _required(name: str) -> list[str]:
    return [argument for argument in HOOKS[name] if "=" not in argument]


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether `function` can be called with so many positional arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    return True


class LitModel:
    """What custom steps and hooks get as `model` or `self`: the problem with the trainer's state around it.

    `training_step_outputs` and `validation_step_outputs` hold the losses of this epoch, detached; they start anew with
    each epoch. It takes any attribute of yours; what it does not have itself is looked up in the problem.
    """

    def __init__(self, trainer: Any, problem: nn.Module) -> None:
        self.trainer, self.problem = trainer, problem
        self.training_step_outputs: list[Any] = []
        self.validation_step_outputs: list[Any] = []
        self.num_evaluated = (
            0  # batches of this evaluation so far; not the trainer's, whose attributes a graph stands for
        )

    def __call__(self, batch: Any) -> Any:
        """What the problem returns for a batch."""
        return self.problem(batch)

    def __getattr__(self, name: str) -> Any:
        if name in ("trainer", "problem"):
            raise AttributeError(name)
        try:
            return getattr(self.problem, name)
        except AttributeError:
            raise AttributeError(f"Neither weft's model nor {type(self.problem).__name__} has {name!r}.") from None

    def parameters(self) -> Iterator[nn.Parameter]:
        """The problem's parameters."""
        return self.problem.parameters()

    @property
    def current_epoch(self) -> int:
        """The number of the epoch, from 0."""
        return self.trainer.current_epoch

    @property
    def global_step(self) -> int:
        """Optimizer updates done so far."""
        return self.trainer.global_step

    @property
    def train_metric(self) -> str:
        """The key of the training loss."""
        return self.trainer.train_metric

    @property
    def dev_metric(self) -> str:
        """The key of the dev loss."""
        return self.trainer.dev_metric

    @property
    def test_metric(self) -> str:
        """The key of the test loss."""
        return self.trainer.test_metric

    @property
    def device(self) -> torch.device:
        """Where the problem is."""
        return next((p.device for p in self.problem.parameters()), torch.device("cpu"))

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Record a scalar: its mean over the epoch goes to the history and the loggers, and can be monitored.

        The arguments after `value` are Lightning's. They decide about its displays, which there are none of here; only
        `reduce_fx` must be "mean" (else ValueError).
        """
        if reduce_fx not in ("mean", torch.mean):
            raise ValueError(
                f"log({name!r}, reduce_fx={reduce_fx!r}): values are averaged over the epoch, nothing else."
            )
        self.trainer.log(name, value)

    def log_dict(self, dictionary: Mapping[str, Any], **options: Any) -> None:
        """Record several scalars by name."""
        for name, value in dictionary.items():
            self.log(name, value, **options)

    # ------------------------------------------------------------------ tools with automatic_optimization=False

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or a list of several; their `step()` is the trainer's (hooks, check of the gradients)."""
        found = list(self.trainer.optimizers.values())
        found = [ManualOptimizer(self.trainer, o) for o in found] if use_pl_optimizer else found
        return found[0] if len(found) == 1 else found

    def lr_schedulers(self) -> Any:
        """The scheduler, a list of several, or None."""
        found = list(self.trainer.schedulers.values())
        return None if not found else found[0] if len(found) == 1 else found

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Gradients of `loss`, added to those that are there."""
        hooks = self.trainer.lit_hooks
        hooks.call("on_before_backward", self, loss)
        if "backward" in hooks:
            hooks.call("backward", self, loss)
        else:
            self.trainer.backward(loss, *args, **kwargs)
        hooks.call("on_after_backward", self)

    def clip_gradients(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients of an optimizer's parameters, by "norm" (the default) or "value"."""
        if gradient_clip_val is None:
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        processes = self.trainer.run.state.processes
        processes.clip(params, gradient_clip_val, by_value=gradient_clip_algorithm == "value")


class ManualOptimizer:
    """An optimizer whose `step()` goes through the trainer; everything else is the optimizer's own."""

    def __init__(self, trainer: Any, optimizer: Optimizer) -> None:
        self._trainer, self.optimizer = trainer, optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Check the gradients and step; they are cleared after it. A closure is handed to the optimizer itself."""
        return self._trainer.step(self.optimizer) if closure is None else self.optimizer.step(closure)


class Bridge(Hook):
    """Calls Lightning's hooks at weft's events."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def call(self, name: str, *args: Any) -> Any:
        return self.trainer.lit_hooks.call(name, self.trainer.lit_problem, *args)

    def on_fit_start(self, trainer: Any) -> None:
        self.call("on_fit_start")
        self.call("on_train_start")

    def on_epoch_start(self, trainer: Any) -> None:
        trainer.lit_problem.training_step_outputs.clear()
        self.call("on_train_epoch_start")

    def on_before_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        if trainer.automatic_optimization:
            self.call("on_after_backward")
        self.call("on_before_optimizer_step", optimizer)

    def on_step_end(self, trainer: Any, batch: Any, loss: Any) -> None:
        trainer.lit_problem.training_step_outputs.append(loss)
        self.call("on_train_batch_end", {"loss": loss}, batch, trainer.batch_index)

    def on_validation_start(self, trainer: Any) -> None:
        trainer.lit_problem.num_evaluated = 0
        if trainer.stage == "fit":
            trainer.lit_problem.validation_step_outputs.clear()
            self.call("on_validation_start")
            self.call("on_validation_epoch_start")

    def on_validation_end(self, trainer: Any, metrics: Any) -> None:
        if trainer.stage == "fit":
            self.call("on_validation_epoch_end")
            self.call("on_validation_end")

    def on_fit_end(self, trainer: Any, result: Any) -> None:
        self.call("on_train_end")
        self.call("on_fit_end")
        self.call("teardown", "fit")


def from_configure_optimizers(returned: Any) -> tuple[dict[str, Optimizer], dict[str, Schedule]]:
    """Optimizers and schedules by name, from whatever Lightning lets `configure_optimizers` return.

    An optimizer; a dict with "optimizer" and "lr_scheduler"; a list of either; or (optimizers, schedulers). Several are
    named "0", "1", ... Raises TypeError for anything else, a hook that returned nothing included.
    """
    if isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(part, Sequence) for part in returned):
        optimizers, schedulers = list(returned[0]), list(returned[1])
        entries = [{"optimizer": o} for o in optimizers]
        for number, scheduler in enumerate(schedulers):
            owner = getattr(scheduler["scheduler"] if isinstance(scheduler, Mapping) else scheduler, "optimizer", None)
            at = next((i for i, o in enumerate(optimizers) if o is owner), number)
            entries[at]["lr_scheduler"] = scheduler
    else:
        several = returned if isinstance(returned, list | tuple) else [returned]
        entries = [entry if isinstance(entry, Mapping) else {"optimizer": entry} for entry in several]
    names = [DEFAULT] if len(entries) == 1 else [str(i) for i in range(len(entries))]
    found: dict[str, Optimizer] = {}
    schedules: dict[str, Schedule] = {}
    for name, entry in zip(names, entries, strict=True):
        if not isinstance(entry.get("optimizer"), Optimizer):
            raise TypeError(
                f"configure_optimizers returned {returned!r}; expected an optimizer, a dict with 'optimizer' (and "
                "'lr_scheduler'), a list of these, or (optimizers, schedulers)."
            )
        found[name] = entry["optimizer"]
        if (given := entry.get("lr_scheduler")) is not None:
            schedules[name] = _schedule(given)
    return found, schedules


def _schedule(given: Any) -> Schedule:
    if not isinstance(given, Mapping):
        return Schedule(given)
    known = {"scheduler", "interval", "frequency", "monitor", "strict", "name", "reduce_on_plateau"}
    if unknown := [key for key in given if key not in known]:
        raise TypeError(f"lr_scheduler has {unknown}{suggest(unknown[0], known)}; known keys are {sorted(known)}.")
    interval, frequency = given.get("interval", "epoch"), given.get("frequency", 1)
    return Schedule(given["scheduler"], interval=interval, monitor=given.get("monitor"), frequency=frequency)
