"""The training loop of `weft.integrations.lightning.Trainer`: weft's run, with Lightning's data, counters and rows.

    for _ in run.epochs():
        for batch in run.batches("train"):
            run.update(batch)

Lightning's own objects do what surrounds the update: ask for loaders, count, validate, write rows, save and resume.
They are called at the moments at which Lightning calls them, so checkpoints of one trainer are those of the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from operator import is_
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import weft
from weft.data.data import SPLITS, Data
from weft.devices.processes import Processes
from weft.devices.signals import Interruption
from weft.integrations.lightning.hooks import Hooks
from weft.integrations.lightning.names import is_a, lightning_class, names_explicitly
from weft.integrations.lightning.strategy import Strategy
from weft.integrations.lightning.update import automatic, manual
from weft.loop.run import Run
from weft.places import attributes_of
from weft.step.history import Progress
from weft.step.state import ROW_NAMES, Control, Feed

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class FitRun(Run):
    """The run of a LightningModule within a fit of Lightning's Trainer (`view`), from `on_train_start` on."""

    takes_callbacks = brings_data = True
    names_are_apart = monitors_by_default = False

    def __init__(self, view: Trainer) -> None:
        core = weft.Trainer(progress=False, on_nonfinite="ignore")
        super().__init__(core, view.lightning_module)
        core.run = self
        self.view, self.module = view, view.lightning_module
        self.loop: Any = view.fit_loop
        self.skip_rest_of_epoch = False
        self.bound: list[Any] = []  # what the update was made of
        if names_explicitly(self.module.training_step, "dataloader_iter"):
            raise NotImplementedError("training_step takes 'dataloader_iter', which weft does not support.")
        before, loader = self.state, self.loop._combined_loader
        self.state = replace(
            before,
            fabric=fabric_of(view),
            processes=OneOf(view.global_rank),
            control=Control(interruption=Uncaught()),
            progress=Progress(epoch=view.current_epoch, step=view.global_step, last_epoch=sys.maxsize),
            feed=Feed(before.feed.seed, Data(train=loader), {**dict.fromkeys(SPLITS), "train": loader}),
            training=replace(
                before.training,
                optimizers={},  # they are Lightning's, and a script may exchange them
                outside={},  # what else a loss reaches is the script's affair
            ),
        )

    # ---- begin and end

    def has(self, split: str) -> bool:
        """There is training data, else the loop would not be entered; all else Lightning's loops know."""
        return split == "train"

    def in_use(self) -> Any:
        """Lightning has put everything in its place."""
        return nullcontext()

    def begin_phases(self, resumed: bool) -> None:
        """What cannot be trained is refused here."""
        self.bind()

    def bind(self) -> None:
        """The update, with the callbacks, hooks and steps of now: scripts exchange them between epochs."""
        self.callbacks: list[Any] = self.view.callbacks  # type: ignore[attr-defined]
        own = [p.value for p in attributes_of(("", o) for o in (self.module, *self.callbacks)) if callable(p.value)]
        found = [self.module.automatic_optimization, *self.callbacks, *own]
        if len(found) == len(self.bound) and all(map(is_, found, self.bound)):
            return
        self.bound = found
        self.hooks_of = Hooks(self.view, self.module, self.callbacks)  # type: ignore[arg-type]
        self.step_context, self.training_step = step_in_strategy(self.view)
        self.bind_optimizers()
        self.update = make_update(self)

    def bind_optimizers(self) -> None:
        """How a batch is learned from, with the optimizers of now: scripts make them anew at any batch."""
        self.strategy, context = strategy_of(self), self
        by_itself = self.module.automatic_optimization
        self.optimize = automatic(context) if by_itself else counted(self, manual(context))  # type: ignore[arg-type]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        super().__exit__(kind, error, trace)
        return False  # an interrupt is Lightning's to handle

    def last_weights(self) -> dict[str, Tensor]:
        """The weights themselves: a copy may be too much, and a script may have a `state_dict` of its own."""
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def _start(self) -> None:
        """Gradients that are there stay."""
        self.state.call("on_fit_start")
        self.state.control.begin()

    def tell_of_nothing_trained(self) -> None:
        """A fit that is resumed may have an epoch to close and nothing else."""

    def put_in_train_mode(self) -> None:
        """Modules stay in the modes that they were put into: a frozen part in eval mode is no part of training."""

    def put_in_eval_mode(self) -> None:
        """Lightning leaves the modes of training."""

    # ---- the loop's pieces

    def _begin_epoch(self) -> bool:
        self._close_epoch()
        if self.loop.done:
            return False
        self.skip_rest_of_epoch = False
        self.loop.on_advance_start()
        self.bind()
        return super()._begin_epoch()

    def _close_epoch(self) -> None:
        if self.state.epoch.is_open and not self.state.control.ending:
            self.loop.on_advance_end()
            self.loop.on_iteration_done()
            metrics: dict[str, Tensor] = self.view.callback_metrics
            plain = {name: value for name, value in metrics.items() if name not in ROW_NAMES and value.numel() == 1}
            self.state.epoch.evaluated.update({name: float(value) for name, value in plain.items()})
            super()._close_epoch()

    def batches(self, split: str = "train") -> Iterator[Any]:
        """The batches of this epoch as Lightning fetches them; what follows one is done when the next is asked for."""
        loop, fetcher = self.loop.epoch_loop, self.loop._data_fetcher
        loop.reset()
        loop.on_run_start(fetcher)
        while not loop.done:
            if not self._validates_first(loop, fetcher):
                try:
                    batch = self._fetch(loop, fetcher)
                except StopIteration:
                    break
                self.progress.batch += 1
                yield batch
                if self.skip_rest_of_epoch:
                    break
            loop.on_advance_end(fetcher)  # validation, and schedulers that wait for it
            loop.on_iteration_done()
        loop.on_iteration_done()

    def _validates_first(self, loop: Any, fetcher: Any) -> bool:
        """Whether a fit resumed from a checkpoint of the middle of a validation ends that one first."""
        validates = loop.restarting and loop._should_check_val_fx(fetcher)
        if validates and (loop.val_loop.restarted_mid_evaluation or loop.restarted_on_last):
            loop._skip_next_val = not loop.val_loop.restarted_mid_evaluation
            return True
        if validates:
            loop.val_loop.increment_progress_to_evaluation_end()
        loop.val_loop.restarting = False
        return False

    def _fetch(self, loop: Any, fetcher: Any) -> Any:
        view = self.view
        if view.world_size > 1:
            loop._broadcast_sigterm_tensor()
        batch, _, _ = next(fetcher)
        loop.batch_progress.is_last_batch = fetcher.done
        batch = view.precision_plugin.convert_input(batch)
        batch = self.module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = view.strategy.batch_to_device(batch, dataloader_idx=0)
        loop.batch_progress.increment_ready()
        view._logger_connector.on_batch_start(batch)
        return batch

    @property
    def batch_idx(self) -> int:
        """The number of the batch in its epoch."""
        return self.loop.epoch_loop.batch_idx

    @property
    def is_accumulating(self) -> bool:
        """Whether the optimizer waits for further batches."""
        return self.loop._should_accumulate()

    @property
    def skips_backward(self) -> bool:
        """Whether a callback wants forward passes only (the last epoch of averaged weights)."""
        return self.loop._skip_backward

    def unsynced(self) -> AbstractContextManager[Any]:
        """Without summing gradients over the processes: there is more to come before the optimizer steps."""
        block = getattr(self.view.strategy, "block_backward_sync", nullcontext)
        return block()

    def count_zero_grad(self, what: str) -> None:
        """Clearing gradients is "ready", "started" or "completed": Lightning's counters."""
        count = self.loop.epoch_loop.automatic_optimization.optim_progress.optimizer.zero_grad
        getattr(count, f"increment_{what}")()

    def count_optimizer_step(self, what: str = "completed") -> None:
        """The step of an optimizer is "ready" or "completed": Lightning's counters and weft's."""
        loop = self.loop.epoch_loop
        of_steps = loop.automatic_optimization.optim_progress.optimizer.step
        count = of_steps if self.module.automatic_optimization else loop.manual_optimization.optim_step_progress
        getattr(count, f"increment_{what}")()
        self.progress.step += what == "completed"


def make_update(run: FitRun) -> Callable[[Any], Tensor]:
    """The function that takes one batch through the module, as `weft.integrations.lightning.update` has it."""
    on_start, on_end = run.hooks_of.bind("on_train_batch_start"), run.hooks_of.bind("on_train_batch_end")
    loop, connector, progress = run.loop.epoch_loop, run.view._logger_connector, run.progress
    count, nothing = loop.batch_progress, torch.zeros(())

    def update(batch: Any) -> Tensor:
        run.begin_step(batch)
        steps_before, loss = progress.step, None
        try:
            loss = learn(batch, run.batch_idx)
        except StopIteration:  # what Lightning takes for the end of an epoch, whoever raises it
            run.skip_rest_of_epoch = True
        if loss is not None:
            run.state.epoch.means.add({run.state.config.train_metric: loss}, 1)  # rows of a script's batch are its own
        loss = nothing if loss is None else loss
        if progress.step > steps_before or not run.module.automatic_optimization:
            progress.step -= 1  # it was counted when the optimizer stepped
            run.end_step(batch, loss)
        return loss

    def learn(batch: Any, number: int) -> Tensor | None:
        loss, outputs, is_left = None, None, False
        if batch is None:
            loop._warning_cache.warn("train_dataloader yielded None.")
        elif on_start is not None and on_start(batch, number) == -1:
            is_left = True  # the module said so
            count.increment_by(0, is_last_batch=True)
        else:
            count.increment_started()
            if run.view.strategy._lightning_optimizers is not run.strategy._lightning_optimizers:
                run.bind_optimizers()
            loss, outputs = run.optimize(batch, number)
        count.increment_processed()
        loop.update_lr_schedulers("step", update_plateau_schedulers=False)
        if loop._num_ready_batches_reached():
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        if is_left:
            raise StopIteration
        if on_end is not None:
            on_end(outputs, batch, number)
        connector.on_batch_end()
        count.increment_completed()
        connector.update_train_step_metrics()
        return loss

    return update


def counted(run: FitRun, optimize: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    """`optimize` of manual optimization: steps within it are counted, those of hooks are not."""
    wrapped = run.view.strategy._lightning_optimizers

    def call(batch: Any, number: int) -> Any:
        for optimizer in wrapped:
            optimizer._on_before_step = partial(run.count_optimizer_step, "ready")
            optimizer._on_after_step = run.count_optimizer_step
        outputs: Any = None, {}
        with suppress(StopIteration):  # of the step alone
            outputs = optimize(batch, number)
        for optimizer in wrapped:
            optimizer._on_before_step = optimizer._on_after_step = _nothing
        return outputs

    return call


def _nothing() -> None: ...


class OneOf(Processes):
    """This process; what it has to do with others is Lightning's strategy's affair."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank


class Uncaught(Interruption):
    """Signals are Lightning's to catch."""

    def caught(self, at_once: bool = False) -> Any:
        """Nothing is caught here."""
        return nullcontext()


class TheirStrategy:
    """A strategy or precision plugin that does more around gradients and steps than weft's: it does so itself."""

    steps_plainly = False

    def __init__(self, run: FitRun) -> None:
        theirs = run.view.strategy
        self.optimizers, self._lightning_optimizers = theirs.optimizers, theirs._lightning_optimizers
        self.optimizer_step = theirs.optimizer_step
        self.take_gradients = partial(theirs.backward, optimizer=self.optimizers[0] if self.optimizers else None)


def strategy_of(run: FitRun) -> Any:
    """What takes gradients and steps: weft's, or where Lightning's does more than to call torch, that one.

    Raises NotImplementedError for strategies that cut a module into pieces.
    """
    theirs, plugin = run.view.strategy, run.view.precision_plugin
    name, kinds = type(theirs).__name__, ("SingleDeviceStrategy", "DDPStrategy")
    if not any(is_a(theirs, kind) for kind in kinds):
        raise NotImplementedError(
            f"strategy={name}: with weft's loop a module trains as a whole in each process; use 'ddp', or train it "
            "with lightning.pytorch.Trainer."
        )
    averages = getattr(theirs, "_model_averager", None) is not None or getattr(plugin, "scaler", None) is not None
    plugins = ("Precision", "MixedPrecision", "DoublePrecision", "HalfPrecision")
    if averages or name not in kinds or type(plugin).__name__ not in plugins:
        return TheirStrategy(run)
    ours = Strategy(run)  # type: ignore[arg-type]
    ours.use(theirs.optimizers, theirs._lightning_optimizers)
    ours.bind()
    return ours


def fabric_of(view: Trainer) -> Any:
    """A Fabric for the device on which Lightning's strategy has put this process's module; it starts nothing."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment

    device = view.strategy.root_device
    devices: Any = 1 if device.index is None else [device.index]
    fabric = Fabric(accelerator=device.type, devices=devices, plugins=[LightningEnvironment()])
    fabric._launched = True
    return fabric


def step_in_strategy(view: Trainer) -> tuple[Callable[[], Any] | None, Callable[..., Any]]:
    """(What a step is called in, the training step): by the strategy where it wraps the module or is profiled."""
    strategy, module, plugin = view.strategy, view.lightning_module, view.precision_plugin
    profiler: Any = view.profiler  # type: ignore[attr-defined]
    if not is_a(profiler, "PassThroughProfiler"):
        return None, partial(lightning_class(module, "trainer.call._call_strategy_hook"), view, "training_step")
    if strategy.model is not module:
        return None, strategy.training_step
    return None if type(plugin).__name__ == "Precision" else plugin.train_step_context, module.training_step
