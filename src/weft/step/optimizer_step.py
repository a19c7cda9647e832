"""The optimizer step: what follows once the gradients of a batch are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.devices.precision import check_and_unscale, stepping
from weft.devices.processes import own_part
from weft.step.instrument import watched
from weft.step.microbatches import combiner, divided, num_read, record, total
from weft.step.optimizers import needs_closure, parameters_of
from weft.step.trained import rest_of

if TYPE_CHECKING:
    from weft.step.state import RunState

READS_ARE_FREE = ("cpu",)  # kinds of devices where reading a number does not wait for work that was queued

Step = Callable[[Tensor | None, Sequence[tuple[Mapping[str, Any], int]]], bool]
"""(Loss, scalars read with their examples) -> whether the optimizers stepped."""


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
    doubts = None
    if not looks_at_each(state):
        from weft.step.doubts import noted

        doubts = noted(state, optimizers, scaled=unscale is not None)
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
            from weft.step.nonfinite import not_finite

            not_finite(state, loss, read)
        return finite

    return step


def clipping(state: RunState) -> Callable[[Sequence[Tensor]], Tensor | None] | None:
    """What clips the gradients of some parameters and returns their norm, if it is known; None: no clipping."""
    limit, by_value = state.config.clip, state.config.clip_algorithm == "value"
    return None if limit is None else partial(state.processes.clip, limit=limit, by_value=by_value)


# ---- are the numbers finite? -----------------------------------------------------------------------------------------


def ignores(state: RunState) -> bool:
    """Whether nobody looks whether numbers are finite: the optimizer steps with what there is."""
    return state.config.on_nonfinite == "ignore"


def looks_at_each(state: RunState) -> bool:
    """Whether each step is looked at by itself, or none; on a GPU many are looked at together later (`doubts`)."""
    if ignores(state) or state.fabric.device.type in READS_ARE_FREE:
        return True
    return state.processes.in_shards  # all ask each other anyhow


def finite_check(
    params: Sequence[Tensor], scaled: bool, ignore: bool = False
) -> Callable[[Tensor | None, Sequence[Tensor | None]], bool]:
    """A function (loss, gradient norms where known) -> whether loss and all gradients are finite, exactly.

    With known norms these are looked at; else torch's own multi-tensor check, which costs about 2 % of a small
    step. Under a gradient scaler the scaler decides about gradients (an overflow skips the step by design).
    """
    if ignore:
        return lambda loss, norms: True
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in params:
        by_kind.setdefault((p.dtype, p.device), []).append(p)
    kinds = [(alike, torch.zeros((), dtype=torch.float32, device=device)) for (_, device), alike in by_kind.items()]
    one = {found.device: torch.ones_like(found) for _, found in kinds}

    def is_finite(loss: Tensor | None, norms: Sequence[Tensor | None]) -> bool:
        if loss is not None and not math.isfinite(loss.item()):
            return False
        if scaled:
            return True
        if norms and norms[0] is not None:
            return all(math.isfinite(norm.item()) for norm in norms if norm is not None)
        for alike, found in kinds:
            own = [own_part(p.grad) for p in alike if p.grad is not None]
            grads = [g.coalesce().values() if g.is_sparse else g for g in own]
            if alike[0].is_complex():
                grads = [torch.view_as_real(grad) for grad in grads]
            check_and_unscale(grads, found.zero_(), one[found.device])
            if found.item():
                return False
        return True

    return is_finite


def look_back(state: RunState) -> None:
    """Act on a step since the last look that was not finite, where steps are not looked at one by one.

    It was left out.
    """
    if state.step.doubts is not None and (step := state.step.doubts.look()) is not None:
        from weft.step.nonfinite import not_finite

        not_finite(state, None, [(state.epoch.means.compute(), 1)], step)


def statistics_of(state: RunState) -> Any:
    """A copy of what normalisation layers learn, for each step that may be left out; None without such layers."""
    layers = [m for m in state.problem.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    if ignores(state) or not layers:
        return None
    from weft.step.nonfinite import RunningStatistics

    return RunningStatistics(layers)
