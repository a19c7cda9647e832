"""Automatic and manual optimization: one batch through the module, with every hook in Lightning's order.

on_train_batch_start
optimizer_step:  training_step
                 on_before_zero_grad, optimizer_zero_grad        (first batch of an accumulation)
                 on_before_backward, backward, on_after_backward
                 on_before_optimizer_step, configure_gradient_clipping, the optimizer's own step
schedulers of interval "step", at the last batch those of interval "epoch"
on_train_batch_end
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from weft.data.batches import num_examples
from weft.integrations.lightning.names import takes, tell_of_log_dict
from weft.integrations.lightning.strategy import NotFinite
from weft.step.instrument import watched
from weft.step.nonfinite import not_finite
from weft.step.optimizers import needs_closure
from weft.step.state import Update

if TYPE_CHECKING:
    from weft.integrations.lightning.context import Context


def make_update(run: Context) -> Update:
    """The function that takes one batch through the module. It returns the loss, detached (zero if there was none)."""
    optimize = automatic(run) if run.module.automatic_optimization else manual(run)
    on_start, on_end = run.hooks_of.bind("on_train_batch_start"), run.hooks_of.bind("on_train_batch_end")
    results, progress, schedulers = run.results_of_training, run.progress, run.schedulers
    add, train_metric, nothing = run.state.epoch.means.add, run.state.config.train_metric, torch.zeros(())

    def update(batch: Any) -> Tensor:
        run.begin_step(batch)
        number, steps_before = run.batch_idx, progress.step
        results.start_batch(batch)
        if on_start is not None and batch is not None and on_start(batch, number) == -1:
            run.skip_rest_of_epoch = True  # the module said so
        loss, outputs = None, None
        if not run.skip_rest_of_epoch and batch is not None:
            loss, outputs = optimize(batch, number)
        if schedulers.configs:
            if not run.is_accumulating:
                schedulers.step("step", plateau=False)
            if run.is_last_batch or run.skip_rest_of_epoch:
                schedulers.step("epoch", plateau=False)
        if not run.skip_rest_of_epoch:
            if on_end is not None:
                on_end(outputs, batch, number)
            results.end_batch()
            if schedulers.configs and not run.is_accumulating:
                run.step_plateau_schedulers(wait=run.is_last_batch)
        if loss is not None:
            add({train_metric: loss}, num_examples(batch))
        loss = nothing if loss is None else loss
        run.end_batch(batch, loss, stepped=progress.step > steps_before)
        return loss

    return update


def _clearing(run: Context, optimizer: Any) -> Callable[[int], None]:
    """A function (number of the batch) that clears gradients as the hooks say, or as the optimizer does."""
    before = run.hooks_of.bind("on_before_zero_grad")
    own = run.hooks_of.bind("optimizer_zero_grad", callbacks=False)
    progress, params = run.progress, _parameter_lists(optimizer)

    def clear(number: int) -> None:
        run.count_zero_grad("ready")
        if before is not None:
            before(optimizer)
        run.count_zero_grad("started")
        if own is not None:
            own(progress.epoch, number, optimizer)
        elif params is not None:
            for group in params():
                for p in group:
                    p.grad = None
        elif optimizer is not None:
            optimizer.zero_grad()
        run.count_zero_grad("completed")

    return clear


def automatic(run: Context) -> Callable[[Any, int], tuple[Tensor | None, dict[str, Any]]]:
    """A function (batch, its number) -> (loss, what on_train_batch_end gets): the optimizer steps by itself."""
    module, hooks, strategy, view = run.module, run.hooks_of, run.strategy, run.view
    step = watched(run.state.hooks, "forward", training_step(run))
    optimizer = strategy.optimizers[0] if strategy.optimizers else None
    wrapped = strategy._lightning_optimizers[0] if strategy.optimizers else None
    own_step = hooks.bind("optimizer_step", callbacks=False)
    progress, take_gradients, clear = run.progress, strategy.take_gradients, _clearing(run, optimizer)
    quick = optimizer is not None and strategy.steps_plainly and not needs_closure(optimizer)
    state: dict[str, Any] = {"batch": None, "number": 0, "loss": None, "extra": {}}

    @torch.enable_grad()  # an optimizer may call it in a step that is under no_grad
    def closure() -> Tensor | None:
        returned = step(state["batch"], state["number"])
        loss, extra = _loss_of(run, returned)
        state["called"], state["raw"] = True, None if loss is None else loss.detach()
        state["loss"], state["extra"] = state["raw"], extra
        if loss is None:
            run.state.warn_once("`training_step` returned `None`: nothing is learned from such batches.")
        if run.skips_backward:
            return state["loss"]
        every = view.accumulate_grad_batches
        if state["number"] % every == 0:
            clear(state["number"])
        if loss is not None:
            if every != 1:
                loss = loss / every
            take_gradients(loss)
            state["loss"] = loss.detach()
        return state["loss"]

    guarded = strategy.checked(optimizer, closure) if quick else None
    step_with: Any = optimizer.step if optimizer is not None else None
    step_quickly = watched(run.state.hooks, "optimizer", lambda: step_with(closure=guarded))

    def optimize(batch: Any, number: int) -> tuple[Tensor | None, dict[str, Any]]:
        state["batch"], state["number"], state["called"] = batch, number, False
        if run.is_accumulating:
            with run.unsynced():
                closure()
        else:
            run.count_optimizer_step("ready")
            try:
                if optimizer is None:
                    closure()
                elif own_step is not None:
                    own_step(progress.epoch, number, wrapped, closure)
                elif guarded is not None:
                    step_quickly()
                else:
                    strategy.optimizer_step(optimizer, closure)
            except NotFinite as found:
                run.module.zero_grad()
                not_finite(run.state, found.args[0], ())
            run.count_optimizer_step()
        if not state["called"]:
            raise RuntimeError(
                f"{type(module).__name__}.optimizer_step did not execute the closure: it trains by "
                "`optimizer.step(closure=optimizer_closure)`, or calls `optimizer_closure()` itself before."
            )
        raw, loss, extra = state["raw"], state["loss"], state["extra"]
        state["batch"], state["extra"] = None, {}
        return raw, {} if loss is None else {"loss": loss, **extra}

    return optimize


def manual(run: Context) -> Callable[[Any, int], tuple[Tensor | None, dict[str, Any]]]:
    """A function (batch, its number) -> (loss if one was returned, outputs).

    The module does it all in training_step.
    """
    module, step = run.module, training_step(run)

    def optimize(batch: Any, number: int) -> tuple[Tensor | None, dict[str, Any]]:
        returned = step(batch, number)
        if returned is None:
            return None, {}
        if isinstance(returned, Mapping):
            tell_of_log_dict(run, returned, "training_step")
            outputs = dict(returned)
            if isinstance(outputs.get("loss"), Tensor):
                outputs["loss"] = outputs["loss"].detach()
        elif isinstance(returned, Tensor):
            outputs = {"loss": returned.detach()}
        else:
            raise TypeError(f"{type(module).__name__}.training_step returned {type(returned).__name__}; {EXPECTED}")
        loss = outputs.get("loss")
        return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None, outputs

    return optimize


EXPECTED = "expected a loss, a dict with 'loss', or None."


def _loss_of(run: Context, returned: Any) -> tuple[Tensor | None, dict[str, Any]]:
    """(The loss with its graph, the other keys) of what training_step returned in automatic optimization."""
    module = run.module
    if isinstance(returned, Tensor):
        loss, extra = returned, {}
    elif returned is None:
        return None, {}
    elif isinstance(returned, Mapping):
        tell_of_log_dict(run, returned, "training_step")
        loss, extra = returned.get("loss"), {k: v for k, v in returned.items() if k != "loss"}
        if not isinstance(loss, Tensor):
            raise TypeError(f"{type(module).__name__}.training_step returned a dict with {list(returned)}; {EXPECTED}")
    else:
        raise TypeError(f"{type(module).__name__}.training_step returned {type(returned).__name__}; {EXPECTED}")
    return loss, extra


def training_step(run: Context) -> Callable[[Any, int], Any]:
    """The module's training_step as a function of (batch, its number), in the run's precision."""
    return step_of(run, "training_step", run.training_step)


def step_of(run: Context, name: str, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A step of the module (or `function`, which calls it) as one of (batch, its number[, number of the loader])."""
    own, state = getattr(run.module, name), vars(run.module)
    numbered, context, called = takes(own, "batch_idx", at_least=2), run.step_context, function or own

    def step(batch: Any, number: int, *loader: int) -> Any:
        before, state["_current_fx_name"] = state["_current_fx_name"], name
        args = (batch, number, *loader) if numbered else (batch, *loader)
        if context is None:
            returned = called(*args)
        else:
            with context():
                returned = called(*args)
        state["_current_fx_name"] = before
        return returned

    return step


def _parameter_lists(optimizer: Any) -> Callable[[], list[list[Tensor]]] | None:
    """The optimizer's parameters by group, for clearing gradients as `Optimizer.zero_grad` does, without its records.

    None if the optimizer has a `zero_grad` of its own.
    """
    if optimizer is None or getattr(type(optimizer), "zero_grad", None) is not Optimizer.zero_grad:
        return None
    return lambda: [group["params"] for group in optimizer.param_groups]
