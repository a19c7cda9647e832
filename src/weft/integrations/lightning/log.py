"""`self.log`: what is kept of a logged value, and what it becomes at the end of a step and of an epoch.

Values are added up in the order and precision in which Lightning adds them, so that its numbers are these. Here they
are only collected (as floats on the CPU, as tensors on other devices) and added up when somebody asks.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from weft.integrations.lightning.names import lightning_class, overrides

if TYPE_CHECKING:
    from weft.integrations.lightning.context import Context

BY_STEP, BY_EPOCH, EPOCH_ONLY = (True, False, False), (False, True, False), (False, True, True)
"""Where a hook logs when nothing is said: (on_step, on_epoch, on_step is refused)."""

DEFAULTS = {
    **dict.fromkeys(
        (
            "training_step",
            "on_before_backward",
            "backward",
            "on_after_backward",
            "on_before_optimizer_step",
            "optimizer_step",
            "configure_gradient_clipping",
            "clip_gradients",
            "on_before_zero_grad",
            "optimizer_zero_grad",
            "on_train_batch_start",
            "on_train_batch_end",
        ),
        BY_STEP,
    ),
    **dict.fromkeys(
        (
            "validation_step",
            "test_step",
            "on_validation_batch_start",
            "on_validation_batch_end",
            "on_test_batch_start",
            "on_test_batch_end",
        ),
        BY_EPOCH,
    ),
    **dict.fromkeys(
        (
            "on_train_start",
            "on_train_epoch_start",
            "on_train_epoch_end",
            "on_validation_start",
            "on_validation_epoch_start",
            "on_validation_epoch_end",
            "on_test_start",
            "on_test_epoch_start",
            "on_test_epoch_end",
        ),
        EPOCH_ONLY,
    ),
}
FLUSH_AFTER = 256  # tensors that wait on a device before they are read, all at once


class Logged:
    """One logged name in one hook: the values of this epoch, and the last one."""

    __slots__ = (
        "_dtype",
        "_sizes",
        "_sum",
        "_total",
        "_values",
        "_waiting",
        "args",
        "fx",
        "last",
        "loader",
        "metric",
        "name",
        "on_epoch",
        "on_step",
        "prog_bar",
        "reduce",
    )

    def __init__(
        self, fx: str, name: str, loader: int | None, args: tuple[Any, ...], levels: tuple[bool, bool]
    ) -> None:
        self.fx, self.name, self.loader, self.args = fx, name, loader, args
        self.on_step, self.on_epoch = levels
        self.prog_bar, self.reduce = args[0], args[1]
        self.metric: Any = None
        self.last: Any = None
        self.clear()

    def clear(self) -> None:
        """Forget the values of the epoch (a metric object is reset by its owner)."""
        self._values: list[float] = []
        self._waiting: list[Tensor] = []
        self._sizes: list[int] = []
        self._sum: Any = None
        self._total = 0
        self._dtype = _default_dtype()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was logged since it was cleared."""
        return self.metric is None and not (self._values or self._waiting or self._total)

    def add(self, value: Any, batch_size: int) -> None:
        """Keep a value: a scalar tensor on any device, or a number."""
        if isinstance(value, Tensor):
            if value.dtype == torch.float64:
                self._dtype = torch.float64
            value = value.detach()
            if value.device.type == "cpu":
                value = value.item()
            else:
                self._waiting.append(value.clone())
                value = self._waiting[-1]
                if len(self._waiting) >= FLUSH_AFTER:
                    self._read()
        if not isinstance(value, Tensor):
            self._values.append(value)
        if not self.on_epoch:  # only the last one will be asked for
            del self._values[:-1], self._waiting[:-1]
        self._sizes.append(batch_size)
        self.last = value

    def step_value(self) -> Tensor | None:
        """What was logged last, as a scalar tensor."""
        if self.metric is not None:
            return self.last
        return self.last if isinstance(self.last, Tensor) else torch.tensor(self.last, dtype=self._dtype)

    def epoch_value(self) -> Tensor | None:
        """The values of the epoch reduced; of a metric object what it computes."""
        if self.metric is not None:
            return self.metric.compute()
        self._add_up()
        total = torch.tensor(self._sum, dtype=self._dtype)
        return total / torch.tensor(self._total) if self.reduce == "mean" else total

    def _read(self) -> None:
        self._values += torch.stack(self._waiting).double().tolist()
        self._waiting = []

    def _add_up(self) -> None:
        """Take what was collected into the running value, one after the other in the values' own precision."""
        if self._waiting:
            self._read()
        if not self._values:
            return
        kind = np.float64 if self._dtype == torch.float64 else np.float32
        values, sizes = np.array(self._values, dtype=kind), np.array(self._sizes)
        if self.reduce in ("max", "min"):
            values = values if self._sum is None else np.append(kind(self._sum), values)
            self._sum = float(values.max() if self.reduce == "max" else values.min())
        else:
            terms = values * sizes.astype(kind) if self.reduce == "mean" else values
            self._sum = float(np.add.accumulate(np.append(kind(self._sum or 0.0), terms), dtype=kind)[-1])
        self._total += int(sizes.sum())
        self._values, self._sizes = [], []

    def state_dict(self) -> dict[str, Any]:
        """What was collected, as plain values."""
        self._add_up()
        last = float(self.last) if self.last is not None else None
        return {"sum": self._sum, "total": self._total, "last": last, "double": self._dtype == torch.float64}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._sum, self._total, self.last = state["sum"], state["total"], state["last"]
        self._dtype = torch.float64 if state["double"] else torch.float32


class Results:
    """What was logged in one loop: of the training epoch, or of an evaluation."""

    def __init__(self, run: Context, training: bool) -> None:
        self.run, self.training = run, training
        self.loader: int | None = None
        """The number of the loader where there are several."""
        self.entries: dict[tuple[str, str, int | None], Logged] = {}
        self.batch: Any = None
        self._batch_size: int | None = None
        self._own_log = self.make_log(run.module)

    def start_batch(self, batch: Any) -> None:
        """From here on, values are of this batch."""
        self.batch, self._batch_size = batch, None

    def end_batch(self) -> None:
        """Let go of the batch."""
        self.batch = None

    def make_log(self, module: nn.Module) -> Callable[..., None]:
        """The function that stands in for `module.log` while a run uses it."""
        state, run = vars(module), self.run

        def log(
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
            results = run.results
            fx, loader = state["_current_fx_name"], results.loader if add_dataloader_idx else None
            args = (prog_bar, reduce_fx, logger, on_step, on_epoch, enable_graph)
            entry = results.entries.get((fx, name, loader))
            if entry is None or entry.args != args:
                entry = results.register(fx, name, loader, args)
            if entry.metric is not None or isinstance(value, nn.Module):
                results.log_metric(entry, value)
                return
            if not isinstance(value, Tensor):
                if not isinstance(value, numbers.Number):
                    hint = "; use self.log_dict" if isinstance(value, dict) else ""
                    raise TypeError(f"self.log({name!r}): expected one number, got {type(value).__name__}{hint}.")
            elif value.numel() != 1:
                raise ValueError(f"self.log({name!r}): shape {tuple(value.shape)}; expected one number. Log its mean.")
            if batch_size is None:
                batch_size = results.batch_size(name) if entry.on_epoch and entry.reduce == "mean" else 1
            entry.add(value, batch_size)

        return log

    def make_log_dict(self, log: Callable[..., None]) -> Callable[..., None]:
        """The function that stands in for `module.log_dict`."""

        def log_dict(dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
            items = dictionary.items()
            if isinstance(dictionary, MetricCollection):
                items = dictionary.items(keep_base=False, copy_state=False)  # type: ignore[call-arg]
            for name, value in items:
                log(name, value, *args, **kwargs)

        return log_dict

    def register(self, fx: str | None, name: str, loader: int | None, args: tuple[Any, ...]) -> Logged:
        """A new entry, checked as Lightning checks it. Raises for what cannot be logged here, or not in this way."""
        if (fx, name, loader) in self.entries:
            raise ValueError(f"self.log({name!r}) was called twice in {fx} with different arguments.")
        if fx not in DEFAULTS:
            where = f"in {fx}" if fx else "outside of training and evaluation"
            raise RuntimeError(f"self.log({name!r}) cannot be called {where}; use self.logger, or a hook of an epoch.")
        if "/dataloader_idx_" in name:
            raise ValueError(f"self.log({name!r}): the number of the loader is added for you; leave it out.")
        _, reduce, _, on_step, on_epoch, _ = args
        by_step, by_epoch, epoch_only = DEFAULTS[fx]
        on_step, on_epoch = by_step if on_step is None else on_step, by_epoch if on_epoch is None else on_epoch
        if epoch_only and (on_step or not on_epoch):
            raise ValueError(
                f"self.log({name!r}): {fx} is called once an epoch; expected on_step=False, on_epoch=True."
            )
        if not on_step and not on_epoch:
            raise ValueError(f"self.log({name!r}, on_step=False, on_epoch=False) records nothing.")
        entry = Logged(fx, name, loader, args, (on_step, on_epoch))
        entry.reduce = _reduction(name, reduce)
        self.entries[fx, name, loader] = entry
        return entry

    def log_metric(self, entry: Logged, metric: Any) -> None:
        """A torchmetrics object: it adds up by itself, and is reset at the end of the epoch."""
        if not isinstance(metric, Metric):
            raise TypeError(f"self.log({entry.name!r}): {type(metric).__name__} cannot be logged; expected a Metric.")
        if entry.metric is None and all(m is not metric for m in self.run.module.modules()):
            raise ValueError(
                f"self.log({entry.name!r}): the metric is no attribute of {type(self.run.module).__name__}."
            )
        entry.metric, entry.last = metric, metric._forward_cache

    def batch_size(self, name: str) -> int:
        """The number of examples of the batch: found once a batch, as Lightning finds it."""
        if self._batch_size is None:
            self._batch_size = 1 if self.batch is None else _batch_size_of(self.batch, self.run.module, name)
        return self._batch_size

    def valid(self) -> Iterator[Logged]:
        """Entries of this loader that have a value."""
        return (e for e in self.entries.values() if not e.is_empty and e.loader == self.loader)

    def values(self, reader: str, of_epoch: bool) -> dict[str, Tensor]:
        """What was logged for `reader` ("logger" or "prog_bar"), by its full name.

        That is `x`, or `x_step` and `x_epoch` where both are logged.
        """
        found: dict[str, Tensor] = {}
        for entry in self.valid():
            if not (entry.on_epoch if of_epoch else entry.on_step):
                continue
            if entry.args[2] is False if reader == "logger" else not entry.prog_bar:
                continue
            value = entry.epoch_value() if of_epoch else entry.step_value()
            if value is not None:
                found[self._full_name(entry, of_epoch)] = _checked(entry.name, value)
        return found

    def by_name(self) -> dict[str, Tensor]:
        """What was logged, by its plain name: reduced over the epoch.

        What training logs by step only, as it was last.
        """
        found = {self._name(e, ""): _checked(e.name, e.epoch_value()) for e in self.valid() if e.on_epoch}
        of_step = [e for e in self.valid() if self.training and not e.on_epoch]
        return found | {self._name(e, ""): v for e in of_step if isinstance(v := e.step_value(), Tensor)}

    def callback_values(self, of_epoch: bool) -> dict[str, Tensor]:
        """What callbacks and monitors read: values by their plain and by their full names."""
        found: dict[str, Tensor] = {}
        for entry in self.valid() if self.training or of_epoch else ():
            if not (entry.on_epoch if of_epoch else entry.on_step):
                continue
            value = entry.epoch_value() if of_epoch else entry.step_value()
            if isinstance(value, Tensor):
                found[self._name(entry, "")] = found[self._full_name(entry, of_epoch)] = value
        return found

    def reset(self) -> None:
        """Start anew: for an epoch of training, for an evaluation."""
        for entry in self.entries.values():
            if entry.metric is not None:
                entry.metric.reset()
        self.entries.clear()
        self.loader = None

    def _full_name(self, entry: Logged, of_epoch: bool) -> str:
        return self._name(entry, ("_epoch" if of_epoch else "_step") if entry.on_step and entry.on_epoch else "")

    def _name(self, entry: Logged, suffix: str) -> str:
        return f"{entry.name}{suffix}" + (f"/dataloader_idx_{entry.loader}" if entry.loader is not None else "")

    def log(self, fx: str, name: str, value: Any, **kwargs: Any) -> None:
        """Lightning's own `LightningModule.log` ends here, where a module overrides `log` and calls super's."""
        known = ("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "add_dataloader_idx", "batch_size")
        self._own_log(name, value, **{k: v for k, v in kwargs.items() if k in known})


def _reduction(name: str, reduce: Any) -> str:
    named = {
        torch.mean: "mean",
        torch.sum: "sum",
        sum: "sum",
        torch.max: "max",
        max: "max",
        torch.min: "min",
        min: "min",
    }
    found = {"avg": "mean"}.get(reduce.lower(), reduce.lower()) if isinstance(reduce, str) else named.get(reduce)
    if found not in ("mean", "sum", "max", "min"):
        raise ValueError(
            f"self.log({name!r}, reduce_fx={reduce!r}): expected mean, sum, max or min; else log a Metric."
        )
    return found


def _checked(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"self.log({name!r}): the metric computes {type(value).__name__}; expected a tensor.")
    return value.detach()


def _default_dtype() -> torch.dtype:
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _batch_size_of(batch: Any, module: nn.Module, name: str) -> int:
    if isinstance(batch, Tensor):  # the common case, without Lightning's search
        return batch.size(0) if batch.dim() else 1
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor) and batch[0].dim():
        size = batch[0].size(0)
        if all(isinstance(b, Tensor) and b.dim() and b.size(0) == size for b in batch):
            return size
    return lightning_class(module, "utilities.data.extract_batch_size")(batch)


def uses_own_log(module: nn.Module) -> bool:
    """Whether a module overrides `log` itself: then it is called, and Lightning's own one beneath it."""
    return overrides(module, "log") or overrides(module, "log_dict")
