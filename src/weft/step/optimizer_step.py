"""The optimizer step: hooks, clipping, the check, the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from weft.devices.precision import stepping
from weft.step.instrument import watched
from weft.step.microbatches import Step
from weft.step.nonfinite import _doubts, finite_check, not_finite
from weft.step.optimizers import needs_closure, parameters_of

if TYPE_CHECKING:
    from weft.loop.run import Run


def make_step(run: Run, optimizers: Sequence[Optimizer]) -> Step:
    """A function (loss, what was read) -> whether the optimizers stepped: hooks, clipping, the check, the steps.

    Gradients that are NaN or infinite never reach an optimizer: either all of them step or none. Clears the gradients.
    """
    for optimizer in optimizers:
        if needs_closure(optimizer):
            raise TypeError(f"{type(optimizer).__name__} evaluates the loss itself (a closure): call update(batch).")
    before_step, trainer, progress, clip = run.listeners("on_before_optimizer_step"), run.trainer, run.progress, _clip(run)
    by_value, own = run.config.clip_algorithm == "value", [(o, parameters_of(o)) for o in optimizers]
    params, (do_step, unscale) = [p for _, mine in own for p in mine], stepping(run.fabric, optimizers)
    do_step = watched(run.hooks, "optimizer", do_step)
    is_finite = finite_check(params, scaled=unscale is not None)
    doubts, guarded = _doubts(run, optimizers, scaled=unscale is not None), () if unscale is not None else optimizers

    def step(loss: Tensor | None, read: Sequence) -> bool:
        norms = []
        for optimizer, mine in own:
            if unscale is not None:
                unscale(optimizer)
            for call in before_step:
                call(trainer, optimizer)
            if clip is not None and not by_value:
                norms.append(clip(mine))
        if doubts is not None:  # nothing waits for the GPU; `look_back` raises later
            doubts.guard(progress.step, loss, norms, params, guarded)
            finite = True
        else:
            finite = run.processes.all_of(is_finite(loss, norms))
        if finite:
            if clip is not None and by_value:  # after the check: it makes infinite gradients finite
                clip(params)
            do_step()
            progress.skipped = 0
        for p in params:
            p.grad = None
        if not finite:
            not_finite(run, loss, read)
        return finite

    return step


def _clip(run: Run) -> Callable[[Sequence[Tensor]], Tensor | None] | None:
    """A function that clips the gradients of some parameters and returns their norm, if it is known; None: no clipping."""
    limit = run.config.clip
    if limit is None:
        return None
    if run.processes.in_shards:
        return partial(run.processes.clip, limit=limit, by_value=run.config.clip_algorithm == "value")
    if run.config.clip_algorithm == "value":
        return lambda params: torch.nn.utils.clip_grad_value_(params, limit)
    return lambda params: torch.nn.utils.clip_grad_norm_(params, limit)

