"""A training run in progress: the loop's pieces, and the order in which they happen.

    with trainer.start(problem, data) as run:
        for epoch in run.epochs():
            for batch in run.batches("train"):
                run.update(batch)
            run.evaluate("dev")

What a run has learned and measured so far is its `state` (`weft.step.state`); here stands when it changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from weft.data.batches import in_lists, num_examples
from weft.data.data import Data
from weft.devices import seeding
from weft.devices.fabric import make_fabric, start_processes
from weft.devices.signals import SignalExit, interactive
from weft.events import AT_REST, Hook, listeners
from weft.loop import feeding, phases
from weft.loop.adapters import Seams, Told
from weft.loop.leaving import before_training, heed_early, heed_late, rest_if_waiting
from weft.loop.remarks import tell_of_options
from weft.loop.result import FitResult, result_of
from weft.loop.short import SHORT
from weft.loop.streams import lasting_streams
from weft.step.evaluation import add_up_terms, evaluate, monitored_metric
from weft.step.forward import Forward, forward_of
from weft.step.instrument import bind_watched, watched, watched_batches
from weft.step.optimizer_step import look_back, statistics_of
from weft.step.state import Listeners, RunState, Stage, Update
from weft.step.trained import clear_gradients, prepare_look
from weft.step.update import built_in

if TYPE_CHECKING:
    from weft.step.owner import Owner


class Run(Told, Seams):
    """One training run of a trainer, made by `Trainer.start` and used as a context manager.

    A loop may read `problem`, `optimizers` (by name), `fabric`, `data`, `progress`, `history`, `best`, `run_dir`, and
    after the block `result`. A second run of the same problem goes on from the first (`previous`).
    """

    update: Update
    """Update the parameters once from a batch (a list of batches when accumulating). Returns the loss, detached."""

    def __init__(self, trainer: Owner, problem: nn.Module, previous: Run | None = None) -> None:
        self.state = RunState.of(trainer, problem, previous.state if previous else None)
        self.result: FitResult | None = None
        self.carried = previous.carried if previous else None  # the state of a run that was in other processes
        self._resumed: dict[str, Any] | None = None
        self._renew: tuple[str, ...] = ()
        self._in_batches = False  # a loop is between two batches of `batches`, which rests after each
        self.graphs: Any = None  # of a compiled run
        self._forwards: dict[str, Forward] = {}  # by split, of evaluations
        self._parameters: list[Tensor] = []
        self._manual: Any = None
        self._before = previous.state.feed.splits if previous else {}
        self._stack = ExitStack()

    # ---- begin and end

    def prepare(
        self, make_data: Callable[[], Data], resume: str | None = None, epochs: int | None = None, renew: Any = ()
    ) -> Self:
        """Devices, then data (`make_data` is called again at a refresh). `resume`, `epochs`, `renew`: as for `fit`."""
        self._renew, self.state.control.epochs = renew, epochs
        state, options = self.state, self.state.trainer.options
        with before_training(state):
            state.fabric = state.trainer.launched or make_fabric(state.config, options["strategy"], options["plugins"])
            start_processes(state.fabric, state.config.timeout)
            state.processes = self.meet()
            state.problem = self.place(state.problem)
            state.processes.share_weights(state.problem)
            state.feed.seed = state.processes.first(lambda: state.feed.seed)
            if resume is not None:
                from weft.loop.resume import find_state

                self._resumed = find_state(state, resume)
            goes_on = self._resumed is not None
            if epochs is not None and not goes_on:
                state.progress.interrupted = False  # so many, not those that were left of an interrupted fit
            state.progress.begin_fit(phases.num_epochs(state), state.config.max_steps, goes_on=goes_on)
            state.feed.make = make_data
            feeding.make_data(state, None if self._resumed is None else self._resumed["random_before_data"])
        return self

    def __enter__(self) -> Self:
        state, trainer = self.state, self.state.trainer
        if state.control.is_new:
            seeding.begin(state.config.seed, state.feed.seed, state.processes.data_rank)
        makes_folder, state.kept.run_dir = state.kept.run_dir is None, feeding.enter_folder(state, self._stack)
        for within in (self.in_use(), state.control.interruption.caught(), lasting_streams()):
            self._stack.enter_context(within)
        goes_on = self._resumed is not None or state.progress.interrupted
        state.control.continues, state.progress.interrupted = goes_on, False
        state.control.clock, state.control.seconds_before = time.perf_counter(), state.progress.seconds
        try:
            of_problem = [m for m in state.problem.modules() if isinstance(m, Hook)]
            self.listen(listeners([*of_problem, *trainer.hooks, *trainer.default_hooks(state)]))
            self.put_in_train_mode()
            state.step.statistics = statistics_of(state)
            self.begin_phases(resumed=self._resumed is not None)
            if state.saves:
                from weft.loop.saving import prepare_folder

                prepare_folder(state)
            feeding.take_folder(state, makes_folder)
            tell_of_options(state, stops_itself=self.takes_callbacks)
            feeding.forget_best_of_other_data(state, {} if self.takes_callbacks else self._before)
            is_second = not (state.control.is_new or state.control.continues) or phases.was_over(self._resumed)
            self._start()
            if is_second:
                from weft.loop.afterwards import tell_of_used_up

                tell_of_used_up(state.training.schedules, state)
            heed_early(state, lambda: rest_if_waiting(state, self._in_batches, self._rest))
        except BaseException as error:
            self.__exit__(type(error), error, None)
            feeding.forget_folder(state)
            raise
        return self

    def listen(self, hooks: list[Any]) -> None:
        """Have `hooks` called at their events from here on."""
        self.state.hooks = Listeners(hooks, {event: bind_watched(hooks, event) for event in self.state.hooks.bound})

    def _start(self) -> None:
        """Call `on_fit_start`; a resumed run goes on from its checkpoint, or from what other processes have done."""
        if self._resumed is None and self.carried is None:
            self.state.call("on_fit_start")
        else:
            from weft.loop.resume import begin

            begin(self.state, self._resumed, self.carried, self._renew)
        clear_gradients(self.state)  # those that a hook has looked at, too
        self._resumed = self.carried = None
        self.state.control.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            if error is None:
                self.state.control.ending = True
                self._close_epoch()
                self._rest(epoch_over=True)
                self._finish_saving()
        except BaseException as late:
            error = late
            if not (isinstance(late, KeyboardInterrupt) and interactive()):
                raise
        finally:
            with self._stack:
                self._finish(error)
            SHORT.__exit__(kind, error, trace)
        heed_late(self.state, error)
        return isinstance(error, KeyboardInterrupt) and interactive()

    def _finish(self, error: BaseException | None) -> None:
        """Put the best weights back, make the result, call the last hooks. Called always, exactly once."""
        state, progress, control = self.state, self.state.progress, self.state.control
        state.processes.leave(error)
        interrupted = isinstance(error, KeyboardInterrupt | SignalExit)
        progress.interrupted, progress.seconds, state.epoch.is_open = interrupted, state.seconds, False
        if error is None and state.best.value is None:
            from weft.loop.afterwards import tell_of_no_best

            tell_of_no_best(state)
        control.stop_reason = "interrupted" if interrupted else "error" if error else control.stop_reason or "epochs"
        self.put_in_eval_mode()
        last = self.last_weights(), state.training.others.state_dict()
        restores = error is None or interrupted
        if restores and (misfit := state.best.restore(state.problem, state.training.others)):
            state.warn_once(misfit)
        phases.unfreeze(state.training.frozen)
        self.result = result = result_of(state, *last)
        bound, state.hooks = state.hooks.bound, Listeners(state.hooks.hooks)
        with ExitStack() as last:  # each is called, even if one before it raises
            for call in reversed(bound["on_fit_end"]):
                last.callback(call, state.trainer, result)
            if state.kept.run_dir is not None and state.is_global_zero and control.begun:
                last.callback(feeding.save_result, state, result)
            last.callback(setattr, progress, "batch", 0)  # the next fit begins this epoch again
            for call in reversed(bound["on_exception"] if error is not None and not interrupted else []):
                last.callback(call, state.trainer, error)
            if error is not None:
                last.callback(self._finish_saving, error)
        if interrupted:
            from weft.loop.lastly import come_back

            come_back(state, error)

    def put_in_train_mode(self) -> None:
        """As the first epoch finds it."""
        self.state.problem.train()

    def put_in_eval_mode(self) -> None:
        """Whoever uses the problem now wants its predictions; the last hooks see it so."""
        self.state.training.turn("eval")
        self.state.problem.eval()

    def _finish_saving(self, error: BaseException | None = None) -> None:
        if self.state.kept.writer is not None:
            from weft.loop.lastly import finish_saving

            finish_saving(self.state, error)

    # ---- phases

    def begin_phases(self, resumed: bool) -> None:
        """Begin the phase that this run starts in; a resumed one goes through those before it, up to its own."""
        state = self.state
        if resumed:
            for number in range(state.progress.phase + 1):
                state.progress.phase = number
                phases.put_in_force(state)
        else:
            phases.put_in_force(state, anew=not state.control.continues or not state.training.optimizers)
        self._make_update()

    def _make_update(self) -> None:
        """The update, and the tools for one's own, with the optimizers and hooks that are in force."""
        state = self.state
        self._forwards, state.training.outside = {}, None
        clear_gradients(state)
        self._manual = None
        self._parameters = [*state.problem.parameters(), *state.training.others.tensors.values()]
        if state.trainer.overrides("update"):
            self.update = self.manual.framed(state.trainer.update)
        else:
            self.update = built_in(state, self.begin_update, self.end_step)
        if state.config.compile:
            from weft.compile.choosing import Graphs, compile_update

            self.graphs = self.graphs or Graphs(state)
            self.update = compile_update(self.graphs, self.update, self.begin_update, self.end_step)

    def _in_phase(self) -> bool:
        """Whether a phase is in force for one more epoch; where one is over the next begins. False after the last."""
        state = self.state
        if phases.is_over(state):
            if not phases.to_next(state):
                return False
            if state.phase.data is not None:
                feeding.renew_data(state)
            phases.put_in_force(state)
            self._make_update()
        every = state.feed.data.refresh_every
        if every and state.progress.epoch - state.progress.data_epoch >= every:
            feeding.renew_data(state)
        return True

    # ---- the loop's pieces

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs to train, from 0. The epoch before closes when the next is asked for."""
        while self._begin_epoch():
            yield self.state.progress.epoch

    def _begin_epoch(self) -> bool:
        self._close_epoch()
        state, progress, control = self.state, self.state.progress, self.state.control
        if progress.last_step is not None and progress.step >= progress.last_step:
            state.decide_to_stop("max_steps")
        if not control.reopened:  # of an epoch that a resumed run is in the middle of, this has happened
            if control.stop_reason or progress.epoch >= progress.last_epoch or not self._in_phase():
                return False
            state.epoch.evaluated = {}
        state.epoch.is_open, state.epoch.clock = True, time.perf_counter()
        state.epoch.throughput.begin()
        state.epoch.steps_before = None if control.reopened else progress.step
        if not control.reopened:
            state.call("on_epoch_start")
        control.reopened = False
        return True

    def batches(self, split: str = "train") -> Iterator[Any]:
        """The batches of a split; of "train" those of this epoch, in lists when accumulating. Ends early when told to.

        Asked for once more in the same epoch, those of "train" go on where they ended. ValueError: unending ones.
        """
        if split != "train":
            yield from self.state.batches_of(split)
            return
        state, progress, size = self.state, self.state.progress, self.state.config.accumulate
        if state.control.stop_reason and progress.batch:
            self.leave_open()
            return  # it was told to stop in the last step before it was resumed
        is_empty = progress.batch == 0
        found = watched_batches(state.hooks, state.epoch.throughput.timed(feeding.train_batches(state, self._rest)))
        for batch in found if size == 1 else in_lists(found, size):
            is_empty = False
            progress.batch += 1 if size == 1 else len(batch)
            self.announce(batch)
            self._in_batches = True
            yield batch
            self._in_batches = False
            state.step.batch = None
            self._rest()
            if state.control.stop_reason:
                self.leave_open()
                return
        if is_empty:
            raise ValueError("The training data yielded no batch: there is nothing to train on.")

    def leave_open(self) -> None:
        """The run stops here. Within an epoch, the checkpoint to go on from is the state of now, before it closes."""
        state = self.state
        if state.saves and state.progress.batch != state.num_batches("train"):
            from weft.loop.saving import save_open

            look_back(state)
            save_open(state)

    def _rest(self, epoch_over: bool = False) -> None:
        """The state is whole, between steps or epochs: it may be saved, and an interruption takes effect here."""
        state, control, processes = self.state, self.state.control, self.state.processes
        agreed = (processes.called() or epoch_over) and processes.agree(control.interruption)
        control.stop_reason = control.stop_reason or processes.granted.pop("stop", None)
        control.stage, control.leaving = Stage.REST, control.interruption.asked if agreed else 0
        if state.kept.save_wanted:
            self.save()
        state.call(AT_REST)
        if control.leaving:
            control.interruption.leave(control.leaving)
        limit = state.max_seconds
        if limit is not None and processes.due("max_time", state.seconds - control.seconds_before >= limit):
            state.decide_to_stop("max_time")

    def evaluate(self, split: str = "dev") -> dict[str, float]:
        """Means over all examples of `split` as floats, which also become part of the open epoch's metrics.

        In eval mode, without gradients unless the problem asks for them (`grad_inference`). {} without a dev set;
        ValueError for another split that is missing.
        """
        state = self.state
        if split == "dev" and not state.has("dev"):
            return {}
        state.control.stage = Stage.EVALUATION
        state.call("on_validation_start")
        if split not in self._forwards:
            self._forwards[split] = forward_of(state, split)
        forward = self._forwards[split]
        if self.graphs is not None:
            forward = self.graphs.forward(split, forward)
        by_part = None
        if getattr(state.source(split), "is_uneven", False):  # datasets of different sizes
            from weft.step.parts import means_by_part as by_part
        metrics = watched(state.hooks, "evaluation", evaluate)(state, split, forward, by_part)
        if state.epoch.is_open:
            state.epoch.evaluated |= metrics
        state.call("on_validation_end", metrics)
        state.control.stage = Stage.REST
        return metrics

    @property
    def validation_due(self) -> bool:
        """Whether `fit` evaluates the dev set after this epoch: each n-th, the last (of a phase too), and at a stop."""
        return self.state.has("dev") and (phases.ends_here(self.state) or phases.is_nth(self.state))

    def _close_epoch(self) -> None:
        """History, best weights, hooks, schedulers, in this order; then the epoch is over."""
        state, epoch, progress = self.state, self.state.epoch, self.state.progress
        if not epoch.is_open:
            return
        self._in_batches = False
        if state.kept.save_wanted:  # a loop of one's own left its batches in the step at which a hook asked for it
            self.save()
        epoch.is_open, state.control.stage = False, Stage.EPOCH_END
        feeding.check_folder(state)
        look_back(state)
        self.tell_of_nothing_trained()
        state.training.turn("eval")  # the best weights are those that an evaluation sees
        means, logged = (of.compute(state.processes.gather) for of in (epoch.means, epoch.logged))
        add_up_terms(state, "train", means)
        epoch.measured = {*means, *epoch.evaluated} if self.names_are_apart and state.trainer.names_are_apart else set()
        state.refuse_taken(logged)
        metrics = {**means, **logged, **epoch.evaluated}
        epoch.means.clear()
        epoch.logged.clear()
        state.history.append(metrics)
        epoch.seconds = time.perf_counter() - epoch.clock
        try:
            by_default = state.trainer.monitors_by_default and self.monitors_by_default
            monitor = epoch.monitor = monitored_metric(state, metrics, by_default)
            value, mode = metrics.get(monitor or ""), state.config.monitor_mode
            epoch.improved = monitor is not None and state.best.update(
                monitor, value, progress.epoch, mode, state.problem, state.training.others
            )
            epoch.closing = metrics
            state.call("on_epoch_end", metrics)
            complete = bool(epoch.evaluated) or not self.has("dev")
            for schedule in state.training.schedules.values():
                if schedule.interval == "epoch":
                    schedule.step(metrics, monitor, complete)
        finally:  # its training is through, whatever a hook raised
            epoch.closing, epoch.measured = None, set()
            progress.epoch, progress.phase_epoch, progress.batch = progress.epoch + 1, progress.phase_epoch + 1, 0
        self._rest(epoch_over=True)

    # ---- a step's tools

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Gradients of `loss`, added to those that are there. In a loop of your own, the loss is also logged."""
        self.manual.backward(loss, **kwargs)

    def step(self, optimizer: Optimizer | str | None = None) -> bool:
        """Clip, check and step one optimizer (itself or its name), or all of them; then clear their gradients.

        Returns whether they stepped: gradients that are not finite are handled as `on_nonfinite` says. In a loop of
        your own this counts as a step of the run (with several optimizers, when the first one steps).
        """
        return self.manual.step(optimizer)

    def default_update(self, batch: Any) -> Tensor:
        """The built-in update; inside a `Trainer.update` that calls `super().update(batch)`, without its frame."""
        return self.manual.update(batch, self.update)

    def announce(self, batch: Any) -> None:
        """A step begins: say so, once for each batch."""
        state = self.state
        if batch is not state.step.batch:
            state.step.batch = batch
            if state.training.outside is None or state.training.looks:
                prepare_look(state)
            state.training.turn("train")
            if state.step.statistics is not None:
                state.step.statistics.take()
            state.call("on_step_start", batch)

    def begin_step(self, batch: Any) -> None:
        """What every update does first with its batch."""
        self.state.control.stage = Stage.UPDATE
        self.announce(batch)  # where it did not come from `batches`

    def begin_update(self, batch: Any) -> None:
        """The same for the built-in update of a batch, from no gradients: a hook may have looked at some."""
        self.begin_step(batch)
        for p in self._parameters:
            p.grad = None

    def end_step(self, batch: Any, loss: Tensor | None) -> None:
        """What every update does last with its batch and loss: count the step, step the schedules, call the hooks."""
        state, progress = self.state, self.state.progress
        progress.step += 1
        for schedule in state.training.schedules.values():
            if schedule.interval == "step":
                schedule.step({}, None)
        if state.config.log_every and loss is not None:
            state.epoch.recent.add({f"{state.config.train_metric}_step": loss}, num_examples(batch))
        state.control.stage = Stage.STEP_HOOKS
        state.call("on_step_end", batch, loss)
        state.control.stage = Stage.REST
        if state.kept.save_wanted and not self._in_batches:  # there at the next rest: a loop may log first
            self.save()
        if progress.last_step is not None and progress.step >= progress.last_step:
            state.decide_to_stop("max_steps")

    # ---- for hooks and loops

    def log(self, values: Mapping[str, Any]) -> None:
        """Record scalars, values by name. Their means over the epoch go into the history and to the loggers.

        In `on_epoch_end` they become part of the epoch that ends; in a step of an evaluation they are averaged over its
        examples and part of its metrics. Raises ValueError for what is no scalar, and RuntimeError after the end.
        """
        if self.result is not None and self.state.step.evaluating is None:
            raise RuntimeError(f"log: {list(values)} came after the end of the run; log in on_epoch_end at the latest.")
        self.state.log(values)

    def stop(self, reason: str = "stopped") -> None:
        """End training after the current step (of several processes after the next, where all stop together).

        The first reason given is the one reported.
        """
        self.state.stop(reason)

    def save(self) -> Path:
        """Write a checkpoint into the run's folder and return its path; in `on_step_end`, once all hooks saw the step.

        On every rank, between updates. RuntimeError without a folder or in an update, OSError if the disk fails.
        """
        from weft.loop.saving import save_run

        look_back(self.state)
        return watched(self.state.hooks, "checkpoint", save_run)(self.state)
