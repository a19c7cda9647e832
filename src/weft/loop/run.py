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
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from weft.checkpoint.weights import state_of
from weft.compile.choosing import Graphs
from weft.data.batches import in_lists, num_batches, num_examples, within
from weft.data.data import SPLITS, Data
from weft.data.splits import batches_of, check_finite
from weft.devices import seeding
from weft.devices.fabric import make_fabric, start_processes
from weft.devices.precision import float_dtype
from weft.devices.processes import Processes
from weft.devices.signals import Interruption, SignalExit, interactive
from weft.events import AT_REST, EVENTS, Hook, listeners
from weft.loop.adapters import Seams
from weft.loop.phases import Frozen, data_of_phase, in_phase, num_epochs, unfreeze
from weft.loop.result import FitResult, result_of
from weft.loop.resume import begin, find_state, state_of_run, train_batches
from weft.loop.saving import STEP_HOOKS, finish_saving, prepare_folder, save_run, saves
from weft.records import folders
from weft.step.evaluation import evaluate, monitored_metric
from weft.step.forward import Forward
from weft.step.history import Best, History, Progress
from weft.step.instrument import bind_watched, watched, watched_batches
from weft.step.manual import own_backward, own_step, own_update
from weft.step.metrics import Means, check_scalars
from weft.step.microbatches import Combine, Step, Update
from weft.step.nonfinite import Doubts, RunningStatistics, look_back
from weft.step.optimizers import Scheduled
from weft.step.phase import Phase
from weft.step.state import Kept
from weft.step.throughput import Feed

if TYPE_CHECKING:
    from weft.loop.trainer import Trainer

class Run(Seams):
    """One training run, made by `Trainer.start` and used as a context manager.

    A loop may read `problem`, `optimizers` (by name), `fabric`, `data`, `progress`, `history`, `best`, `run_dir`, and
    after the block `result`. A second run of the same problem goes on from the first (`previous`).
    """

    statistics: RunningStatistics
    update: Update
    """Update the parameters once from a batch (a list of batches when accumulating). Returns the loss, detached."""

    def __init__(self, trainer: Trainer, problem: nn.Module, previous: Run | None = None) -> None:
        self.trainer, self.problem, self.config = trainer, problem, trainer.config
        self.progress = previous.progress if previous else Progress()
        self.history = previous.history if previous else History()
        self.best = previous.best if previous else Best()
        self.optimizers: dict[str, Optimizer] = previous.optimizers if previous else {}
        self.schedules: dict[str, Scheduled] = previous.schedules if previous else {}
        self.seed = previous.seed if previous else seeding.order_seed(self.config.seed)
        self.run_dir: Path | None = previous.run_dir if previous else None
        self.carried = previous.carried if previous else None  # the state of a run that was in other processes
        self.phases = trainer.phases or [Phase(epochs=max(1, self.config.epochs))]
        self.means, self.logged, self.recent, self.feed = Means(), Means(), Means(), Feed()
        self.graphs = Graphs(self)
        self.is_new, self.improved, self.epoch_seconds = previous is None, False, 0.0
        self.stop_reason: str | None = None
        self.result: FitResult | None = None
        self.frozen: Frozen = []
        self.hooks: list[Any] = []
        self._bound: dict[str, list[Callable[..., Any]]] = {event: [] for event in (*EVENTS, AT_REST)}
        # of the epoch: whether it is open, what was evaluated, and while it closes its metrics
        self._open, self.evaluated = False, dict[str, float]()
        self._closing: dict[str, float] | None = None
        self.monitor: str | None = None
        self.evaluating: tuple[Means, int] | None = None  # the means of an evaluation and the examples of its batch
        self._warned: set[str] = set()
        # of the step: the batch, the last loss, what a custom update got from the built-in one
        self.batch: Any = None
        self.last_loss: Tensor | None = None
        self.built_in_loss: Tensor | None = None
        self.own_steps = dict[tuple[str, ...], tuple[Step, Combine | None]]()
        self.in_update = self.has_stepped = False
        self.plain_update: Update | None = None
        self.forwards: dict[str, Forward] = {}  # by split, of evaluations
        self.doubts: Doubts | None = None  # steps on a GPU that are looked at later
        self.measured: list[tuple[dict[str, Tensor], int]] | None = None  # of the last step, if a hook sets it to []
        # of checkpoints: random states, what they need to know, what is under way, which signal ends the run
        self.random_before_data: dict[str, Any] | None = None
        self.random_before_epoch: dict[str, Any] | None = None
        self.random_to_resume: dict[str, Any] | None = None
        self.kept = Kept.of(self.config, problem, previous.kept if previous else None)
        self.begun, self.reopened, self.ending, self.busy, self.leaving = False, False, False, "", 0
        self.interruption, self._stack, self.processes = Interruption(), ExitStack(), Processes()
        self._clock, self._seconds_before = time.perf_counter(), self.progress.seconds

    # ---------------------------------------------------------------------------------------------- begin and end

    def is_of(self, problem: nn.Module) -> bool:
        """Whether this run trained `problem`."""
        return self.problem is problem

    def has(self, split: str) -> bool:
        """Whether there is data for `split`."""
        return self._splits[split] is not None

    def source(self, split: str) -> Any:
        """The batches of `split`, None if there is no data for it."""
        return self._splits[split]

    def rows(self, split: str) -> int | None:
        """Examples in an epoch of `split`; None if there are none, or they cannot be counted beforehand."""
        return getattr(self._splits[split], "rows", None)

    def num_batches(self, split: str) -> int | None:
        """Batches in an epoch of `split`, within `limit_batches`; None if there are none, or nobody knows."""
        return num_batches(self._splits[split], self.config.limit(split))

    def prepare(self, make_data: Callable[[], Data], resume: str | None = None) -> Run:
        """Devices first, then the data: all that evaluation alone needs. `make_data` is called again at a refresh."""
        options = self.trainer.options
        self.fabric = self.trainer.launched or make_fabric(self.config, options["strategy"], options["plugins"])
        start_processes(self.fabric, self.config.timeout)
        self.processes = self.meet()
        self.problem = self.place(self.problem)
        self.processes.share_weights(self.problem)
        self.seed = self.processes.first(lambda: self.seed)
        self._resumed = find_state(self, resume) if resume is not None else None
        self.begin_fit()
        self.given_data = make_data
        self._refresh_data(None if self._resumed is None else self._resumed["random_before_data"])
        return self

    def begin_fit(self) -> None:
        """Count how many epochs and steps there are to come, with the options as they are now."""
        self.progress.begin_fit(num_epochs(self), self.config.max_steps, goes_on=self._resumed is not None)

    def renew_data(self) -> None:
        """Make the data anew: a refresh, or a phase that brings its own."""
        self.progress.refreshes += 1
        self._refresh_data()

    def _refresh_data(self, random: dict[str, Any] | None = None) -> None:
        """Make the data of this phase; on resume in the `random` state in which it was made before."""
        if random is not None:
            seeding.set_random_state(random)
        else:
            self.progress.data_epoch = self.progress.epoch
        self.random_before_data = seeding.random_state()
        seed = self.config.seed if self.processes.world == 1 else self.seed
        with seeding.data_randomness(seed, index=self.progress.refreshes):
            self.use_data(data_of_phase(self) or self.given_data())
        self.kept.data_prints = {}

    def use_data(self, data: Data) -> None:
        """Train, evaluate and predict with `data` from here on."""
        fabric, self.data = self.fabric, data
        check_finite(data, self.config.strict_data)
        self._splits = {
            split: batches_of(
                data, split, seed=self.seed, device=fabric.device, dtype=float_dtype(fabric),
                to_device=fabric.to_device, rank=self.processes.data_rank, world=self.processes.data_world,
            )
            for split in SPLITS
        }  # fmt: skip
        seeding.fix_kept_batches(self._splits.values())

    def __enter__(self) -> Self:
        if not self.has("train"):
            raise ValueError("fit: there is no training data (train=None).")
        if self.is_new:
            seeding.begin(self.config.seed, self.seed, self.processes.data_rank)
        self.run_dir = self.run_dir or self.processes.first(partial(folders.new_folder, self.config, self.trainer.options))
        self._stack.enter_context(self.in_use())
        self._stack.enter_context(self.interruption.caught())
        self.continues, self.progress.interrupted = self._resumed is not None or self.progress.interrupted, False
        self._clock, self._seconds_before = time.perf_counter(), self.progress.seconds
        try:
            of_problem = [m for m in self.problem.modules() if isinstance(m, Hook)]
            self.hooks = listeners([*of_problem, *self.trainer.hooks, *self.trainer.default_hooks(self)])
            self._bound = {event: bind_watched(self.hooks, event) for event in (*EVENTS, AT_REST)}
            self.problem.train()
            self.statistics = RunningStatistics(self.problem)
            self.begin_phases(resumed=self._resumed is not None)
            if saves(self):
                prepare_folder(self)
            begin(self, self._resumed, self.carried)
            self._resumed, self.carried, self.begun = None, None, True
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            if error is None:
                self.ending = True
                self._close_epoch()
                self._rest(epoch_over=True)
                finish_saving(self)
        except BaseException as late:
            error = late
            if not (isinstance(late, KeyboardInterrupt) and interactive()):
                raise
        finally:
            with self._stack:
                self._finish(error)
        return isinstance(error, KeyboardInterrupt) and interactive()

    def _finish(self, error: BaseException | None) -> None:
        """Put the best weights back, make the result, call the last hooks. Called always, exactly once."""
        self.processes.leave(error)
        progress, interrupted = self.progress, isinstance(error, KeyboardInterrupt | SignalExit)
        progress.interrupted, progress.seconds, self._open = interrupted, self.seconds, False
        self.stop_reason = "interrupted" if interrupted else "error" if error else self.stop_reason or "epochs"
        last_weights = self.processes.whole(state_of(self.problem))
        if self.best.weights is not None and (error is None or interrupted):
            self.best.weights.restore(self.problem)
        unfreeze(self.frozen)
        self.result = result_of(self, last_weights)
        bound, self._bound = self._bound, {event: [] for event in self._bound}
        with ExitStack() as last:  # each is called, even if one before it raises
            for call in reversed(bound["on_fit_end"]):
                last.callback(call, self.trainer, self.result)
            if self.run_dir is not None and self.is_global_zero and self.begun:
                last.callback(self.result.save, self.run_dir)
            last.callback(setattr, progress, "batch", 0)  # the next fit begins this epoch again
            for call in reversed(bound["on_exception"] if error is not None and not interrupted else []):
                last.callback(call, self.trainer, error)
            if error is not None:
                last.callback(finish_saving, self, error)
        if isinstance(error, SignalExit) and self.is_global_zero:
            error.requeue(saves(self))

    @property
    def phase(self) -> Phase:
        """The phase in force."""
        return self.phases[self.progress.phase]

    def end_phase(self, reason: str) -> None:
        """End this phase after the epoch: the next one begins, or training stops if it was the last."""
        self.progress.phase_ended = reason
        if self.progress.phase + 1 == len(self.phases):
            self.decide_to_stop(reason)

    # ---------------------------------------------------------------------------------------------- the loop's pieces

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs to train, from 0. The epoch before closes when the next is asked for."""
        while self._begin_epoch():
            yield self.progress.epoch

    def _begin_epoch(self) -> bool:
        self._close_epoch()
        progress = self.progress
        if progress.last_step is not None and progress.step >= progress.last_step:
            self.decide_to_stop("max_steps")
        if not self.reopened:  # of an epoch that a resumed run is in the middle of, this has happened
            if self.stop_reason or progress.epoch >= progress.last_epoch or not in_phase(self):
                return False
            self.evaluated = {}
        self._open, self._epoch_clock = True, time.perf_counter()
        self.feed.begin()
        if not self.reopened:
            self.call("on_epoch_start")
        self.reopened = False
        return True

    def batches(self, split: str = "train") -> Iterator[Any]:
        """The batches of this epoch; of "train": lists of them when accumulating. Ends early when told to stop.

        Asked for once more in the same epoch, those of "train" go on where they ended.
        """
        if split != "train":
            yield from self.batches_of(split)
            return
        progress, size = self.progress, self.config.accumulate
        if self.stop_reason and progress.batch:
            return  # it was told to stop in the last step before it was resumed
        is_empty = progress.batch == 0
        found = watched_batches(self.hooks, self.feed.timed(train_batches(self)))
        for batch in found if size == 1 else in_lists(found, size):
            is_empty = False
            progress.batch += 1 if size == 1 else len(batch)
            self.announce(batch)
            yield batch
            self.batch = None
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
        batches = source.epoch(self.progress.epoch, start)
        limit = within(self.config.limit(split), source)
        return islice(batches, None if limit is None else max(0, limit - start))

    def _rest(self, epoch_over: bool = False) -> None:
        """The state is whole, between steps or epochs: it may be saved, and an interruption takes effect here."""
        processes = self.processes
        agreed = processes.world == 1 or ((processes.called() or epoch_over) and processes.agree(self.interruption))
        self.stop_reason = self.stop_reason or processes.granted.pop("stop", None)
        self.busy, self.leaving = "", self.interruption.asked if agreed else 0
        self.call(AT_REST)
        if self.leaving:
            self.interruption.leave(self.leaving)
        limit = self.config.max_seconds
        if limit is not None and processes.due("max_time", self.seconds - self._seconds_before >= limit):
            self.decide_to_stop("max_time")

    def evaluate(self, split: str = "dev") -> dict[str, float]:
        """Means over all examples of `split` as floats, which also become part of the open epoch's metrics.

        In eval mode, without gradients unless the problem asks for them (`grad_inference`). {} without a dev set;
        ValueError for another split that is missing.
        """
        if split == "dev" and self._splits["dev"] is None:
            return {}
        self.busy = "an evaluation"
        self.call("on_validation_start")
        metrics = watched(self.hooks, "evaluation", evaluate)(self, split)
        if self._open:
            self.evaluated |= metrics
        self.call("on_validation_end", metrics)
        self.busy = ""
        return metrics

    @property
    def validation_due(self) -> bool:
        """Whether `fit` evaluates the dev set after this epoch: every n-th, the last (of a phase too), and at a stop."""
        done = self.progress.epoch + 1
        ends_phase = len(self.phases) > 1 and self.progress.phase_epoch + 1 >= self.phase.epochs
        last = done >= self.progress.last_epoch or ends_phase or self.stop_reason is not None
        return self._splits["dev"] is not None and (last or done % self.config.validate_every == 0)

    def _close_epoch(self) -> None:
        """History, best weights, hooks, schedulers, in this order; then the epoch is over."""
        if not self._open:
            return
        self._open, progress, self.busy = False, self.progress, "the end of an epoch"
        look_back(self)
        metrics = {**self.means.compute(self.processes.gather), **self.logged.compute(self.processes.gather), **self.evaluated}
        self.means.clear()
        self.logged.clear()
        self.history.append(metrics)
        self.epoch_seconds = time.perf_counter() - self._epoch_clock
        try:
            monitor = self.monitor = monitored_metric(self, metrics)
            value, mode = metrics.get(monitor or ""), self.config.monitor_mode
            self.improved = bool(monitor) and self.best.update(monitor or "", value, progress.epoch, mode, self.problem)
            self._closing = metrics
            self.call("on_epoch_end", metrics)
            complete = bool(self.evaluated) or not self.has("dev")
            for schedule in self.schedules.values():
                if schedule.interval == "epoch":
                    schedule.step(metrics, monitor, complete)
        finally:  # its training is through, whatever a hook raised
            self._closing = None
            progress.epoch, progress.phase_epoch, progress.batch = progress.epoch + 1, progress.phase_epoch + 1, 0
        self._rest(epoch_over=True)

    # ---------------------------------------------------------------------------------------------- a step's tools

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Gradients of `loss`, added to those that are there. In a loop of your own, the loss is also logged."""
        own_backward(self, loss, **kwargs)

    def step(self, optimizer: Optimizer | str | None = None) -> bool:
        """Clip, check and step one optimizer (itself or its name), or all of them; then clear their gradients.

        Returns whether they stepped: gradients that are not finite are handled as `on_nonfinite` says. In a loop of
        your own this counts as a step of the run (with several optimizers, when the first one steps).
        """
        return own_step(self, optimizer)

    def announce(self, batch: Any) -> None:
        """A step begins: say so, once for each batch."""
        if batch is not self.batch:
            self.batch = batch
            self.statistics.take()
            self.call("on_step_start", batch)

    def begin_step(self, batch: Any) -> None:
        """What every update does first."""
        self.busy = "an update"
        self.announce(batch)  # where it did not come from `batches`

    def end_step(self, batch: Any, loss: Tensor | None) -> None:
        """What every update does last: count the step, step the schedules, call the hooks."""
        progress = self.progress
        progress.step += 1
        for schedule in self.schedules.values():
            if schedule.interval == "step":
                schedule.step({}, None)
        if self.config.log_every and loss is not None:
            self.recent.add({f"{self.config.train_metric}_step": loss}, num_examples(batch))
        self.busy = STEP_HOOKS
        self.call("on_step_end", batch, loss)
        self.busy = ""
        if self.kept.save_wanted:
            self.save()
        if progress.last_step is not None and progress.step >= progress.last_step:
            self.decide_to_stop("max_steps")

    def default_update(self, batch: Any) -> Tensor:
        """The built-in update; inside a `Trainer.update` that calls `super().update(batch)`, without its frame."""
        return own_update(self, batch)

    # ---------------------------------------------------------------------------------------------- for hooks

    def log(self, values: Mapping[str, Any]) -> None:
        """Record scalars. Their means over the epoch go into the history and to the loggers.

        In `on_epoch_end` they become part of the epoch that ends; in a step of an evaluation they are averaged over its
        examples and part of its metrics. Raises ValueError for what is no scalar, and RuntimeError after the end.
        """
        check_scalars(values)
        if self.evaluating is not None:
            self.evaluating[0].add(values, self.evaluating[1])
        elif self.result is not None:
            raise RuntimeError(f"log: {list(values)} came after the end of the run; log in on_epoch_end at the latest.")
        elif self._closing is None:
            self.logged.add(values, 1)
        else:
            self._closing.update({name: float(value) for name, value in values.items()})
            self.history.amend(self._closing)

    def stop(self, reason: str = "stopped") -> None:
        """End training after the current step (of several processes after the next, where all stop together).

        The first reason given is the one reported.
        """
        if self.processes.world > 1:
            self.processes.wishes.setdefault("stop", reason)
        else:
            self.decide_to_stop(reason)

    def decide_to_stop(self, reason: str) -> None:
        """End training after the current step; every process must come to this decision by itself."""
        self.stop_reason = self.stop_reason or reason

    def listeners(self, event: str) -> list[Callable[..., Any]]:
        """The functions bound to `event`."""
        return self._bound[event]

    def call(self, event: str, *args: Any) -> None:
        """Call what listens to `event`."""
        for call in self._bound[event]:
            call(self.trainer, *args)

    def warn_once(self, message: str) -> None:
        """Warn; the same message only once per run, and in the first process only."""
        if message not in self._warned and self.is_global_zero:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)

    @property
    def seconds(self) -> float:
        """Time spent training this problem so far (s)."""
        return self._seconds_before + time.perf_counter() - self._clock

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes files and lines: the first of all."""
        return self.processes.rank == 0

    def step_metrics(self) -> dict[str, float]:
        """Means of the step values since the last call, as floats (with `log_every`; this reads the device)."""
        metrics = self.recent.compute(self.processes.gather)
        self.recent.clear()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the run goes on: tensors and plain values only."""
        return state_of_run(self)

    def save(self) -> Path:
        """Write a checkpoint into the run's folder and return its path; in `on_step_end`, once all hooks saw the step.

        On every rank, between updates. RuntimeError without a folder or in an update, OSError if the disk fails.
        """
        look_back(self)
        return watched(self.hooks, "checkpoint", save_run)(self)

