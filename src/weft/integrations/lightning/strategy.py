"""What Lightning's own methods (`manual_backward`, `LightningOptimizer.step`, `clip_gradients`, ...) call beneath them.

One object stands for Lightning's strategy and another for its precision plugin; the work is Fabric's and torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from weft.devices.precision import scaler_of
from weft.integrations.lightning.names import lightning_class
from weft.step.instrument import watched
from weft.step.nonfinite import not_finite
from weft.step.optimizer_step import finite_check, ignores
from weft.step.optimizers import needs_closure, parameters_of
from weft.step.trained import look

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from weft.integrations.lightning.context import Context


class NotFinite(Exception):
    """A loss or gradient was not finite, found before the optimizer stepped; carries the loss."""


class Strategy:
    """Lightning's strategy, as far as modules, optimizers and callbacks use it."""

    def __init__(self, run: Context) -> None:
        self._run, fabric = run, run.fabric
        self.lightning_module = self.model = run.module
        self.root_device, self.is_global_zero = fabric.device, fabric.is_global_zero
        self.global_rank, self.local_rank, self.node_rank = fabric.global_rank, fabric.local_rank, fabric.node_rank
        self.world_size, self.precision_plugin = fabric.world_size, Precision(run)
        self.optimizers: list[Optimizer] = []
        self._lightning_optimizers: list[Any] = []

    @property
    def steps_plainly(self) -> bool:
        """Whether a step is the optimizer's own, without a gradient scaler."""
        return self.precision_plugin.scaler is None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"trainer.strategy has no {name!r} under weft; it has {sorted(n for n in dir(self) if n[0] != '_')}."
        )

    def use(self, optimizers: list[Optimizer], as_wrapped: list[Any] | None = None) -> None:
        """Hand these optimizers to the module, wrapped as Lightning wraps them (where they are: `as_wrapped`)."""
        wrapper = lightning_class(self._run.module, "core.optimizer.LightningOptimizer")
        self.optimizers = optimizers
        self._lightning_optimizers = (
            [o if isinstance(o, wrapper) else wrapper(o) for o in optimizers] if as_wrapped is None else as_wrapped
        )
        for wrapped in self._lightning_optimizers:
            wrapped._strategy = self
            if not self._run.module.automatic_optimization:
                wrapped._on_after_step = self._run.count_optimizer_step

    def bind(self) -> None:
        """Look up the hooks around gradients, once a fit."""
        hooks = self._run.hooks_of
        self._before_backward, self._after_backward = hooks.bind("on_before_backward"), hooks.bind("on_after_backward")
        automatic = self._run.module.automatic_optimization
        # in manual optimization what backward logs counts as logged in training_step
        own_backward = hooks.bind("backward", callbacks=False, always=True, as_hook=automatic)
        assert own_backward is not None
        self._own_backward = watched(self._run.state.hooks, "backward", own_backward)
        self._step = watched(self._run.state.hooks, "optimizer", self._step_with)
        self.precision_plugin.bind()

    def backward(self, loss: Tensor, optimizer: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """What `manual_backward` calls."""
        return self.take_gradients(loss, *args, **kwargs)

    def take_gradients(self, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Gradients of `loss` by the module's `backward`, with the hooks around."""
        if self.precision_plugin.scaler is not None:
            loss = self.precision_plugin.scaler.scale(loss)
        if self._run.state.training.looks:
            look(self._run.state, loss)
        if self._before_backward is not None:
            self._before_backward(loss)
        self._own_backward(loss, *args, **kwargs)
        if self._after_backward is not None:
            self._after_backward()
        return loss.detach()

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step an optimizer with a closure: what `LightningOptimizer.step` calls."""
        return self._step(optimizer, closure, kwargs)

    def _step_with(self, optimizer: Any, closure: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        scaler = self.precision_plugin.scaler
        if scaler is not None:
            return self._scaled_step(scaler, optimizer, watched(self._run.state.hooks, "loop", closure), kwargs)
        if needs_closure(optimizer):
            return self._search(optimizer, closure, kwargs)
        checked = self.checked(optimizer, closure)
        if self._run.module.automatic_optimization:
            return optimizer.step(closure=checked, **kwargs)
        try:
            return optimizer.step(closure=checked, **kwargs)
        except NotFinite as found:
            _clear(optimizer)
            not_finite(self._run.state, found.args[0], ())
            return None

    def checked(self, optimizer: Any, closure: Callable[[], Any]) -> Callable[[], Any]:
        """`closure`, then the hooks, clipping and the check of the gradients. It raises NotFinite."""
        after, goes_on = self.precision_plugin.after_closure, ignores(self._run.state)
        closure = watched(
            self._run.state.hooks, "loop", closure
        )  # forward and backward are no parts of the optimizer's step

        def call() -> Any:
            loss = closure()
            norm = after(optimizer)
            params = parameters_of(optimizer)  # a callback may have added some
            is_finite = finite_check(params, scaled=False, ignore=goes_on)
            if not is_finite(loss if isinstance(loss, Tensor) else None, [norm]):
                raise NotFinite(loss)
            return loss

        return call

    def _scaled_step(self, scaler: Any, optimizer: Any, closure: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        """Under 16-mixed: gradients are unscaled before the hooks see them; an overflow skips the step by design."""
        if needs_closure(optimizer):
            raise ValueError(f"{type(optimizer).__name__} calls its closure itself, which 16-mixed cannot scale.")
        loss = closure()
        if not ignores(self._run.state) and isinstance(loss, Tensor) and not bool(loss.isfinite().all()):
            raise NotFinite(loss)
        skipped = loss is None and self._run.module.automatic_optimization
        if not skipped:
            scaler.unscale_(optimizer)
        self.precision_plugin.after_closure(optimizer)
        if skipped:
            return loss
        stepped = scaler.step(optimizer, **kwargs)
        scaler.update()
        return stepped

    def _search(self, optimizer: Any, closure: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        """A line search may meet numbers that are not finite and recover: only its end is checked."""
        after, losses = self.precision_plugin.after_closure, []

        def call() -> Any:
            losses[:] = [closure()]
            after(optimizer)
            return losses[0]

        returned = optimizer.step(closure=call, **kwargs)
        if ignores(self._run.state):
            return returned
        finite = all(bool(p.detach().isfinite().all()) for p in parameters_of(optimizer))
        if not finite or isinstance(losses[0], Tensor) and not bool(losses[0].isfinite().all()):
            raise FloatingPointError(
                f"{type(optimizer).__name__} ended at numbers that are not finite in step {self._run.progress.step} "
                f"(epoch {self._run.progress.epoch}); a smaller lr or line_search_fn='strong_wolfe' may help."
            )
        return returned

    # ------------------------------------------------------------------ between processes, files

    def barrier(self, name: str | None = None) -> None:
        """Wait for the other processes."""
        self._run.fabric.barrier(name)

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """The value of one process in all."""
        return self._run.fabric.broadcast(value, src=src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The mean (or sum) over all processes."""
        return self._run.fabric.all_reduce(tensor, group=group, reduce_op=reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Any:
        """The tensors of all processes, stacked; in one process the tensor itself."""
        return self._run.fabric.all_gather(tensor, group=group, sync_grads=sync_grads)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes (or any) say so."""
        if self.world_size == 1:
            return decision
        agreed: Any = self.reduce(torch.tensor(int(decision), device=self.root_device), reduce_op="sum")
        return agreed.item() == self.world_size if all else agreed.item() > 0

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a checkpoint that a callback no longer keeps."""
        if self.is_global_zero:
            Path(filepath).unlink(missing_ok=True)


class Precision:
    """Lightning's precision plugin: what it does around a step and to gradients."""

    def __init__(self, run: Context) -> None:
        self._run = run
        self.precision: str = run.fabric._precision.precision
        self.scaler = scaler_of(run.fabric)

    def bind(self) -> None:
        """Look up the hooks around clipping, once a fit."""
        run, hooks = self._run, self._run.hooks_of
        self._own_clipping = hooks.bind("configure_gradient_clipping", callbacks=False) or hooks.bind(
            "clip_gradients", callbacks=False
        )
        self._before_step, self._listeners = (
            hooks.bind("on_before_optimizer_step"),
            run.state.listeners("on_before_optimizer_step"),
        )

    def after_closure(self, optimizer: Any) -> Tensor | None:
        """The hooks before an optimizer steps, and clipping; returns the gradients' norm where it was computed."""
        if self._before_step is not None:
            self._before_step(optimizer)
        for call in self._listeners:
            call(self._run.state.trainer, optimizer)
        clip, algorithm = self._run.view.gradient_clip_val, self._run.view.gradient_clip_algorithm
        if self._own_clipping is not None and self._run.module.automatic_optimization:
            self._run.hooks_of.call_module(
                "configure_gradient_clipping", optimizer, gradient_clip_val=clip, gradient_clip_algorithm=algorithm
            )
        elif clip:
            return self.clip_gradients(optimizer, clip, algorithm)
        return None

    def clip_gradients(
        self, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm"
    ) -> Tensor | None:
        """Clip an optimizer's gradients by their norm (which is returned) or by value."""
        if clip_val <= 0:
            return None
        by_value = gradient_clip_algorithm == "value"
        return self._run.state.processes.clip(parameters_of(optimizer), clip_val, by_value)


def step_context(fabric: Fabric) -> Callable[[], AbstractContextManager[Any]] | None:
    """What a step is called in: autocast, or the default dtype of a "-true" precision; None: nothing."""
    precision = fabric._precision.precision
    if precision == "32-true":
        return None
    if precision.endswith("-mixed"):
        dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16
        # no cache of casted weights: as Lightning has it, a step may change weights in between
        return lambda: torch.autocast(fabric.device.type, dtype=dtype, cache_enabled=False)
    return fabric._precision.forward_context


def _clear(optimizer: Any) -> None:
    for p in parameters_of(optimizer):
        p.grad = None
