"""A training run in progress. It owns all state: progress, history, best weights, optimizers, random order.

    with trainer.start(problem, data) as run:
        for epoch in run.epochs():
            for batch in run.batches("train"):
                run.update(batch)
            run.evaluate("dev")
    run.result
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from weft import checkpoint, runs
from weft.config import CheckpointConfig
from weft.data import SPLITS, Data, as_data, batches_of, check_finite
from weft.devices import float_dtype, in_precision, make_fabric, numerics
from weft.evaluation import evaluate
from weft.events import AT_REST, EVENTS, Hook, bind, listeners
from weft.history import Best, History, Progress
from weft.metrics import Means, num_examples
from weft.optimizers import Phase, Scheduled, build_optimizers, build_schedulers, submodule
from weft.problem import set_term_weights
from weft.result import FitResult
from weft.resume import restore_run, state_of_run
from weft.seeding import data_randomness, order_seed, seed_everything
from weft.signals import Interruption, interactive
from weft.update import Update, built_in, explain, make_step, make_update, reader

if TYPE_CHECKING:
    from weft.trainer import Trainer


class Run:
    """One training run, made by `Trainer.start` and used as a context manager.

    A loop may read `problem`, `optimizers` (by name), `fabric`, `data`, `progress`, `history`, `best`, `run_dir`, and
    after the block `result`. A second run of the same problem goes on from the first (`previous`).
    """

    update: Update
    """Update the parameters once from a batch (a list of batches when accumulating). Returns the loss, detached."""

    def __init__(self, trainer: Trainer, problem: nn.Module, previous: Run | None = None) -> None:
        self.trainer, self.problem, self.config = trainer, problem, trainer.config
        self.progress = previous.progress if previous else Progress()
        self.history = previous.history if previous else History()
        self.best = previous.best if previous else Best()
        self.optimizers: dict[str, Optimizer] = previous.optimizers if previous else {}
        self.schedules: dict[str, Scheduled] = previous.schedules if previous else {}
        self.seed = previous.seed if previous else order_seed(self.config.seed)
        self.phases = trainer.phases or [Phase(epochs=self.config.epochs)]
        self.means, self.logged, self._recent = Means(), Means(), Means()
        self.is_new, self.improved, self.epoch_seconds = previous is None, False, 0.0
        self.stop_reason: str | None = None
        self.result: FitResult | None = None
        self.run_dir: Path | None = None
        self.built_in_loss: Tensor | None = None
        self.hooks: list[Any] = []
        self._bound: dict[str, list[Callable[..., Any]]] = {event: [] for event in (*EVENTS, AT_REST)}
        self._evaluated: dict[str, float] = {}
        self._frozen: list[tuple[nn.Parameter, bool]] = []
        self._open = self._in_update = False
        self._batch: Any = None
        self._loss: Tensor | None = None
        self._warned: set[str] = set()
        self.random_before_data: dict[str, Any] | None = None
        self.random_before_epoch: dict[str, Any] | None = None
        self.random_to_resume: dict[str, Any] | None = None
        self.interruption, self._stack = Interruption(), ExitStack()
        self._clock = time.perf_counter()

    # ---------------------------------------------------------------------------------------------- begin and end

    def is_of(self, problem: nn.Module) -> bool:
        """Whether this run trained `problem`."""
        return self.problem is problem

    def has(self, split: str) -> bool:
        """Whether there is data for `split`."""
        return self._splits[split] is not None

    def rows(self, split: str) -> int | None:
        """Examples in an epoch of `split`; None if there are none, or they cannot be counted beforehand."""
        source = self._splits[split]
        return None if source is None else source.rows

    def prepare(self, make_data: Callable[[], Data], resume: str | None = None) -> Run:
        """Devices first, then the data: all that evaluation alone needs. `make_data` is called again at a refresh."""
        options = self.trainer.options
        self.fabric = make_fabric(self.config, options["strategy"], options["plugins"])
        self.fabric.launch()
        self.problem = self.fabric._precision.convert_module(self.problem).to(self.fabric.device)
        self._resumed = self._find(resume) if resume is not None else None
        if self._resumed is not None:
            self.seed = self._resumed["seed"]
            self.progress.load_state_dict(self._resumed["progress"])
        self._make_data = make_data
        self._refresh_data(None if self._resumed is None else self._resumed["random_before_data"])
        return self

    def _refresh_data(self, random: dict[str, Any] | None = None) -> None:
        """Make the data; on resume in the `random` state in which it was made before."""
        if random is not None:
            checkpoint.set_random_state(random)
        self.random_before_data = checkpoint.random_state()
        with data_randomness(self.config.seed, self.fabric.world_size, index=self.progress.refreshes):
            self.use_data(self._make_data())

    def _find(self, resume: str) -> dict[str, Any] | None:
        """The state to go on from, and the folder of its run; None with "auto" where there is none yet."""
        folder = runs.folder_to_resume(self.config, resume)
        if folder is None and resume == "auto":
            return None
        place, which = (folder, resume if resume == "best" else "last") if folder else (Path(resume), "last")
        state, path = checkpoint.load(place, which)
        self.run_dir = path.parent.parent if path.parent.name == "checkpoints" else None
        return state

    def use_data(self, data: Data) -> None:
        """Train, evaluate and predict with `data` from here on."""
        fabric, self.data = self.fabric, data
        check_finite(data, self.config.strict_data)
        self._splits = {
            split: batches_of(
                data, split, seed=self.seed, device=fabric.device, dtype=float_dtype(fabric),
                to_device=fabric.to_device, rank=fabric.global_rank, world=fabric.world_size,
            )
            for split in SPLITS
        }  # fmt: skip

    def __enter__(self) -> Run:
        if self.config.seed is not None and self.is_new:
            seed_everything(self.config.seed)
        self.run_dir = self.run_dir or runs.new_folder(self.config, self.trainer.options)
        self._stack.enter_context(numerics(self.fabric, self.config.deterministic))
        self._stack.enter_context(self.interruption.caught())
        try:
            if self._resumed is None:
                self._set_budgets()
            self.continues = self._resumed is not None or self.progress.interrupted
            self.progress.interrupted = False
            self._clock, self._seconds_before = time.perf_counter(), self.progress.seconds
            of_problem = [m for m in self.problem.modules() if isinstance(m, Hook)]
            self.hooks = listeners([*of_problem, *self.trainer.hooks, *self.trainer.default_hooks(self)])
            self._bound = {event: bind(self.hooks, event) for event in (*EVENTS, AT_REST)}
            last_phase = self.progress.phase
            for number in range(last_phase + 1) if self._resumed else [last_phase]:
                self._begin_phase(number, make_optimizers=self._resumed is not None or not self.optimizers)
            self._call("on_fit_start")
            if self._resumed is not None:
                restore_run(self, self._resumed)
                self._resumed = None
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _set_budgets(self) -> None:
        """So many epochs and steps more; after an interruption, those that were left."""
        progress = self.progress
        if not (progress.interrupted and progress.epoch < progress.last_epoch):
            progress.phase, progress.phase_epoch, progress.phase_ended = 0, 0, False
            epochs = 1 if self.config.fast_dev_run else sum(phase.epochs for phase in self.phases)
            progress.last_epoch = progress.epoch + epochs
            progress.last_step = None if self.config.max_steps is None else progress.step + self.config.max_steps

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        try:
            if error is None or isinstance(error, GeneratorExit):
                self._close_epoch()
        except BaseException as late:
            error = late
            raise
        finally:
            with self._stack:
                self._finish(error)
        return isinstance(error, KeyboardInterrupt) and interactive()

    def _finish(self, error: BaseException | None) -> None:
        """Put the best weights back, make the result, call the last hooks. Called always, exactly once."""
        progress, interrupted = self.progress, isinstance(error, KeyboardInterrupt)
        progress.interrupted, progress.batch, self._open = interrupted, 0, False
        progress.seconds = self.seconds
        self.stop_reason = "interrupted" if interrupted else "error" if error else self.stop_reason or "epochs"
        last_weights = checkpoint.state_of(self.problem)
        if self.best.weights is not None and (error is None or interrupted):
            self.best.weights.restore(self.problem)
        for parameter, required in self._frozen:
            parameter.requires_grad_(required)
        self.result = FitResult(
            epochs=progress.epoch, steps=progress.step, best_metric=self.best.value, best_epoch=self.best.epoch,
            stop_reason=self.stop_reason, history=self.history.values, last_weights=last_weights,
            seconds=progress.seconds, seed=self.seed, run_dir=self.run_dir, monitor=self.best.name,
        )  # fmt: skip
        if error is not None and not interrupted:
            self._call("on_exception", error)
        if self.run_dir is not None and self.is_global_zero:
            self.result.save(self.run_dir)
        self._call("on_fit_end", self.result)

    # ---------------------------------------------------------------------------------------------- phases

    def _begin_phase(self, number: int, make_optimizers: bool = True) -> None:
        """Data, term weights, frozen parts, optimizers and schedulers of phase `number`."""
        phase, first = self.phases[number], number == 0
        self.progress.phase = number
        if phase.data is not None:
            with data_randomness(self.config.seed, self.fabric.world_size, index=self.progress.refreshes):
                self.use_data(as_data(phase.data))
        if phase.weights:
            set_term_weights(self.problem, dict(phase.weights))
        if phase.setup is not None:
            phase.setup(self.trainer)
        for parameter, required in self._frozen:
            parameter.requires_grad_(required)
        frozen = [p for name in phase.freeze for p in submodule(self.problem, name).parameters()]
        self._frozen = [(p, p.requires_grad) for p in frozen]
        for p in frozen:
            p.requires_grad_(False)
        if make_optimizers and (first or phase.optimizer is not None or not self.optimizers):
            given = phase.optimizer if phase.optimizer is not None else self.trainer.configure_optimizers()
            self.optimizers, self.schedules = build_optimizers(given, self.problem), {}
            scheduler = phase.scheduler if phase.scheduler is not None else self.trainer.options["scheduler"]
            self.schedules = build_schedulers(scheduler if first or phase.scheduler else None, self.optimizers)
        elif make_optimizers and phase.scheduler is not None:
            self.schedules = build_schedulers(phase.scheduler, self.optimizers)
        self._loop_steps: dict[str, Callable[..., bool]] = {}
        self._built_in: Update | None = None
        self.update = make_update(self)

    @property
    def phase(self) -> Phase:
        """The phase in force."""
        return self.phases[self.progress.phase]

    def end_phase(self, reason: str) -> None:
        """End this phase after the epoch: the next one begins, or training stops if it was the last."""
        self.progress.phase_ended = True
        if self.progress.phase + 1 == len(self.phases):
            self.stop(reason)

    # ---------------------------------------------------------------------------------------------- the loop's pieces

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs to train, from 0. The epoch before closes when the next is asked for."""
        while self._begin_epoch():
            yield self.progress.epoch

    def _begin_epoch(self) -> bool:
        self._close_epoch()
        self.interruption.check()
        progress = self.progress
        if progress.last_step is not None and progress.step >= progress.last_step:
            self.stop("max_steps")
        if self.stop_reason or progress.epoch >= progress.last_epoch:
            return False
        if progress.phase_ended or (progress.phase_epoch >= self.phase.epochs and len(self.phases) > 1):
            if progress.phase + 1 == len(self.phases):
                return False
            progress.phase_ended, progress.phase_epoch = False, 0
            self._begin_phase(progress.phase + 1)
        if progress.batch == 0:
            self.random_before_epoch = None
            if self.data.refresh_every and progress.epoch >= (progress.refreshes + 1) * self.data.refresh_every:
                progress.refreshes += 1
                self._refresh_data()
            if not self._splits["train"].resident:
                self.random_before_epoch = checkpoint.random_state()
            self.means.clear()
            self.logged.clear()
        self._open, self._evaluated, self._epoch_clock = True, {}, time.perf_counter()
        self.problem.train()
        self._call("on_epoch_start")
        return True

    def batches(self, split: str = "train") -> Iterator[Any]:
        """The batches of this epoch; of "train": lists of them when accumulating. Ends early when told to stop."""
        found = self.batches_of(split, self.progress.batch if split == "train" else 0)
        if split != "train":
            yield from found
            return
        progress, size = self.progress, self.config.accumulate
        is_empty = progress.batch == 0
        for batch in found if size == 1 else _lists(found, size):
            is_empty = False
            progress.batch += 1 if size == 1 else len(batch)
            self._announce(batch)
            yield batch
            self._batch = None
            self._rest()
            if self.stop_reason:
                return
        if is_empty:
            raise ValueError("The training data yielded no batch: there is nothing to train on.")

    def batches_of(self, split: str, start: int = 0) -> Iterable[Any]:
        """The batches of a split, at most as many as `limit_batches` says, without any of the loop's bookkeeping."""
        source = self._splits.get(split)
        if source is None:
            raise ValueError(f"There is no {split} data; given were {[s for s, b in self._splits.items() if b]}.")
        if start and self.random_before_epoch is not None:  # a loader starts over as it did then, and is skipped
            checkpoint.set_random_state(self.random_before_epoch)
        batches = source.epoch(self.progress.epoch, start)
        if start and self.random_to_resume is not None:
            checkpoint.set_random_state(self.random_to_resume)
        self.random_to_resume = None
        limit = self.config.limit(split)
        if isinstance(limit, float):
            limit = max(1, int(limit * len(source)))
        return islice(batches, None if limit is None else max(0, limit - start))

    def _rest(self) -> None:
        """The state is whole, between steps or epochs: it may be saved, and an interruption takes effect here."""
        self._call(AT_REST)
        self.interruption.check()
        if self.config.max_seconds is not None and self.seconds - self._seconds_before >= self.config.max_seconds:
            self.stop("max_time")

    def evaluate(self, split: str = "dev") -> dict[str, float]:
        """Means over all examples of `split` as floats, which also become part of the open epoch's metrics.

        In eval mode, without gradients unless the problem asks for them (`grad_inference`). {} without a dev set;
        ValueError for another split that is missing.
        """
        if split == "dev" and self._splits["dev"] is None:
            return {}
        self._call("on_validation_start")
        metrics = evaluate(self, split)
        if self._open:
            self._evaluated |= metrics
        self._call("on_validation_end", metrics)
        return metrics

    @property
    def validation_due(self) -> bool:
        """Whether this is an epoch after which `fit` evaluates the dev set: every n-th, the last, and at a stop."""
        done = self.progress.epoch + 1
        last = done >= self.progress.last_epoch or self.stop_reason is not None
        return self._splits["dev"] is not None and (last or done % self.config.validate_every == 0)

    def _close_epoch(self) -> None:
        """History, best weights, hooks, schedulers, in this order; then the epoch is over."""
        if not self._open:
            return
        self._open, progress = False, self.progress
        metrics = {**self.means.compute(self.reduce), **self.logged.compute(self.reduce), **self._evaluated}
        monitor = self.monitored(metrics)
        self.history.append(metrics)
        value = metrics.get(monitor) if monitor else None
        mode = self.config.monitor_mode
        self.improved = bool(monitor) and self.best.update(monitor, value, progress.epoch, mode, self.problem)
        self.epoch_seconds = time.perf_counter() - self._epoch_clock
        self._call("on_epoch_end", metrics)
        for schedule in self.schedules.values():
            if schedule.interval == "epoch":
                schedule.step(metrics, monitor)
        progress.epoch, progress.phase_epoch, progress.batch = progress.epoch + 1, progress.phase_epoch + 1, 0
        self._rest()

    def monitored(self, metrics: Mapping[str, float]) -> str | None:
        """The metric that decides about best weights and patience, None if nothing does.

        Raises ValueError if one that was asked for never appears, listing those that do.
        """
        config, has_dev = self.config, self._splits["dev"] is not None
        asked = config.monitor_metric is not None or config.patience is not None
        name = config.monitor_metric or (config.dev_metric if has_dev else config.train_metric)
        if not asked and not self.trainer.monitors_by_default:
            return None
        if name in metrics or name in self.history.values or (has_dev and not self._evaluated):
            return name
        found = f"the metrics are {sorted(metrics)}"
        if asked:
            raise ValueError(f"The monitored metric {name!r} never appears; {found}.")
        self.warn_once(f"{name!r} does not appear ({found}), so no best weights are kept; name one as monitor_metric.")
        return None

    # ---------------------------------------------------------------------------------------------- a step's tools

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Gradients of `loss`, added to those that are there. In a loop of your own, the loss is also logged."""
        self._loss = loss.detach()
        if not self._in_update and len(self.optimizers) == 1:
            self.means.add({self.config.train_metric: loss}, num_examples(self._batch))
        self.fabric.backward(loss, **kwargs)

    def step(self, optimizer: Optimizer | str | None = None) -> bool:
        """Clip, check and step one optimizer (itself or its name), or all of them; then clear their gradients.

        Returns whether they stepped: gradients that are not finite are handled as `on_nonfinite` says. In a loop of
        your own this counts as a step of the run (with several optimizers, when the first one steps).
        """
        names = list(self.optimizers) if optimizer is None else [self._name_of(optimizer)]
        for name in names:
            if name not in self._loop_steps:
                self._loop_steps[name] = make_step(self, self.optimizers[name])
        done = all([self._loop_steps[name](self._loss, ()) for name in names])
        if not self._in_update and names[0] == next(iter(self.optimizers)):
            self.end_step(self._batch, self._loss)
        return done

    def _name_of(self, optimizer: Any) -> str:
        for name, known in self.optimizers.items():
            if optimizer is known or optimizer == name:
                return name
        raise ValueError(f"{optimizer!r} is none of this run's optimizers: {list(self.optimizers)}.")

    def _announce(self, batch: Any) -> None:
        self._batch = batch
        for call in self._bound["on_step_start"]:
            call(self.trainer, batch)

    def begin_step(self, batch: Any) -> None:
        """What every update does first."""
        self._in_update = True
        if batch is not self._batch:  # it did not come from `batches`, which has announced its own
            self._announce(batch)

    def end_step(self, batch: Any, loss: Tensor | None) -> None:
        """What every update does last: count the step, step the schedules, call the hooks."""
        self._in_update = False
        progress = self.progress
        progress.step += 1
        for schedule in self.schedules.values():
            if schedule.interval == "step":
                schedule.step({}, None)
        if self.config.log_every:
            self._recent.add({f"{self.config.train_metric}_step": loss}, num_examples(batch))
        for call in self._bound["on_step_end"]:
            call(self.trainer, batch, loss)
        if progress.step == progress.last_step:
            self.stop("max_steps")

    def default_update(self, batch: Any) -> Tensor:
        """The built-in update without its frame, for a `Trainer.update` that calls `super().update(batch)`."""
        if self._built_in is None:
            self._built_in = built_in(self, lambda batch: None, lambda batch, loss: None)
        self.built_in_loss = self._built_in(batch)
        return self.built_in_loss

    def forward(self, split: str) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
        """A function of a batch: the step of `split`, read into its loss and its scalars by name."""
        config, problem, training = self.config, self.problem, split == "train"
        metric = {"train": config.train_metric, "dev": config.dev_metric}.get(split, config.test_metric)
        step = in_precision(self.fabric, self.trainer.step_function(split, problem))
        read = reader(problem, split, metric, self.trainer.metric_functions, list(self.optimizers))

        def forward(batch: Any) -> tuple[Any, dict[str, Any]]:
            try:
                out = step(batch)
            except RuntimeError as error:
                raise explain(error, batch, problem) from error
            return read(out, batch, required=training)

        return forward

    # ---------------------------------------------------------------------------------------------- for hooks

    def log(self, values: Mapping[str, Any]) -> None:
        """Record scalars. Their means over the epoch go into the history and to the loggers."""
        for name, value in values.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"log: {name!r} has shape {tuple(value.shape)}; expected a scalar.")
        self.logged.add(values, 1)

    def stop(self, reason: str = "stopped") -> None:
        """End training after the current step. The first reason given is the one reported."""
        self.stop_reason = self.stop_reason or reason

    def listeners(self, event: str) -> list[Callable[..., Any]]:
        """The functions bound to `event`."""
        return self._bound[event]

    def _call(self, event: str, *args: Any) -> None:
        for call in self._bound[event]:
            call(self.trainer, *args)

    def warn_once(self, message: str) -> None:
        """Warn; the same message only once per run."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)

    @property
    def seconds(self) -> float:
        """Time spent training this problem so far (s)."""
        return self._seconds_before + time.perf_counter() - self._clock

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes files and lines: the first of all."""
        return self.fabric.is_global_zero

    @property
    def reduce(self) -> Callable[[Tensor], Tensor] | None:
        """What sums a tensor over all processes; None in a single one."""
        if self.fabric.world_size == 1:
            return None
        return lambda tensor: self.fabric.all_reduce(tensor, reduce_op="sum")  # type: ignore[return-value]

    def step_metrics(self) -> dict[str, float]:
        """Means of the step values since the last call, as floats (with `log_every`; this reads the device)."""
        metrics = self._recent.compute()
        self._recent.clear()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the run goes on: tensors and plain values only."""
        return state_of_run(self)

    def save(self) -> Path:
        """Write a checkpoint into the run's folder and return its path. Call on every rank."""
        if self.run_dir is None:
            raise RuntimeError("save: this run has no folder; give the trainer root_dir or checkpoint=True.")
        keep = (self.config.checkpointing or CheckpointConfig()).keep
        return checkpoint.save(
            self.run_dir / "checkpoints", self.progress.step, self.state_dict(), keep=keep, best=self.improved
        )


def _lists(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(batches)
    while batch := list(islice(iterator, size)):
        yield batch
