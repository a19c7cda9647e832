"""The optimizer step: what follows once the gradients of a batch are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from weft.devices.precision import stepping
from weft.step.instrument import watched
from weft.step.microbatches import combiner, divided, num_read, record, total
from weft.step.nonfinite import doubts_of, finite_check, ignores
from weft.step.optimizers import needs_closure, parameters_of
from weft.step.trained import rest_of

if TYPE_CHECKING:
    from weft.step.state import RunState

Step = Callable[[Tensor | None, Sequence[tuple[Mapping[str, Any], int]]], bool]
"""(Loss, scalars read with their examples) -> whether the optimizers stepped."""


def make_step(state: RunState, optimizers: Sequence[Optimizer]) -> Step:
    """A function (loss, what was read) -> whether the optimizers stepped: hooks, clipping, the check, the steps.

    Gradients that are NaN or infinite never reach an optimizer: either all of them step or none. Clears the gradients.
    """
    for optimizer in optimizers:
        if needs_closure(optimizer):
            raise TypeError(f"{type(optimizer).__name__} evaluates the loss itself (a closure): call update(batch).")
    before_step, clip = state.listeners("on_before_optimizer_step"), clipping(state)
    trainer, progress = state.trainer, state.progress
    by_value, own = state.config.clip_algorithm == "value", [(o, parameters_of(o)) for o in optimizers]
    params, (do_step, unscale) = [p for _, mine in own for p in mine], stepping(state.fabric, optimizers)
    cleared = [*params, *rest_of(state)]  # what gathers in parameters of no optimizer belongs to no later step
    do_step = watched(state.hooks, "optimizer", do_step)
    is_finite = finite_check(params, scaled=unscale is not None, ignore=ignores(state))
    doubts = doubts_of(state, optimizers, scaled=unscale is not None)
    guarded = () if unscale is not None else optimizers

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
            finite = state.processes.all_of(is_finite(loss, norms))
        if finite:
            if clip is not None and by_value:  # after the check: it makes infinite gradients finite
                clip(params)
            do_step()
            progress.skipped = 0
        for p in cleared:
            p.grad = None
        if not finite:
            from weft.step.skipping import not_finite

            not_finite(state, loss, read)
        return finite

    return step


def clipping(state: RunState) -> Callable[[Sequence[Tensor]], Tensor | None] | None:
    """What clips the gradients of some parameters and returns their norm, if it is known; None: no clipping."""
    limit, by_value = state.config.clip, state.config.clip_algorithm == "value"
    return None if limit is None else partial(state.processes.clip, limit=limit, by_value=by_value)


def closing(state: RunState, end: Callable[..., None]) -> Callable[[Any, list[Tensor], list[Any]], Tensor]:
    """What is done once all gradients are there: over all processes, step, count. Returns the loss of the whole."""
    step, combine = make_step(state, list(state.training.optimizers.values())), combiner(state)

    def close(batch: Any, losses: list[Tensor], read: list[Any]) -> Tensor:
        loss = divided(state, total(state, losses), read)
        if combine is not None:
            loss = combine(loss, num_read(read))
        if step(loss, read):
            record(state, read)
        end(batch, loss)
        return loss

    return close
